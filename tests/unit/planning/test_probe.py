"""The probe sees the emulated link's latency and rate."""

from __future__ import annotations

import time

import pytest
import torch

from distoptim.comm import Link, emulate
from distoptim.comm.measured import LEAST
from distoptim.planning.probe import load, probe
from distoptim.testing.processes import run


def prepare():
    model = torch.nn.Linear(3, 2)
    return model, lambda: time.sleep(0.02)


def _probe(rank):
    emulate(latency_s=0.05, bandwidth_gbit_s=1.0)
    with pytest.raises(ValueError, match=r"parameters, by rank: \[2, 4\]; allowed is the same"):
        probe(lambda: (torch.nn.Linear(1, 1 + rank), lambda: None), steps=1)
    with pytest.raises(ValueError, match=r"steps, by rank: \[1, 2\]; allowed is the same"):
        probe(prepare, steps=1 + rank)
    return probe(prepare, steps=3, repeats=3)


def test_probe_finds_the_link_and_workers_that_disagree():
    first, second = run(_probe, 2, backend="emulated")
    assert first == second
    assert first.params == 8
    assert first.workers == 2
    assert first.step_s >= 0.02
    # The link is a floor; how much above it the machine is depends on the machine.
    assert first.latency_s >= 0.05
    found = Link(first.latency_s, first.bandwidth_gbit_s)
    assert found.all_reduce_s(LEAST * 4, 2) >= Link(0.05, 1.0).all_reduce_s(LEAST * 4, 2)


def test_load():
    assert load("tests.unit.planning.test_probe:prepare") is prepare
    for bad in (
        "nothing",
        "no.such.module:f",
        "tests.unit.planning.test_probe:absent",
        ":f",
        "tests.unit.planning.test_probe:time",
    ):
        with pytest.raises(ValueError, match=r"wanted|is not a function"):
            load(bad)
