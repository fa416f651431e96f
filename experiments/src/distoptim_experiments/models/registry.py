"""Models for images and for text, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Size, nn

from distoptim_experiments.models import gpt, resnet


def build(name: str, image: Size, classes: int) -> nn.Module:
    """A model of `MODELS`, initialised from torch's global generator.

    Args:
        name: its name.
        image: channels, height, width; of text the length of a window.
        classes: how many outputs.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"model={name!r}: allowed is one of {', '.join(MODELS)}")
    return MODELS[name](image, classes)


def _cnn(image: Size, classes: int, width: int = 48) -> nn.Module:
    """Three convolutions with batch norm, the last one halving the image.

    129 thousand parameters.
    """
    wide = 2 * width
    return nn.Sequential(
        *_block(image[0], width, stride=1),
        *_block(width, wide, stride=1),
        *_block(wide, wide, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * wide, classes),
    )


def _block(inputs: int, outputs: int, stride: int, size: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _mlp(image: Size, classes: int, width: int = 64) -> nn.Module:
    """One hidden layer; 5 thousand parameters at 8x8."""
    inputs = image.numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.Linear(width, classes)
    )


def _cnn_small(image: Size, classes: int, width: int = 16) -> nn.Module:
    """Three strided convolutions with batch norm, in channels_last.

    90 thousand parameters at 28x28.
    """
    side = [-(-size // 8) for size in image[1:]]
    model = nn.Sequential(
        *_block(image[0], width, stride=2, size=5),
        *_block(width, 2 * width, stride=2),
        *_block(2 * width, 4 * width, stride=2),
        nn.Flatten(),
        nn.Linear(4 * width * side[0] * side[1], 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, classes),
    )
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks this one
    return model


TEXT_MODELS: dict[str, Callable[[Size, int], nn.Module]] = {
    "gpt": gpt.build,
    "gpt-small": gpt.build_small,
}
LARGE: dict[str, Callable[[Size, int], nn.Module]] = {
    "resnet18": resnet.resnet18,
    "vgg16": resnet.vgg16,
    "wrn28-10": resnet.wrn28_10,
}
MODELS: dict[str, Callable[[Size, int], nn.Module]] = {
    **TEXT_MODELS,
    **LARGE,
    "cnn": _cnn,
    "cnn-small": _cnn_small,
    "mlp": _mlp,
}
