"""The binary version of CIFAR-10 and CIFAR-100: records of one or two label bytes and 3 x 32 x 32 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar.html"
_IMAGE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one data set, the records in each, and the label bytes of a record, of which the last counts."""

    train: tuple[str, ...]
    test: str
    train_records: int
    test_records: int
    label_bytes: int
    classes: int


LAYOUTS = {
    "cifar10": Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 10_000, 10_000, 1, 10),
    "cifar100": Layout(("train.bin",), "test.bin", 50_000, 10_000, 2, 100),
}


def read_folder(folder: Path | None, *, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images [n, 3, 32, 32] in [0, 1], labels [n].

    Args:
        folder: holds the files of the layout.
        name: one of `LAYOUTS`; of CIFAR-100 the labels are the fine ones.

    Raises:
        ValueError: no folder is given, or a file is missing or damaged.
    """
    layout = LAYOUTS[name]
    files = (*layout.train, layout.test)
    if folder is None:
        raise ValueError(f"data={name!r} needs --data-dir, the folder with {', '.join(files)} "
                         f"(binary version of {ADDRESS})")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: missing {', '.join(missing)} (binary version of {ADDRESS})")
    train = [_read(folder / file, layout, layout.train_records) for file in layout.train]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    return (images, labels, *_read(folder / layout.test, layout, layout.test_records))


def _read(path: Path, layout: Layout, records: int) -> tuple[Tensor, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error
    size = layout.label_bytes + _PIXELS
    if len(content) != records * size:
        raise ValueError(f"{path}: {len(content)} bytes, expected {records * size} ({records} records of {size})")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(records, size)
    labels = rows[:, layout.label_bytes - 1].long()
    if int(labels.max()) >= layout.classes:
        raise ValueError(f"{path}: label {int(labels.max())}, allowed is 0 to {layout.classes - 1}")
    return rows[:, layout.label_bytes:].reshape(records, *_IMAGE).float() / 255, labels
