"""Text as data."""

from __future__ import annotations

import pytest
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import partition, text

from experiments.tests.data.texts import written


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "text")


def test_windows_and_what_follows_them(folder):
    d = data.load(str(folder))
    whole = (folder / "a.txt").read_bytes(), (folder / "b.txt").read_bytes()
    train = b"".join(part[: len(part) * 9 // 10] for part in whole)
    test = b"".join(part[len(part) * 9 // 10 :] for part in whole)
    assert d.classes == 256
    for inputs, follows, expected in (
        (d.train_images, d.train_labels, train),
        (d.test_images, d.test_labels, test),
    ):
        n = inputs.numel()
        assert len(expected) - 1 - text.CONTEXT < n <= len(expected) - 1
        assert bytes(inputs.flatten().tolist()) == expected[:n]
        assert bytes(follows.flatten().tolist()) == expected[1 : n + 1]


def test_one_file_is_a_text_too(folder):
    assert len(data.load(str(folder / "notes.md")).train_images) == (4500 - 1) // text.CONTEXT


def test_workers_see_different_windows(folder):
    labels = data.load(str(folder)).train_labels
    shards = [set(s.tolist()) for s in partition.partition("iid", labels, workers=3, seed=0)]
    assert sum(map(len, shards)) == len(set.union(*shards)) == len(labels)


def test_texts_that_will_not_do_are_named(folder, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    for path, message in (
        (tmp_path / "no", "allowed is one of cifar10.*digits.*or a file or folder of text"),
        (tmp_path / "none", r"no \*.txt file"),
        (tmp_path / "empty.txt", "0 bytes.*too few"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            data.load(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
