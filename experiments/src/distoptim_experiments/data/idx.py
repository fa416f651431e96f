"""Data sets in the IDX format of MNIST, each of their four files compressed or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distoptim_experiments.data.files import check_md5, missing

_UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class Layout:
    """The four files of one data set: images and labels of the training set, then of the test set.

    Attributes:
        files: their names, uncompressed.
        source: where they can be had.
        published: number of bytes -> MD5 of a file that has so many, uncompressed.
        upright: false if the images are stored transposed.
        first_label: the number of the first class.
    """

    files: tuple[str, str, str, str]
    source: str
    published: Mapping[int, str] = field(default_factory=dict)
    upright: bool = True
    first_label: int = 0


_MNIST = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _emnist(split: str) -> Layout:
    train, train_labels, test, test_labels = (
        f"emnist-{split}-{file.replace('t10k', 'test')}" for file in _MNIST
    )
    return Layout(
        (train, train_labels, test, test_labels),
        "https://www.nist.gov/itl/products-and-services/emnist-dataset",
        upright=False,
        first_label=1 if split == "letters" else 0,
    )


LAYOUTS = {
    "mnist": Layout(
        _MNIST,
        "http://yann.lecun.com/exdb/mnist/",
        {
            47_040_016: "6bbc9ace898e44ae57da46a324031adb",
            60_008: "a25bea736e30d166cdddb491f175f624",
            7_840_016: "2646ac647ad5339dbf082846283269ea",
            10_008: "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion-mnist": Layout(
        _MNIST,
        "https://github.com/zalandoresearch/fashion-mnist",
        {
            47_040_016: "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            60_008: "9018921c3c673c538a1fc5bad174d6f9",
            7_840_016: "8181f5470baa50b63fa0f6fddb340f0a",
            10_008: "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
    **{
        f"emnist-{split}": _emnist(split)
        for split in ("balanced", "letters", "digits", "byclass", "bymerge", "mnist")
    },
}


def read_folder(folder: Path | None, *, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images [n, 1, h, w] in [0, 1],
    labels [n] from 0.

    Args:
        folder: holds the four files, each as it is or with ".gz".
        name: one of `LAYOUTS`.

    Raises:
        ValueError: no folder is given, a file is missing, damaged or not the published one, or
            images and labels differ in number.
    """
    layout = LAYOUTS[name]
    source = f"{layout.source} (each may end in .gz)"
    if folder is None:
        raise missing(None, layout.files, name=name, source=source)
    paths = [_find(folder, file) for file in layout.files]
    absent = [file for file, path in zip(layout.files, paths, strict=True) if path is None]
    if absent:
        raise missing(folder, absent, name=name, source=source)
    arrays = [read(path, layout.published) for path in paths if path is not None]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} do not belong "
                "together"
            )
    train, train_labels, test, test_labels = arrays
    first = layout.first_label
    return (
        _pixels(train, layout),
        train_labels.long() - first,
        _pixels(test, layout),
        test_labels.long() - first,
    )


def read(path: Path, published: Mapping[int, str] | None = None) -> Tensor:
    """The array in one IDX file of unsigned bytes, as uint8.

    Args:
        path: of the file.
        published: see `files.check_md5`; of the content, uncompressed.

    Raises:
        ValueError: naming the file, if it is of another format, cut off, or not the published one.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    # Two zero bytes, the element type, the number of dimensions; then each dimension, big-endian.
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path}: cut off in the header")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path}: {len(content) - start} bytes of data, expected {math.prod(shape)} for {list(shape)}"
        )
    check_md5(path, content, published or {})
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _pixels(images: Tensor, layout: Layout) -> Tensor:
    images = images.unsqueeze(1).float() / 255
    return images if layout.upright else images.mT.contiguous()
