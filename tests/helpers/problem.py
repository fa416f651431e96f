"""The toy problem of the reference numbers: 4 workers, least squares in 10 dimensions, float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

REFERENCE = Path(__file__).parent.parent / "reference"
# Read once: an array of a .npz file is unpacked anew at every access.
with np.load(REFERENCE / "problem_data.npz") as _file:
    DATA = {name: torch.from_numpy(array) for name, array in _file.items()}
WORKERS, STEPS, LR, MOMENTUM, WEIGHT_DECAY = 4, 40, 0.05, 0.9, 1e-4


def start() -> list[Tensor]:
    x = DATA["lsq|init"]
    return [x[:8].reshape(2, 4).clone(), x[8:].clone()]


def gradient(rank: int, params: list[Tensor]) -> list[Tensor]:
    """Of the mean squared error of worker `rank`'s shard."""
    x = DATA[f"lsq|X{rank}"]
    y = DATA[f"lsq|Y{rank}"]
    error = (x @ params[0].T + params[1] - y) / len(x)
    return [error.T @ x, error.sum(0)]
