"""How a worker that was behind, or has just come, takes over what the others share.

Where workers come and go; what it is given comes with a mean of theirs (`membership.Giver`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from distoptim import rule as rules
from distoptim.comm import CatchUp, FinishedHandle, Handle, MeanLost
from distoptim.engine.engine import Engine, tick_again
from distoptim.engine.fragment_sync import FragmentSync, PendingMean
from distoptim.engine.identity import Kind
from distoptim.engine.reducer import LIMITS
from distoptim.fragments import Flat


def catch_up(
    engine: Engine,
    sync: FragmentSync | None,
    handle: Handle,
    samples: float,
    *,
    joins: bool = False,
) -> None:
    """Take over what the others share, as of the launch of the mean that has come.

    All local steps that are in no mean stay in x, which keeps its distance to the anchor: this worker
    is as one that sent the anchor, with no weight, and has made them since. Where others have got a mean that
    was lost here, steps that it has sent for that one are in the anchor.

    Args:
        engine: of this worker.
        sync: whose launch it was, with which this worker was found to be behind; None: a message outside
            of rounds, of no payload.
        handle: of that mean, which may be another fragment's.
        samples: of this worker at the launch before.
        joins: whether this worker has made no steps yet.
    """
    given = handle.caught_up
    assert given is not None
    handle.caught_up = None
    made = 0
    if sync is not None:
        made = engine.step - sync.launched
        sync.samples = samples
        engine.active.abandoned(sync.fragment, sync.state, sync.kept)
    # Before anything is taken over: own steps are x less the anchor, which is still this worker's.
    own = [_own_steps(engine, each, each.index in given.heard) for each in engine.syncs]
    position = given.position
    call = Kind(round(position["code"][0]))
    engine.reducer.messages = position["messages"]
    if position["clock"] is not None:
        engine.clock.load_state_dict(position["clock"])
    engine.resume_at(position["step"])
    index = position["fragment"]
    given.state["fragments"][index]["mean"] = {
        "values": handle.buffer if position["round"] else None,
        "workers": handle.workers,
        "lr": position["lr"],
    }
    for each, steps in zip(engine.syncs, own, strict=True):
        launched, next_launch = position["launches"][each.index]
        each.launched = launched
        each.next_launch = next_launch
        if each.index == index and position["round"]:
            each.launched = engine.step
            # A flush has scheduled all that follows before its first launch.
            if call is Kind.ROUND:
                each.next_launch = engine.step + engine.clock.tau
        _take_over(engine, each, given.state["fragments"][each.index], steps, joins=joins)
    engine.counters.catch_up()
    engine.caught_up_in = call
    engine.plan()
    # What others launch meanwhile is launched as of the step at which they do.
    tick_again(engine, made)


def _own_steps(engine: Engine, sync: FragmentSync, heard: bool) -> Flat | None:
    """Those in no mean, when what has come is merged and the rest given up; None where there is no anchor.

    x - z; or, where the others have heard what this worker has sent last, x less that.
    """
    if sync.pending is not None and sync.pending.handle.is_there:
        engine.merge(sync)
    elif sync.pending is not None:
        engine.give_up(sync)
    anchor = engine.anchor(sync)
    if anchor is None or engine.clock.synchronous:
        return None
    start = anchor.tensor[: sync.fragment.numel]
    if heard and sync.unheard is not None:
        start = sync.unheard.x
        sync.samples = sync.unheard.samples
        if sync.compressed is not None:
            sync.compressed.was_heard()
    own = sync.fragment.flat()
    sync.fragment.read(own)
    own.tensor.sub_(start)
    # Values that are not finite are no steps.
    return own if bool(own.tensor.sum().abs() <= LIMITS[own.tensor.dtype]) else None


def _take_over(
    engine: Engine, sync: FragmentSync, given: dict[str, Any], own: Flat | None, *, joins: bool
) -> None:
    """State as given; x begins at the anchor, or stays; the mean that is not in it is merged."""
    mean = given["mean"]
    sync.merges = given["merges"]
    sync.likeness = None
    start = None if engine.clock.synchronous else given["shared"].get("anchor")
    if start is None and joins:
        # Where nothing is an anchor, x begins at the mean.
        start = mean["values"] / mean["values"][-1]
    if start is not None:
        x = sync.fragment.flat()
        x.tensor.copy_(start[: sync.fragment.numel])
        sync.fragment.write(x)
        # In place, since coded means are of the difference to the anchor.
        rules.load(sync.state, rules.save(engine.rule.start(sync.fragment)))
    rules.load(sync.state, given["shared"])
    if sync.compressed is not None and given["reference"] is not None:
        sync.compressed.reference.copy_(given["reference"])
    if mean is not None and mean["values"] is not None and mean["values"][-1]:
        sync.buffer.tensor.copy_(mean["values"])
        handle = FinishedHandle(sync.buffer.tensor)
        handle.workers = mean["workers"]
        sync.pending = PendingMean(handle, torch.tensor(True), engine.step, mean["lr"])
        engine.merge(sync)
    if own is not None:
        sync.fragment.add(own)


@torch.no_grad()
def listen(engine: Engine) -> dict[str, Any]:
    """Join a run: take over what the others share with the next mean of theirs, and begin there.

    Returns: all that the giver gave.
    """
    for sync in engine.syncs:
        sync.pending = None
    sync = engine.syncs[0]
    given: CatchUp | None = None
    while given is None:
        handle = engine.communicator.all_reduce(sync.buffer.tensor.zero_())
        with contextlib.suppress(MeanLost):
            handle.wait(engine.reducer.timeout_s)
            given = handle.caught_up
    sync.launched = engine.step
    catch_up(engine, sync, handle, 0.0, joins=True)
    return given.state
