"""Images in folders named by their class: train/CLASS/*.png and test/CLASS/*.png, or .jpg."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distoptim import checks

SIZE = 64
_SUFFIXES = (".png", ".jpg", ".jpeg")


def parse_size(text: str) -> int:
    """The side of the images, from text.

    Raises:
        ValueError: not an integer from 4 to 1024.
    """
    return checks.integer(
        f"data='image-folder:{text}': the size", int(text) if text.isdecimal() else text, 4, 1024
    )


def read_folder(folder: Path | None, *, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; images [n, 3, size, size] in [0,
    1], labels [n].

    An image is turned to RGB, its shorter side scaled to `size` (bilinear, over all pixels that
    become one), and the middle cut out. Classes are numbered in the order of their names.

    Args:
        folder: holds train/CLASS and test/CLASS with *.png, *.jpg or *.jpeg; other files are passed
            over.
        size: side of the images in pixels.

    Raises:
        ValueError: no folder is given, train or test is missing, their classes differ, a class has
            no image, or one cannot be read.
    """
    if folder is None:
        raise ValueError(
            "data='image-folder' needs --data-dir, the folder with train/CLASS and test/CLASS, in each of "
            f"which are images ({', '.join('*' + suffix for suffix in _SUFFIXES)})"
        )
    train, test = (_classes(folder / part) for part in ("train", "test"))
    if train != test:
        only = [
            f"{name} only in {here}"
            for here, names in (("train", train - test), ("test", test - train))
            for name in sorted(names)
        ]
        raise ValueError(f"{folder}: train and test must have the same classes: {', '.join(only)}")
    return (
        *_read(folder / "train", sorted(train), size),
        *_read(folder / "test", sorted(train), size),
    )


def _classes(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; data='image-folder' needs train/CLASS and test/CLASS"
        )
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    if not names:
        raise ValueError(f"{folder}: no folder in it; there must be one for each class")
    return names


def _read(folder: Path, classes: list[str], size: int) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            file for file in (folder / name).iterdir() if file.suffix.lower() in _SUFFIXES
        )
        if not files:
            raise ValueError(
                f"{folder / name}: a class without images ({', '.join('*' + s for s in _SUFFIXES)})"
            )
        images += [_image(file, size) for file in files]
        labels += [label] * len(files)
    return torch.stack(images).float() / 255, torch.tensor(labels)


def _image(file: Path, size: int) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError(
            "data='image-folder' needs Pillow: pip install 'distoptim[train]'"
        ) from error
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read as an image: {error}") from error
    return (
        torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        .view(size, size, 3)
        .permute(2, 0, 1)
    )
