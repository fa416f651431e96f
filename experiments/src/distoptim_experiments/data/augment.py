"""Random changes of training images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Each image moved by up to `padding` pixels each way, what comes in being 0, and mirrored half
    of the time.

    Args:
        images: [n, channels, height, width].
        generator: on the CPU, whatever the device of the images.
        padding: pixels, >= 0; 4 is usual for 32x32 (He et al. 2016, section 4.2).
    """
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    flip = torch.randint(2, (n, 1), generator=generator).bool()
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    rows = rows.to(images.device)
    columns = columns.to(images.device)
    image = torch.arange(n, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    padded = functional.pad(images, [padding] * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
