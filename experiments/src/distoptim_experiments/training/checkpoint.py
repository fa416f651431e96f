"""Checkpoints of a run.

One file a rank, in a folder that becomes the latest only when all have written theirs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distoptim_experiments.training.world import World

FOLDER = "checkpoints"
_LATEST = "latest"


def save(folder: Path, *, world: World, step: int, state: dict[str, Any]) -> Path:
    """Write every rank's state and make it the latest; collective. Killed at any moment, an older
    one stays.

    Args:
        folder: the run's.
        world: the workers.
        step: local steps made; names the checkpoint.
        state: this rank's; tensors and plain data, readable with torch.load(weights_only=True).
    """
    target = folder / FOLDER / f"step-{step}"
    target.mkdir(parents=True, exist_ok=True)
    whole = {**state, "step": step, "workers": world.workers, "island_size": world.island_size}
    replace(target / f"rank-{world.rank}.pt", whole)
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
    """This rank's state of the latest checkpoint, and whether it is really its worker's.

    At another number of workers, those for whom there is no state of their own get one of
    another's; none of them can then go on where it was. At another size of islands ranks get that
    of their worker's first rank.

    Raises:
        ValueError: there is no checkpoint, or its file is damaged.
    """
    source = latest(folder)
    saved = read(source / "rank-0.pt")
    size = saved.get("island_size", 1)
    place = world.place if size == world.island_size else 0
    state = read(source / f"rank-{world.worker % saved['workers'] * size + place}.pt")
    return state, saved["workers"] == world.workers


def read(path: Path) -> dict[str, Any]:
    """A saved state. Raises ValueError, naming the file, if it is damaged."""
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        # What torch says of it is long, and advises to trust the file.
        raise ValueError(f"{path}: damaged, not a checkpoint") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: damaged, not a checkpoint")
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
