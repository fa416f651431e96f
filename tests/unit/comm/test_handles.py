"""Handles: what is measured of a collective, by a clock that the test sets."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch

from distoptim.comm import handles
from distoptim.comm.handles import WorkHandle


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.at = 10.0

    def perf_counter(self) -> float:
        return self.at


class Work:
    """A backend's work that is over when the test says so, and takes `left` seconds when waited for."""

    def __init__(self, clock: Clock, left: float = 0.0) -> None:
        self.clock = clock
        self.left = left
        self.over = False

    def is_completed(self) -> bool:
        return self.over

    def wait(self, timeout: timedelta) -> None:
        if self.left > timeout.total_seconds():
            raise RuntimeError("timed out")
        self.clock.at += self.left


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(handles, "time", clock)
    return clock


def launch(work: Any, divisor: int = 1) -> WorkHandle:
    return WorkHandle(work, torch.full((3,), 6.0), divisor)


def test_a_hidden_mean_ended_between_the_looks_that_found_it_under_way_and_over(
    clock: Clock,
) -> None:
    work = Work(clock)
    handle = launch(work, divisor=3)
    assert (handle.launched_at, handle.seconds) == (10.0, 0.0)
    clock.at = 12.0
    handle.poll()
    assert handle.finished_at is None
    work.over = True
    clock.at = 13.0
    handle.poll()
    clock.at = 14.0
    handle.poll()
    assert handle.finished_at == 13.0, "the first look counts"
    assert handle.seconds == 2.5
    assert handle.waited_s is None
    handle.wait(1.0)
    assert handle.waited_s == 0.0
    assert handle.seconds == 2.5
    assert handle.tails(1).item() == 2.0, "divided, once"
    handle.wait(1.0)
    assert handle.tails(1).item() == 2.0


def test_a_mean_that_is_waited_for_ends_then(clock: Clock) -> None:
    handle = launch(Work(clock, left=4.0))
    clock.at = 11.0
    handle.wait(5.0)
    assert (handle.waited_s, handle.finished_at, handle.seconds) == (4.0, 15.0, 5.0)


def test_a_failed_work_is_held_by_nobody(clock: Clock) -> None:
    """Else peers do not hear of it."""
    work = Work(clock, left=4.0)
    alive = weakref.ref(work)
    handle = launch(work)
    del work
    with pytest.raises(RuntimeError, match="timed out"):
        handle.wait(1.0)
    gc.collect()
    assert alive() is None
