import hashlib
import tarfile
from dataclasses import replace

import pytest
import torch
from distoptim_experiments.data import cifar
from distoptim_experiments.data import datasets as data


def record(*labels, colour):
    """One record as published: the labels, then 1024 bytes of each of red, green and blue."""
    return bytes(labels) + b"".join(bytes([value]) * 1024 for value in colour)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Both data sets with two records in each training file and one in each test file."""
    for name, layout in cifar.LAYOUTS.items():
        monkeypatch.setitem(cifar.LAYOUTS, name, replace(layout, train_records=2, test_records=1))
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(
            record(i, colour=(i, 100, 200)) + record(0, colour=(10 * i, 0, 30))
        )
    (tmp_path / "test_batch.bin").write_bytes(record(9, colour=(255, 0, 51)))
    (tmp_path / "train.bin").write_bytes(
        record(19, 99, colour=(1, 2, 3)) + record(0, 7, colour=(4, 5, 9))
    )
    (tmp_path / "test.bin").write_bytes(record(3, 42, colour=(0, 0, 255)))
    return tmp_path


def test_cifar10_bytes_become_labels_and_channels_in_order(folder):
    images, labels, test_images, test_labels = cifar.read_folder(folder, name="cifar10")
    assert images.shape == (10, 3, 32, 32)
    assert labels.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert test_labels.tolist() == [9]
    assert torch.equal(test_images[0, :, 31, 31], torch.tensor([255.0, 0.0, 51.0]) / 255)


def test_cifar100_labels_are_the_fine_ones(folder):
    _, labels, test_images, test_labels = cifar.read_folder(folder, name="cifar100")
    assert (labels.tolist(), test_labels.tolist()) == ([99, 7], [42])
    assert test_images[0, :, 0, 0].tolist() == [0, 0, 1]


def test_pixels_are_row_major(folder):
    (folder / "test_batch.bin").write_bytes(bytes([1]) + bytes(i % 251 for i in range(3072)))
    pixels = cifar.read_folder(folder, name="cifar10")[2][0] * 255
    assert round(float(pixels[1, 2, 3])) == (1024 + 2 * 32 + 3) % 251


def test_each_colour_is_standardised(folder):
    images = data.load("cifar10", folder).train_images
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-5)


def test_missing_files_come_with_the_address(folder):
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(
        ValueError,
        match=r"missing data_batch_3.bin of.*https://www.cs.toronto.edu.*cifar-10-binary.tar.gz",
    ):
        data.load("cifar10", folder)
    with pytest.raises(
        ValueError, match=r"cifar100.*--data-dir.*train.bin, test.bin.*https://www.cs.toronto.edu"
    ):
        data.load("cifar100")


def test_damaged_files_are_named(folder):
    (folder / "test.bin").write_bytes(b"abc")
    with pytest.raises(
        ValueError, match=r"test\.bin: 3 bytes, expected 3074 \(1 records of 3074\)"
    ):
        data.load("cifar100", folder)
    (folder / "test_batch.bin").write_bytes(record(10, colour=(0, 0, 0)))
    with pytest.raises(ValueError, match=r"test_batch\.bin: label 10, allowed is 0 to 9"):
        data.load("cifar10", folder)


def test_the_archive_is_read_as_it_is_if_its_checksum_is_right(folder, monkeypatch):
    expected = cifar.read_folder(folder, name="cifar10")
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.glob("*_batch*.bin")):
            tar.add(path, f"cifar-10-batches-bin/{path.name}")
            path.unlink()
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=rf"cifar-10-binary\.tar\.gz: .*{md5}, expected c32a1d4ab5d0"
    ):
        data.load("cifar10", folder)
    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", replace(cifar.LAYOUTS["cifar10"], md5=md5))
    assert all(
        torch.equal(a, b)
        for a, b in zip(cifar.read_folder(folder, name="cifar10"), expected, strict=True)
    )
    assert not list(folder.glob("data_batch*"))
