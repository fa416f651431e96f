"""Text as windows of bytes, each with the bytes that follow.

A data set like one of images and labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CONTEXT = 128
TEST_SHARE = 0.1


def load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training windows and what follows, test windows and what follows, each [n, CONTEXT] as int64.

    The last tenth of each file is for the test. Windows do not overlap, so that workers who get
    different windows see different text.

    Args:
        path: a file, or a folder of which all *.txt files are read in sorted order; any bytes will
            do.

    Raises:
        ValueError: there is no such file or folder, it cannot be read, or holds too little for a
            window of each part.
    """
    parts = [np.frombuffer(_read(file), dtype=np.uint8) for file in _files(path)]
    cuts = [len(part) - round(TEST_SHARE * len(part)) for part in parts]
    train = np.concatenate([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
    test = np.concatenate([part[cut:] for part, cut in zip(parts, cuts, strict=True)])
    if min(len(train), len(test)) <= CONTEXT:
        raise ValueError(
            f"{path}: {len(train) + len(test)} bytes of text are too few: {TEST_SHARE:.0%} of them are "
            f"for the test, and each part needs {CONTEXT + 1}"
        )
    return (*windows(train), *windows(test))


def windows(text: np.ndarray) -> tuple[Tensor, Tensor]:
    """All whole windows [n, CONTEXT], and for each position the byte that follows."""
    tokens = torch.from_numpy(text.astype(np.int64))
    used = (len(tokens) - 1) // CONTEXT * CONTEXT
    return tokens[:used].view(-1, CONTEXT), tokens[1 : used + 1].view(-1, CONTEXT)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder of text")
    files = sorted(path.glob("*.txt"))
    if not files:
        raise ValueError(f"{path}: no *.txt file in this folder")
    return files


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
