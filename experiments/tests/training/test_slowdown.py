import time
from types import SimpleNamespace

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.training import slowdown
from distoptim_experiments.training.virtual import check_virtual

from distoptim.simulator.compute import Pareto, ShiftedExponential
from distoptim.testing.processes import run
from experiments.tests.training.ranks import train

CONFIG = RunConfig(
    data="synthetic",
    model="mlp",
    workers=2,
    steps=6,
    seed=3,
    slowdown="exponential",
    slowdown_ms=40,
)


def slept(rank, folder, kind):
    """What a worker asked time.sleep for, without sleeping."""
    calls = []
    # Not the whole module: others sleep too.
    slowdown.time = SimpleNamespace(sleep=calls.append)
    try:
        train(RunConfig(**{**CONFIG.to_dict(), "slowdown": kind}), folder)
    finally:
        slowdown.time = time
    return calls


@pytest.mark.parametrize(
    ("kind", "stream"),
    [("exponential", ShiftedExponential(0.0, 0.04, 3)), ("pareto", Pareto(0.024, 2.5, 3))],
)
def test_workers_sleep_what_their_streams_say(tmp_path, kind, stream):
    for rank, calls in enumerate(run(slept, 2, tmp_path, kind)):
        assert calls == [stream.seconds(rank, step) for step in range(6)]
    assert records.read(tmp_path).config.slowdown == kind


def test_the_mean_is_what_was_asked_for():
    for kind in ("exponential", "pareto"):
        draws = [
            slowdown.seconds(kind, mean_ms=40, seed=0, rank=0, step=step) for step in range(20_000)
        ]
        assert sum(draws) / len(draws) == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slowdown": "gamma"}, "slowdown='gamma': allowed is one of none, exponential, pareto"),
        ({"slowdown_ms": 0.0}, "slowdown_ms=0"),
        ({"slowdown": "none"}, "slowdown_ms=40: without a slowdown"),
    ],
)
def test_a_wrong_slowdown_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{**CONFIG.to_dict(), **wrong})


def test_virtual_workers_have_their_own():
    with pytest.raises(ValueError, match="is for real workers"):
        check_virtual(CONFIG)
