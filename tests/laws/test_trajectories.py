"""All algorithms compute what they did when it was recorded; with DISTOPTIM_BIT_EQUAL=1 to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.laws.trajectories import RECORD, STEPS, WORKERS, Record, cases

BIT_EQUAL = os.environ.get("DISTOPTIM_BIT_EQUAL") == "1"
CASES = cases()


@pytest.fixture(scope="module")
def recorded() -> Record:
    return Record(RECORD)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_case_is_recorded(recorded: Record) -> None:
    assert list(recorded.digests) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_is_the_recorded_one(name: str, recorded: Record) -> None:
    x = CASES[name]()
    assert x.shape[:2] == (STEPS, WORKERS)
    recorded.check(name, x, bit_equal=BIT_EQUAL)
