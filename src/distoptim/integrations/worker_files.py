"""A worker's own file beside a trainer's checkpoint, which holds the mean: for all trainers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distoptim.optimizer import AveragingOptimizer

logger = logging.getLogger("distoptim")

_NAME = re.compile(r"distoptim_(\d+)_of_(\d+)\.pt")


def write(
    folder: Path,
    model: torch.nn.Module,
    optimizers: Mapping[str, AveragingOptimizer],
    beside: Mapping[str, Any],
) -> None:
    """Save what is this worker's own; on all workers.

    Args:
        folder: of the trainer's checkpoint; made if it is not there.
        model: with the local parameters.
        optimizers: by name.
        beside: what else workers have of their own, such as schedulers; plain data and tensors.
    """
    path = _path(folder, optimizers)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": model.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "beside": dict(beside),
    }
    torch.save(content, path)


def remove(folder: Path, optimizers: Mapping[str, AveragingOptimizer]) -> None:
    """Delete this worker's file, if it is there."""
    _path(folder, optimizers).unlink(missing_ok=True)


@torch.no_grad()
def read(
    folder: Path, model: torch.nn.Module, optimizers: Mapping[str, AveragingOptimizer]
) -> dict[str, Any] | None:
    """Go on from a checkpoint, whose mean was loaded into the model; collective.

    On another number of workers worker i takes the state of worker i mod n of the n saved ones, and all
    start from the anchor. Without files a new run starts from the model as it is, which is said in one line.

    Returns: what was saved beside; None on another number of workers, or where there are no files.
    """
    rank, workers = _rank_and_size(optimizers)
    found = {
        (int(match[2]), int(match[1])): path
        for path in folder.glob("distoptim_*")
        if (match := _NAME.fullmatch(path.name))
    }
    if not found:
        logger.warning("%s has no state of distoptim: a new run starts from its weights", folder)
        for optimizer in optimizers.values():
            optimizer.load_state_dict(optimizer.inner.state_dict())
        return None
    alike = any(of == workers for of, _ in found)
    of = workers if alike else max(of for of, _ in found)
    if (of, rank % of) not in found:
        raise ValueError(
            f"{folder} has no distoptim_{rank % of}_of_{of}.pt, only "
            f"{sorted(path.name for path in found.values())}: each worker loads what it saved"
        )
    saved = torch.load(found[of, rank % of], map_location="cpu", weights_only=True)
    if alike:
        model.load_state_dict(saved["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    beside: dict[str, Any] = saved["beside"]
    return beside if alike else None


def _path(folder: Path, optimizers: Mapping[str, AveragingOptimizer]) -> Path:
    rank, workers = _rank_and_size(optimizers)
    return folder / f"distoptim_{rank}_of_{workers}.pt"


def _rank_and_size(optimizers: Mapping[str, AveragingOptimizer]) -> tuple[int, int]:
    """This worker, and how many there are."""
    communicator = next(iter(optimizers.values())).engine.communicator
    return communicator.rank, communicator.size
