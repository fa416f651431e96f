"""Checkpoints of a run.

One file a process, in a folder that becomes the latest only when all have written theirs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from distoptim_experiments.training.world import Seat

FOLDER = "checkpoints"
_LATEST = "latest"


def save(
    folder: Path,
    *,
    seat: Seat,
    step: int,
    state: dict[str, Any],
    barrier: Callable[[], object],
) -> Path:
    """Write every process's state and make it the latest; collective. Killed at any moment, an
    older one stays.

    Args:
        folder: the run's.
        seat: this process's.
        step: local steps made; names the checkpoint.
        state: this process's; tensors and plain data, readable with torch.load(weights_only=True).
        barrier: waits for all processes.

    Returns: the folder of the checkpoint.

    Raises:
        ValueError: naming the file that cannot be written.
    """
    target = folder / FOLDER / f"step-{step}"
    whole = {**state, "step": step, "of": asdict(seat)}
    _replace(target / f"rank-{seat.rank}.pt", lambda file: torch.save(whole, file))
    barrier()
    # All write it, since on several machines each has a folder of its own.
    name = target.name.encode()
    _replace(target.parent / _LATEST, lambda file: file.write(name), by=seat.rank)
    barrier()
    for old in target.parent.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def remove(folder: Path) -> None:
    """Delete a run's checkpoints, if there are any."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


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


def load(folder: Path, *, seat: Seat) -> tuple[dict[str, Any], bool]:
    """This process's state of the latest checkpoint, and whether it is really its worker's.

    At another number of workers, those for whom there is no state of their own get one of
    another's; none of them can then go on where it was. At another size of islands ranks get that
    of their worker's first rank.

    Raises:
        ValueError: there is no checkpoint, its file is damaged, or it is of virtual workers and
            these are real, or the other way round.
    """
    source = latest(folder)
    first = Seat(**read(source / "rank-0.pt")["of"])
    if first.virtual != seat.virtual:
        kinds = ("real", "virtual")
        raise ValueError(
            f"{folder}: a checkpoint of {kinds[first.virtual]} workers, with which "
            f"{kinds[seat.virtual]} ones cannot go on"
        )
    size = first.island_size
    part = seat.part if size == seat.island_size else 0
    state = read(source / f"rank-{seat.worker % first.workers * size + part}.pt")
    return state, first.workers == seat.workers


def read(path: Path) -> dict[str, Any]:
    """A saved state. Raises ValueError, naming the file, if it is damaged."""
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        # What torch says of it is long, and advises to trust the file.
        raise ValueError(f"{path}: damaged, not a checkpoint") from error
    if not isinstance(state, dict) or not {"step", "of"} <= state.keys():
        raise ValueError(f"{path}: damaged, not a checkpoint")
    return state


def _replace(path: Path, write: Callable[[IO[bytes]], object], *, by: int = 0) -> None:
    """Write a file; killed or without room on the disk, what was there stays.

    Raises:
        ValueError: naming the file, if it cannot be written.
    """
    draft = path.with_name(f"{path.name}-{by}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            write(file)
            file.flush()
            # The name must not be on the disk before the content is.
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:
        # On a full disk half a draft takes room that somebody may need.
        if draft.is_file():
            draft.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """In one line; torch hides that of the system behind its own, a count of bytes."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        at = at.__context__
    return str(error).partition("\n")[0]
