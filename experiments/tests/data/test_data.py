import gzip
import hashlib
import struct
from dataclasses import replace

import pytest
import torch
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import idx, partition


def write_idx(path, array):
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    content = header + array.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path):
    """Six training and three test images of 28x28; two of the files compressed."""
    g = torch.Generator().manual_seed(0)
    for name, n, suffix in (("train", 6, ".gz"), ("t10k", 3, "")):
        images = torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=g)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(
            tmp_path / f"{name}-labels-idx1-ubyte{suffix}", torch.arange(n, dtype=torch.uint8)
        )
    return tmp_path


def test_idx_file_holds_what_was_written(tmp_path):
    array = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a", array)
    write_idx(tmp_path / "a.gz", array)
    assert torch.equal(idx.read(tmp_path / "a"), array)
    assert torch.equal(idx.read(tmp_path / "a.gz"), array)


def test_idx_folder_is_standardised(folder):
    d = data.load("fashion-mnist", folder)
    assert d.train_images.shape == (6, 1, 28, 28)
    assert d.test_labels.tolist() == [0, 1, 2]
    assert d.classes == 6
    assert abs(float(d.train_images.mean())) < 1e-5
    assert float(d.train_images.std()) == pytest.approx(1, abs=1e-5)


def test_missing_files_are_named(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        ValueError, match=r"missing t10k-labels-idx1-ubyte of.*yann\.lecun\.com.*in .gz"
    ) as error:
        data.load("mnist", folder)
    assert str(folder) in str(error.value)
    with pytest.raises(
        ValueError, match=r"mnist.*needs --data-dir.*train-images-idx3-ubyte.*github\.com/zalando"
    ):
        data.load("fashion-mnist")


