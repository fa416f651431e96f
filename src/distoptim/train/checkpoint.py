"""Checkpoints of a run: one file a worker, in a folder that becomes the latest only when all have written theirs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distoptim.train.world import World

FOLDER = "checkpoints"
_LATEST = "latest"


def save(folder: Path, *, world: World, step: int, state: dict[str, Any]) -> Path:
    """Write every worker's state and make it the latest; collective. Killed at any moment, an older one stays.

    Args:
        folder: the run's.
        world: the workers.
        step: local steps made; names the checkpoint.
        state: this worker's; tensors and plain data, readable with torch.load(weights_only=True).
    """
    target = folder / FOLDER / f"step-{step}"
    target.mkdir(parents=True, exist_ok=True)
    replace(target / f"rank-{world.rank}.pt", {**state, "step": step, "workers": world.size})
    world.barrier()
    # All write it, since on several machines each has a folder of its own.
    draft = target.parent / f"{_LATEST}-{world.rank}.draft"
    draft.write_text(target.name)
    os.replace(draft, target.parent / _LATEST)
    world.barrier()
    for old in target.parent.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def exists(folder: Path) -> bool:
    """Whether a run has left a checkpoint."""
    return (folder / FOLDER / _LATEST).is_file()


def latest(folder: Path) -> Path:
    """The folder of a run's latest checkpoint.

    Raises:
        ValueError: there is none.
    """
    if not exists(folder):
        raise ValueError(f"{folder}: no checkpoint there to resume from")
    return folder / FOLDER / (folder / FOLDER / _LATEST).read_text()


def load(folder: Path, *, world: World) -> tuple[dict[str, Any], bool]:
    """This worker's state of the latest checkpoint, and whether it is really this worker's.

    At another number of workers, those for whom there is no state of their own get one of another's; none of
    them can then go on where it was.

    Raises:
        ValueError: there is no checkpoint, or its file is damaged.
    """
    source = latest(folder)
    saved = read(source / "rank-0.pt")
    if saved["workers"] == world.size:
        return read(source / f"rank-{world.rank}.pt"), True
    return read(source / f"rank-{world.rank % saved['workers']}.pt"), False


def read(path: Path) -> dict[str, Any]:
    """A saved state. Raises ValueError, naming the file, if it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {error}") from error
    return state


def replace(path: Path, state: dict[str, Any]) -> None:
    """Save a state; killed or without room on the disk, what was there stays.

    Raises:
        ValueError: naming the file, if it cannot be written.
    """
    draft = path.with_suffix(".draft")
    try:
        torch.save(state, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be written: {error}") from error
