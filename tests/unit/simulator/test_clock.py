"""The virtual clock against times computed by hand."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from distoptim import ALGORITHMS, LocalSGD, OverlapLocalSGD
from distoptim.comm import Link
from distoptim.periods import EqualTime, HideCommunication, PostLocal
from distoptim.simulator import (
    Cluster,
    Constant,
    Pareto,
    Ring,
    ShiftedExponential,
    Trace,
    Tree,
    TwoTier,
)


class Fixed:
    """A network on which every mean takes `seconds`."""

    def __init__(self, seconds):
        self.seconds = seconds

    def all_reduce_s(self, nbytes, workers):
        return self.seconds


def cluster(method, *, step_s, mean_s, workers=3, **options):
    return Cluster(
        workers=workers,
        model=lambda: torch.nn.Linear(2, 2),
        compute=Constant(step_s),
        network=Fixed(mean_s),
        optimizer=lambda params, communicator: method(
            params, lr=0.1, communicator=communicator, **options
        ),
    )


def test_blocking_round_takes_computation_plus_communication():
    c = cluster(LocalSGD, step_s=1.0, mean_s=2.5, tau=4)
    c.advance(12)
    assert c.seconds() == pytest.approx(12 * 1.0 + 3 * 2.5)
    assert c.stats()["exposed_s"] == pytest.approx(7.5)


def test_blocking_round_waits_for_the_slowest():
    c = cluster(LocalSGD, step_s=[1.0, 2.0, 0.5], mean_s=0.0, tau=4)
    c.advance(8)
    assert c.fabric.clocks == pytest.approx([16.0, 16.0, 16.0])


@pytest.mark.parametrize(("mean_s", "exposed"), [(3.0, 0.0), (4.0, 0.0), (5.5, 1.5)])
def test_overlapped_mean_costs_what_does_not_fit_in_a_round(mean_s, exposed):
    c = cluster(OverlapLocalSGD, step_s=1.0, mean_s=mean_s, tau=4)
    c.advance(16)
    # The mean of the start is known; three more are waited for.
    assert c.seconds() == pytest.approx(16 + 3 * exposed)
    assert c.stats()["exposed_s"] == pytest.approx(3 * exposed)


def test_a_delay_hides_as_many_steps():
    c = cluster(LocalSGD, step_s=1.0, mean_s=3.0, tau=4, delay=2)
    c.advance(14)
    assert c.stats()["exposed_s"] == pytest.approx(3 * 1.0)


def test_means_of_fragments_follow_one_another_on_the_link():
    c = cluster(LocalSGD, step_s=1.0, mean_s=3.0, tau=2, fragments=2, delay=1)
    c.advance(6)
    # Launches at 1, 2, 3, ...: each mean waits for the link, so every step from the second on ends
    # when one does.
    assert c.fabric.free_at == pytest.approx(1 + 3 * 6)


def test_a_copy_finds_the_link_as_busy_as_it_was():
    make = partial(cluster, LocalSGD, step_s=1.0, mean_s=3.0, tau=4, fragments=2, delay=3)
    expected = make()
    expected.advance(7)
    again = make()
    again.load_state_dict(copy.deepcopy(expected.state_dict()))
    for c in (expected, again):
        c.advance(5)
    # Launches at every second step: each mean waits for the one before, which the next merge does not.
    assert again.fabric.clocks == expected.fabric.clocks
    assert again.fabric.free_at == expected.fabric.free_at


def test_an_overlapped_mean_starts_when_the_last_worker_has_arrived():
    c = cluster(OverlapLocalSGD, step_s=[1.0, 3.0], workers=2, mean_s=0.0, tau=2)
    c.advance(4)
    # At step 4 the fast worker, there at 4, waits for what the slow one sent at 6.
    assert c.fabric.clocks == pytest.approx([6.0, 12.0])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LocalSGD, {"tau": 7, "delay": 3, "fragments": 2}),
        (OverlapLocalSGD, {"tau": PostLocal(start=5, tau=9)}),
        (OverlapLocalSGD, {"tau": HideCommunication()}),
        (OverlapLocalSGD, {"tau": EqualTime(1.3)}),
    ],
)
def test_the_clock_that_goes_from_event_to_event_shows_what_it_shows_step_by_step(method, options):
    far, near = (cluster(method, step_s=[0.1, 0.3], mean_s=1.7, **options) for _ in range(2))
    for steps in (1, 40, 3, 60):
        far.advance(steps)
        for _ in range(steps):
            near.advance(1)
        assert far.fabric.clocks == near.fabric.clocks
        assert [o.engine.step for o in far.optimizers] == [o.engine.step for o in near.optimizers]
        exposed = [[o.stats()["exposed_s"] for o in c.optimizers] for c in (far, near)]
        assert exposed[0] == exposed[1]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stats_are_in_virtual_seconds(name):
    c = cluster(ALGORITHMS[name], step_s=1000.0, mean_s=0.0, tau=2)
    c.advance(6)
    assert c.seconds() == pytest.approx(6000)
    assert c.stats()["computation_s"] == pytest.approx(5000)


def test_networks():
    slow, fast = Link(0.01, 1.0), Link(0.0, 100.0)
    nbytes = 1e8
    assert Ring([slow]).all_reduce_s(nbytes, 4) == pytest.approx(6 * 0.01 + 1.5 * 0.8)
    assert Ring([fast, slow]).all_reduce_s(nbytes, 4) == Ring([slow]).all_reduce_s(nbytes, 4)
    assert Tree([slow]).all_reduce_s(nbytes, 8) == pytest.approx(6 * (0.01 + 0.8))
    islands = TwoTier(4, fast, slow).all_reduce_s(nbytes, 8)
    assert islands == pytest.approx(
        1.5 * fast.all_reduce_s(nbytes, 4) + slow.all_reduce_s(nbytes, 2)
    )
    assert TwoTier(8, fast, slow).all_reduce_s(nbytes, 8) == pytest.approx(
        1.5 * fast.all_reduce_s(nbytes, 8)
    )


@pytest.mark.parametrize(
    ("compute", "mean"), [(ShiftedExponential(0.5, 0.25), 0.75), (Pareto(0.5, 3.0), 0.75)]
)
def test_random_steps_have_their_mean_and_are_repeatable(compute, mean):
    draws = [compute.seconds(rank, step) for rank in range(20) for step in range(1000)]
    assert np.mean(draws) == pytest.approx(mean, rel=0.02)
    assert compute.seconds(3, 700) == draws[3700]
    assert len(set(draws)) == len(draws)


def test_trace(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("# worker 0, worker 1\n1.0,2.0\n\n3.0,4.0\n")
    trace = Trace(path)
    assert [trace.seconds(rank, step) for step in range(3) for rank in range(2)] == [
        1,
        2,
        3,
        4,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("text", "line"), [("1,2\n3\n", 2), ("1,\n", 1), ("1,x\n", 1), ("1,2\n3,-4\n", 2), ("nan\n", 1)]
)
def test_a_trace_with_holes_is_refused_naming_the_line(tmp_path, text, line):
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"steps\.csv, line {line}"):
        Trace(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(0.0),
        lambda: Constant([]),
        lambda: ShiftedExponential(-1.0, 1.0),
        lambda: Pareto(1.0, 1.0),
        lambda: TwoTier(0, Link(0, 1), Link(0, 1)),
        lambda: Link(0.0, -1.0),
        lambda: Link(math.nan, 1.0),
        lambda: cluster(LocalSGD, step_s=1.0, mean_s=0.0, tau=1, workers=0),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(ValueError, match="allowed"):
        make()
