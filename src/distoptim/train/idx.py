"""Files in the IDX format of MNIST and Fashion-MNIST, compressed or not."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_UNSIGNED_BYTE = 8


def read_folder(folder: Path, names: Sequence[str] = FILES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images [n, 1, h, w] in [0, 1], labels [n].

    Args:
        folder: holds the four files, each as it is or with ".gz".
        names: theirs; images and labels of the training set, then of the test set.

    Raises:
        ValueError: a file is missing or damaged, or images and labels differ in number.
    """
    paths = [_find(folder, name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise ValueError(f"{folder}: missing {', '.join(missing)} (each may end in .gz)")
    arrays = [read(path) for path in paths if path is not None]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} do not belong "
                             "together")
    train, train_labels, test, test_labels = arrays
    return (train.unsqueeze(1).float() / 255, train_labels.long(), test.unsqueeze(1).float() / 255, test_labels.long())


def read(path: Path) -> Tensor:
    """The array in one IDX file of unsigned bytes, as uint8.

    Raises:
        ValueError: naming the file, if it is of another format or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
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
        raise ValueError(f"{path}: {len(content) - start} bytes of data, expected {math.prod(shape)} for {list(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
