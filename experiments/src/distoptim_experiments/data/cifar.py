"""The binary version of CIFAR-10 and CIFAR-100.

Records of one or two label bytes and 3 x 32 x 32 pixels.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distoptim_experiments.data.files import check_md5, missing

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)"
_IMAGE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one data set, the records in each, and the label bytes of a record, of which the
    last counts.

    Attributes:
        archive, md5: the file that is published with all others in it, and its checksum.
    """

    train: tuple[str, ...]
    test: str
    train_records: int
    test_records: int
    label_bytes: int
    classes: int
    archive: str
    md5: str


LAYOUTS = {
    "cifar10": Layout(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        10_000,
        10_000,
        1,
        10,
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": Layout(
        ("train.bin",),
        "test.bin",
        50_000,
        10_000,
        2,
        100,
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
    ),
}


def read_folder(folder: Path | None, *, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images [n, 3, 32, 32] in [0, 1],
    labels [n].

    Args:
        folder: holds the files of the layout, or the archive, whose checksum is compared.
        name: one of `LAYOUTS`; of CIFAR-100 the labels are the fine ones.

    Raises:
        ValueError: no folder is given, a file is missing or damaged, or the archive is not the
            published one.
    """
    layout = LAYOUTS[name]
    files = (*layout.train, layout.test)
    source = f"{SOURCE}, {layout.archive}, which may lie there as it is"
    if folder is None:
        raise missing(None, files, name=name, source=source)
    absent = [file for file in files if not (folder / file).is_file()]
    if absent and not (folder / layout.archive).is_file():
        raise missing(folder, absent, name=name, source=source)
    contents = (
        _archived(folder / layout.archive, layout)
        if absent
        else {f: _bytes(folder / f) for f in files}
    )
    train = [
        _records(folder / file, contents[file], layout, layout.train_records)
        for file in layout.train
    ]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    return (
        images,
        labels,
        *_records(folder / layout.test, contents[layout.test], layout, layout.test_records),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error


def _archived(path: Path, layout: Layout) -> dict[str, bytes]:
    """The content of each file in the archive, by its name without the folder."""
    content = _bytes(path)
    check_md5(path, content, {len(content): layout.md5})
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        members = {
            Path(member.name).name: archive.extractfile(member)
            for member in archive
            if member.isfile()
        }
        return {name: file.read() for name, file in members.items() if file is not None}


def _records(path: Path, content: bytes, layout: Layout, records: int) -> tuple[Tensor, Tensor]:
    size = layout.label_bytes + _PIXELS
    if len(content) != records * size:
        raise ValueError(
            f"{path}: {len(content)} bytes, expected {records * size} ({records} records of {size})"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(records, size)
    labels = rows[:, layout.label_bytes - 1].long()
    if int(labels.max()) >= layout.classes:
        raise ValueError(f"{path}: label {int(labels.max())}, allowed is 0 to {layout.classes - 1}")
    return rows[:, layout.label_bytes :].reshape(records, *_IMAGE).float() / 255, labels
