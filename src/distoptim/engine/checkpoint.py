"""An engine's state as plain data and tensors, and back.

What a checkpoint holds of a running round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distoptim import rule
from distoptim.algorithms.rules import Anchored
from distoptim.comm.handles import Handle
from distoptim.engine.engine import Engine
from distoptim.engine.fragment_sync import Flight, Slot

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """Where in its rounds a worker was saved; equal on all workers that go on together.

    Attributes:
        step: local steps made.
        tau: of the present round.
        fragments: of each, how many means were merged, the steps of the last and of the next
            launch, and at which step the mean in flight is due.
    """

    step: int
    tau: int
    fragments: tuple[tuple[int, int, int, int | None], ...]

    @property
    def progress(self) -> tuple[int, int]:
        """Grows with every merge, which all workers make in one order, and every local step."""
        return sum(merges for merges, *_ in self.fragments), self.step


def save(engine: Engine) -> dict[str, Any]:
    """Everything needed to go on bit-equal; what is in flight is waited for and saved as its mean.

    A mean that cannot be had because a peer is gone is left out: the failure comes up at the next
        `average()`.
    """
    engine.settle()
    return {
        "format": FORMAT,
        "rule": type(engine.rule).__name__,
        "tau": engine.tau,
        "delay": engine.delay,
        "pace": engine.pace.save(),
        "workers": engine.communicator.size,
        "step": engine.step,
        "fragments": [
            {
                "signature": slot.fragment.signature(),
                "next_launch": slot.next_launch,
                "launched": slot.launched,
                "merges": slot.merges,
                "samples": slot.samples,
                "seconds": slot.seconds,
                "state": rule.save(slot.state),
                "flight": _save_flight(slot),
                "coder": None if slot.coder is None else slot.coder.state_dict(),
            }
            for slot in engine.slots
        ],
    }


def check(engine: Engine, saved: dict[str, Any]) -> None:
    """Whether a saved state fits the engine.

    Raises:
        ValueError: it has another format or algorithm, other parameters, or memory of another kind.
    """
    found = saved.get("format") if isinstance(saved, dict) else saved
    if found != FORMAT:
        raise ValueError(f"checkpoint has format {found!r}: allowed is {FORMAT}")
    mine = {
        "rule": type(engine.rule).__name__,
        "fragments": [slot.fragment.signature() for slot in engine.slots],
        "state": [rule.layout(rule.save(slot.state)) for slot in engine.slots],
    }
    theirs = {
        "rule": saved["rule"],
        "fragments": [f["signature"] for f in saved["fragments"]],
        "state": [rule.layout(f["state"]) for f in saved["fragments"]],
    }
    mine["codec"] = [
        _coding(None if slot.coder is None else slot.coder.state_dict()) for slot in engine.slots
    ]
    theirs["codec"] = [_coding(f.get("coder")) for f in saved["fragments"]]
    for key, value in mine.items():
        if theirs[key] != value:
            raise ValueError(f"checkpoint has {key} {theirs[key]}, this optimizer {value}")


@torch.no_grad()
def load(engine: Engine, saved: dict[str, Any]) -> None:
    """Put a state that fits (see `check`) into an engine.

    With period, delay and number of workers unchanged the run goes on as if it had never stopped.
    Otherwise what was in flight is dropped and a new round begins; at another number of workers
    every worker starts from the anchor, where there is one.
    """
    same_workers = saved["workers"] == engine.communicator.size
    goes_on = same_workers and engine.pace.load(saved["pace"])
    engine.resume_at(saved["step"])
    goes_on = goes_on and (saved["tau"], saved["delay"]) == (engine.tau, engine.delay)
    for slot, record in zip(engine.slots, saved["fragments"], strict=True):
        rule.load(slot.state, record["state"])
        if slot.coder is not None:
            slot.coder.load_state_dict(record["coder"], same_workers=same_workers)
        slot.flight = None
        slot.launched = record["launched"] if goes_on else saved["step"]
        slot.samples = record["samples"] if goes_on else engine.pace.samples or 0.0
        slot.seconds, slot.merges = record["seconds"], _merges(record)
        engine.place(slot)
        if goes_on:
            slot.next_launch = record["next_launch"]
            if record["flight"] is not None:
                slot.flight = _load_flight(slot, record["flight"])
        if not same_workers and isinstance(slot.state, Anchored):
            slot.fragment.write(slot.state.anchor)
    engine.resume_at(saved["step"])


def place(saved: dict[str, Any]) -> Place:
    """Of a saved state."""
    return Place(
        saved["step"],
        saved["tau"],
        tuple(
            (
                _merges(f),
                f["launched"],
                f["next_launch"],
                None if f["flight"] is None else f["flight"]["due"],
            )
            for f in saved["fragments"]
        ),
    )


def _merges(record: dict[str, Any]) -> int:
    """How many means of a fragment were merged; not counted in states saved before this was."""
    return int(record.get("merges", 0))


def _coding(saved: dict[str, Any] | None) -> str:
    """What a saved coder needs of another."""
    if saved is None:
        return "none"
    return "with a residual" if saved["residual"] is not None else "without a residual"


def _save_flight(slot: Slot) -> dict[str, Any] | None:
    flight = slot.flight
    if flight is None:
        return None
    return {
        "mean": slot.buffer.tensor,
        "finite": bool(flight.finite),
        "due": flight.due,
        "lr": flight.lr,
    }


def _load_flight(slot: Slot, saved: dict[str, Any]) -> Flight:
    slot.buffer.tensor.copy_(saved["mean"])
    return Flight(
        Handle(slot.buffer.tensor), torch.tensor(saved["finite"]), saved["due"], saved["lr"]
    )
