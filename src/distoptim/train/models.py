"""Small models for images of one channel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Size, nn


def build(name: str, image: Size, classes: int) -> nn.Module:
    """A model of `MODELS`, initialised from torch's global generator.

    Args:
        name: its name.
        image: channels, height, width; both sides multiples of 4.
        classes: how many outputs.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model={name!r}: allowed is one of {', '.join(MODELS)}")
    return MODELS[name](image, classes)


def _cnn(image: Size, classes: int, width: int = 32) -> nn.Module:
    """Three convolutions with batch norm, the last two halving the image; 58 thousand parameters at 8x8."""
    channels, height, breadth = image
    return nn.Sequential(
        *_block(channels, width, stride=1), *_block(width, 2 * width, stride=2), *_block(2 * width, 2 * width, stride=2),
        nn.Flatten(), nn.Linear(2 * width * (height // 4) * (breadth // 4), classes))


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _mlp(image: Size, classes: int, width: int = 64) -> nn.Module:
    """One hidden layer; 5 thousand parameters at 8x8."""
    return nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), width), nn.ReLU(inplace=True), nn.Linear(width, classes))


MODELS: dict[str, Callable[[Size, int], nn.Module]] = {"cnn": _cnn, "mlp": _mlp}
