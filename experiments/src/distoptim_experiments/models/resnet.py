"""The large models for images of 32x32: ResNet-18, VGG-16 and WRN-28-10, in channels_last."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Size, Tensor, nn

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def resnet18(image: Size, classes: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no pooling before the blocks (He et al. 2016); 11,173,962
    parameters at 10 classes.

    Args:
        image: channels, height, width.
        classes: how many outputs.
    """
    widths = (64, 64, 128, 256, 512)
    strides = (1, 2, 2, 2)
    blocks = [
        block
        for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True)
        for block in (_Residual(inputs, outputs, stride), _Residual(outputs, outputs, 1))
    ]
    return _channels_last(
        nn.Sequential(
            _conv(image[0], 64),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            *blocks,
            *_head(512, classes),
        )
    )


def vgg16(image: Size, classes: int) -> nn.Module:
    """VGG-16 with batch norm and one linear layer (Simonyan and Zisserman 2015); 14,728,266
    parameters at 10 classes.

    Args:
        image: channels, height, width; both sides >= 32, for it halves them five times.
        classes: how many outputs.

    Raises:
        ValueError: the image is too small.
    """
    if min(image[1:]) < 32:
        raise ValueError(
            f"model='vgg16' halves the image five times: {image[1]}x{image[2]} is under 32x32"
        )
    layers: list[nn.Module] = []
    inputs = image[0]
    for stage in _VGG16:
        for outputs in stage:
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return _channels_last(nn.Sequential(*layers, *_head(512, classes)))


def wrn28_10(image: Size, classes: int) -> nn.Module:
    """WRN-28-10 without dropout (Zagoruyko and Komodakis 2016); 36,479,194 parameters at 10
    classes.

    Args:
        image: channels, height, width.
        classes: how many outputs.
    """
    widths = (16, 160, 320, 640)
    strides = (1, 2, 2)
    blocks = [
        _Wide(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1)
        for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True)
        for i in range(4)
    ]
    return _channels_last(
        nn.Sequential(
            _conv(image[0], 16),
            *blocks,
            nn.BatchNorm2d(640),
            nn.ReLU(inplace=True),
            *_head(640, classes),
        )
    )


class _Residual(nn.Module):
    """Two convolutions, each before its batch norm, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            _conv(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(_conv(inputs, outputs, stride, size=1), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Wide(nn.Module):
    """Two convolutions, each after its batch norm.

    A shortcut that changes the width starts after the first norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            _conv(outputs, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else _conv(inputs, outputs, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        active = self.before(x)
        out: Tensor = self.body(active) + (x if self.shortcut is None else self.shortcut(active))
        return out


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


def _channels_last(model: nn.Module) -> nn.Module:
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks this one
    return model
