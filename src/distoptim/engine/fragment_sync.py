"""One fragment's synchronisation: its state, its communication buffer, and its mean in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from distoptim import rule as rules
from distoptim.comm import FinishedHandle, Handle
from distoptim.comm.compressed import CompressedMean
from distoptim.engine.identity import Identity
from distoptim.engine.likeness import Likeness
from distoptim.fragments import Flat, Fragment
from distoptim.rule import State


@final
@dataclass
class PendingMean:
    """A launched mean that has not been merged.

    Attributes:
        handle: the collective, or a finished one where none is needed (the start, a mean from a
            checkpoint).
        finite: on the host, whether this worker's payload was; valid once the handle has been waited
            for.
        due: the local step of the merge.
        lr: inner learning rates at the launch, per segment.
        identity: of the message; None where nothing was sent.
        samples: of this worker at the launch before this one.
    """

    handle: Handle
    finite: Tensor
    due: int
    lr: list[float]
    identity: Identity | None = None
    samples: float = 0.0


@final
@dataclass(frozen=True)
class Unheard:
    """A launch whose mean was lost here, and that others may have got all the same.

    Attributes:
        x: [numel], what this worker held at the launch.
        samples: of this worker then.
    """

    x: Tensor
    samples: float


@final
@dataclass
class FragmentSync:
    """A fragment, its algorithm's state, its buffer, its launches and merges, and what is in flight.

    The buffer is [parameters, what the worker has measured for the period (in the first fragment's), the
    message's identity, the worker's weight]: mean = sum of weighted payloads / sum of weights.

    Attributes:
        index: among the fragments, in the order of their launches.
        extra: numbers measured for the period.
        next_launch: local step of the next launch.
        launched: local step of the last launch.
        merges: how many means were merged.
        replaced: local step at which parameters that were not finite were last replaced.
        seconds: how long the last mean took.
        samples: of this worker when it launched last (see `Weights`).
        likeness: whether all workers send the same; None where that is settled, or not asked.
        merging: whether a mean is meeting state and parameters at this moment.
        kept: a copy of what is in flight, where a mean may be lost and the run go on; else None.
        unheard: the launch whose mean was lost last, until another is merged; else None.
    """

    index: int
    fragment: Fragment
    state: State
    buffer: Flat
    extra: int = 0
    next_launch: int = 0
    launched: int = 0
    merges: int = 0
    replaced: int = -1
    seconds: float = 0.0
    samples: float = 0.0
    pending: PendingMean | None = None
    compressed: CompressedMean | None = None
    likeness: Likeness | None = None
    merging: bool = False
    kept: Flat | None = None
    unheard: Unheard | None = None

    def __post_init__(self) -> None:
        """Note what messages call it, and how large they are without a codec."""
        # The start is the first mean.
        self.fragment.read(self.buffer)
        self.name = f"fragment {self.index}"
        self.nbytes = self.buffer.nbytes

    def keep(self) -> None:
        """Copy what is about to be sent, and its weight."""
        assert self.kept is not None
        self.kept.tensor[:-1] = self.buffer.tensor[: self.fragment.numel]
        self.kept.tensor[-1] = self.buffer.tensor[-1]

    def schedule(self, step: int, tau: int) -> None:
        """Begin its rounds anew at a local step: spread over the round by the fragment's offset."""
        self.next_launch = step + (self.fragment.offset_at(tau) or tau)

    def compare(self, workers: float) -> None:
        """See whether all workers send the same, until it is settled."""
        assert self.likeness is not None
        # One that is left alone, where workers come and go, sends what it gets.
        if workers > 1 and self.likeness.compare(
            self.buffer.tensor[: self.fragment.numel], self.compressed
        ):
            self.likeness = None

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain data and tensors (not copied); a mean in flight must be there."""
        return {
            "signature": self.fragment.signature(),
            "next_launch": self.next_launch,
            "launched": self.launched,
            "merges": self.merges,
            "samples": self.samples,
            "seconds": self.seconds,
            "state": rules.save(self.state),
            "pending": self._save_pending(),
            "compressed": None if self.compressed is None else self.compressed.state_dict(),
        }

    def load_state_dict(
        self, saved: dict[str, Any], *, same_workers: bool, same_rank: bool
    ) -> None:
        """State, counts and what codes have lost; when the next launch is, the engine says."""
        rules.load(self.state, saved["state"])
        if self.compressed is not None:
            self.compressed.load_state_dict(
                saved["compressed"], same_workers=same_workers, same_rank=same_rank
            )
        self.seconds = saved["seconds"]
        self.merges = saved["merges"]
        self.pending = None
        self.fragment.read(self.buffer)

    def resume(self, saved: dict[str, Any], *, workers: int) -> None:
        """Go on in the middle of the round that was saved, by one of so many workers."""
        self.next_launch = saved["next_launch"]
        self.launched = saved["launched"]
        self.samples = saved["samples"]
        pending = saved["pending"]
        if pending is not None:
            # Without the identity, which older versions did not have: it has been looked at.
            mean = pending["mean"]
            kept = self.fragment.numel + self.extra
            self.buffer.tensor[:kept] = mean[:kept]
            self.buffer.tensor[-1] = mean[-1]
            self.pending = PendingMean(
                FinishedHandle(self.buffer.tensor),
                torch.tensor(pending["finite"]),
                pending["due"],
                pending["lr"],
            )
            self.pending.handle.workers = workers

    def _save_pending(self) -> dict[str, Any] | None:
        if self.pending is None:
            return None
        return {
            "mean": self.buffer.tensor,
            "finite": bool(self.pending.finite),
            "due": self.pending.due,
            "lr": self.pending.lr,
        }
