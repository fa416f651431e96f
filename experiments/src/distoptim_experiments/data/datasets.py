"""Data sets as tensors in memory, and the order in which a worker sees its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distoptim_experiments.data import augment as augmentation
from distoptim_experiments.data import cifar, idx, image_folder, text
from distoptim_experiments.models import gpt


@dataclass(frozen=True)
class Dataset:
    """Images [n, channels, height, width] as float32, labels [n] as int64.

    Each channel has mean 0 and variance 1 over the training set.

    Of text, windows of bytes and the byte after each: both [n, window] as int64.

    Attributes:
        validation: images and labels held out of the training set, if any were.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    validation: tuple[Tensor, Tensor] | None = None


def load(name: str, data_dir: Path | None = None, *, validation: float = 0.0) -> Dataset:
    """A data set of `DATASETS`.

    Args:
        name: see `parse`; or a file or folder of text.
        data_dir: folder of its files, for those that have files.
        validation: share of the training set to hold out, in [0, 1).

    Raises:
        ValueError: there is no such data set, or a file of it is missing or damaged.
    """
    loaded = (
        _text(Path(name)) if Path(name).exists() and not is_images(name) else parse(name)(data_dir)
    )
    return hold_out(loaded, validation) if validation else loaded


def hold_out(data: Dataset, share: float) -> Dataset:
    """The same with `share` of the training set, after a fixed shuffle, as validation set."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    held, kept = order.tensor_split([round(share * len(order))])
    return replace(
        data,
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        validation=(data.train_images[held], data.train_labels[held]),
    )


def _digits(data_dir: Path | None) -> Dataset:
    """1797 real 8x8 scans that come with scikit-learn.

    Every fifth, after a fixed shuffle, is for the test.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data='digits' needs scikit-learn: pip install 'distoptim[train]'"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = order[: len(order) // 5]
    train = order[len(order) // 5 :]
    return _standardised(images[train], labels[train], images[test], labels[test])


def _synthetic(data_dir: Path | None) -> Dataset:
    """Ten random 8x8 patterns in noise: 2000 to train on, 100 for the test, so that tests of a
    training loop, which evaluate often, are not mostly evaluation."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 8, 8, generator=g)
    labels = torch.arange(2100) % 10
    images = patterns[labels] + torch.randn(2100, 1, 8, 8, generator=g)
    return _standardised(images[:2000], labels[:2000], images[2000:], labels[2000:])


def _text(path: Path) -> Dataset:
    return Dataset(*text.load(path), classes=gpt.BYTES)


def is_images(name: str) -> bool:
    """Whether a name is that of a data set of images, and not of a file or folder of text."""
    return name in DATASETS or name.startswith("image-folder:")


def has_files(name: str) -> bool:
    """Whether a data set of images is read from files in a folder."""
    return is_images(name) and name not in ("digits", "synthetic")


def _standardised(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Dataset:
    for name, images in (("training", train_images), ("test", test_images)):
        if not images.numel():
            raise ValueError(f"the {name} images are {list(images.shape)}: allowed is at least one")
    if train_images.shape[1] == 1:
        mean = train_images.mean()
        std = train_images.std()
    else:
        std, mean = torch.std_mean(train_images, dim=(0, 2, 3), keepdim=True)
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    return Dataset(
        (train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels, classes
    )


def _of_files(data_dir: Path | None, *, name: str) -> Dataset:
    return _standardised(*(idx if name in idx.LAYOUTS else cifar).read_folder(data_dir, name=name))


def _image_folder(data_dir: Path | None, *, size: int = image_folder.SIZE) -> Dataset:
    return _standardised(*image_folder.read_folder(data_dir, size=size))


def parse(name: str) -> Callable[[Path | None], Dataset]:
    """What loads the images of a name, given their folder: one of `DATASETS`, or
    "image-folder:SIZE".

    Raises:
        ValueError: there is no such data set.
    """
    kind, colon, size = name.partition(":")
    if kind == "image-folder" and colon:
        return partial(_image_folder, size=image_folder.parse_size(size))
    if name not in DATASETS:
        raise ValueError(
            f"data={name!r}: allowed is one of {', '.join(DATASETS)}, image-folder:SIZE, "
            "or a file or folder of text"
        )
    return DATASETS[name]


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    **{name: partial(_of_files, name=name) for name in cifar.LAYOUTS},
    "digits": _digits,
    **{name: partial(_of_files, name=name) for name in idx.LAYOUTS},
    "image-folder": _image_folder,
    "synthetic": _synthetic,
}


class Batches:
    """An endless iterator over one worker's samples, shuffled anew at every pass.

    A batch that reaches the end of a pass goes on in the next, so all batches are full and all
    samples are seen equally often.

    Args:
        images: [n, ...].
        labels: [n].
        batch_size: samples per batch, >= 1.
        seed: of this worker's shuffles and augmentation.
        augment: `augment.crop_and_flip` every batch.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, batch_size: int, seed: int, augment: bool = False
    ) -> None:
        self._images = images
        self._labels = labels
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._augment = torch.Generator().manual_seed(seed) if augment else None
        self._position = 0
        self._shuffle()

    def __iter__(self) -> Batches:
        """Goes on where it stands, also in mid-epoch."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next images [batch, ...] and labels [batch]."""
        chosen = self._order[self._position : self._position + self._batch_size]
        self._position += len(chosen)
        while len(chosen) < self._batch_size:
            self._shuffle()
            self._position = min(self._batch_size - len(chosen), len(self._order))
            chosen = torch.cat([chosen, self._order[: self._position]])
        images = self._images[chosen]
        if self._augment is not None:
            images = augmentation.crop_and_flip(images, self._augment)
        return images, self._labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        """The place in the present pass, and the generator as it was before that pass was shuffled."""
        state = {"generator": self._before, "position": self._position}
        return state if self._augment is None else {**state, "augment": self._augment.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._generator.set_state(state_dict["generator"])
        self._shuffle()
        self._position = state_dict["position"]
        if self._augment is not None:
            self._augment.set_state(state_dict["augment"])

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        self._order = torch.randperm(len(self._labels), generator=self._generator)
        self._position = 0