def test_a_file_of_the_published_size_must_have_the_published_checksum(folder, monkeypatch):
    content = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    right = hashlib.md5(content).hexdigest()
    for md5 in (right, "0" * 32):
        monkeypatch.setitem(
            idx.LAYOUTS, "mnist", replace(idx.LAYOUTS["mnist"], published={len(content): md5})
        )
        if md5 == right:
            data.load("mnist", folder)
            continue
        with pytest.raises(
            ValueError, match=rf"train-images-idx3-ubyte\.gz: .*{right}, expected 0{{32}}"
        ):
            data.load("mnist", folder)
    # All sizes are those of 60,000 and 10,000 images of 28 x 28, and of their labels.
    for name in ("mnist", "fashion-mnist"):
        monkeypatch.undo()
        assert list(idx.LAYOUTS[name].published) == [
            60_000 * 784 + 16,
            60_000 + 8,
            10_000 * 784 + 16,
            10_000 + 8,
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\1....", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "3 bytes of data, expected 5"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        idx.read(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)


def test_damaged_gzip_is_named(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc")[:-6])
    whole = bytearray(gzip.compress(bytes(range(256)) * 9))
    (tmp_path / "y.gz").write_bytes(whole[:20] + bytes([whole[20] ^ 255]) + whole[21:])
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=rf"{name}\.gz"):
            idx.read(tmp_path / f"{name}.gz")


def test_images_and_labels_must_belong_together(folder):
    write_idx(folder / "t10k-labels-idx1-ubyte", torch.arange(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        idx.read_folder(folder, name="mnist")


@pytest.mark.parametrize("of", ["train", "t10k"])
def test_a_file_without_images_is_refused(folder, of):
    for kind, shape in (("images-idx3", (0, 4, 4)), ("labels-idx1", (0,))):
        write_idx(folder / f"{of}-{kind}-ubyte", torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images are \[0, 1, 4, 4\]: allowed is at least one$"):
        data.load("fashion-mnist", folder)


def test_digits_are_split_the_same_way_every_time():
    a, b = data.load("digits"), data.load("digits")
    assert (len(a.train_labels), len(a.test_labels), a.classes) == (1438, 359, 10)
    assert a.train_images.shape[1:] == (1, 8, 8)
    assert torch.equal(a.test_images, b.test_images)
    rows = {tuple(x.flatten().tolist()) for x in a.train_images}
    assert not any(tuple(x.flatten().tolist()) in rows for x in a.test_images)


# With 14 workers shards differ in size, and four classes have two owners.
@pytest.mark.parametrize("workers", [1, 3, 4, 14])
@pytest.mark.parametrize(
    "name", ["iid", "label-skew", "label-skew:1", "dirichlet", "dirichlet:0.3"]
)
def test_partition_uses_each_sample_once(name, workers):
    shards = partition.partition(name, torch.arange(103) % 10, workers=workers, seed=1)
    assert sorted(torch.cat(shards).tolist()) == list(range(103))
    # Cards are dealt out evenly; Dirichlet's shares are random.
    assert max(map(len, shards)) - min(map(len, shards)) <= (
        103 if name.startswith("dirichlet") else 1
    )


def test_label_skew_is_that_of_the_paper():
    labels = torch.arange(50_000) % 10
    shards = partition.partition("label-skew", labels, workers=16, seed=3)
    assert [len(shard) for shard in shards] == [3125] * 16
    assert partition.main_classes(16, 10) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 3, 5, 7, 9, 2]
    for shard, main in zip(shards, partition.main_classes(16, 10), strict=True):
        # 2000 of the main class, and some more of it among the 1125 drawn from the rest.
        count = torch.bincount(labels[shard], minlength=10)
        assert 2000 <= count[main] < 2400
        # 18,000 are left: 3000 of each class with one owner, 1000 of the others.
        expected = [
            1125 * (1000 if label in (1, 2, 3, 5, 7, 9) else 3000) / 18_000 for label in range(10)
        ]
        for label in range(10):
            assert (
                abs(count[label] - 2000 * (label == main) - expected[label])
                < 5.5 * expected[label] ** 0.5
            )


def test_dirichlet_goes_from_skewed_to_even():
    labels = torch.arange(10_000) % 10
    spread = []
    for concentration in (0.1, 1000):
        shards = partition.partition(f"dirichlet:{concentration}", labels, workers=4, seed=0)
        counts = torch.stack(
            [torch.bincount(labels[shard], minlength=10) for shard in shards]
        ).float()
        spread.append(float(counts.std(0).mean()))
    assert spread[0] > 200 > 30 > spread[1]


def test_partition_refuses_empty_shards():
    with pytest.raises(ValueError, match="workers=5"):
        partition.partition("iid", torch.zeros(4), workers=5, seed=0)


@pytest.mark.parametrize("name", ["data", "partition"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}='x'.*allowed is one of"):
        data.load("x") if name == "data" else partition.partition(
            "x", torch.zeros(4), workers=1, seed=0
        )


def batches(batch_size, n=7, seed=3):
    return data.Batches(torch.arange(n), torch.arange(n), batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_are_full_and_use_samples_equally_often(batch_size):
    seen = torch.cat(
        [labels for (_, labels), _ in zip(batches(batch_size), range(14), strict=False)]
    )
    assert len(seen) == 14 * batch_size
    for start in range(0, len(seen) - 6, 7):
        assert sorted(seen[start : start + 7].tolist()) == list(range(7))


@pytest.mark.parametrize("batch_size", [3, 7, 10])
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 7])
def test_batches_go_on_from_their_state(batch_size, stop):
    whole, first, second = batches(batch_size), batches(batch_size), batches(batch_size, seed=99)
    expected = [next(whole)[1].tolist() for _ in range(stop + 6)]
    for _ in range(stop):
        next(first)
    second.load_state_dict(first.state_dict())
    assert [next(second)[1].tolist() for _ in range(6)] == expected[stop:]


def test_emnist_is_turned_upright_and_counts_from_zero(tmp_path):
    pixels = bytes(range(12))
    for part in ("train", "test"):
        (tmp_path / f"emnist-letters-{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 2, 3) + pixels
        )
        with gzip.open(tmp_path / f"emnist-letters-{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + bytes([1, 26]))
    loaded = data.load("emnist-letters", tmp_path)
    assert loaded.train_images.shape == (2, 1, 3, 2)
    flat = loaded.train_images[0, 0]
    assert flat.t().flatten().argsort().tolist() == list(range(6))
    assert loaded.train_labels.tolist() == [0, 25]
    assert loaded.classes == 26
    with pytest.raises(ValueError, match="missing emnist-balanced-train-images"):
        data.load("emnist-balanced", tmp_path)
    with pytest.raises(ValueError, match=r"nist\.gov"):
        data.load("emnist-balanced")
