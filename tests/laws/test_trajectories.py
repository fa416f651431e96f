"""All algorithms compute what they did when it was recorded.

A share of the cases is checked always (`trajectories.share`), all with DISTOPTIM_ALL=1; with
DISTOPTIM_BIT_EQUAL=1 to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.helpers import toy
from tests.helpers.share import ALL
from tests.laws.trajectories import RECORD, STEPS, WORKERS, Record, cases, share

BIT_EQUAL = os.environ.get("DISTOPTIM_BIT_EQUAL") == "1"
CASES = cases()
SHARE = list(CASES) if ALL else share(CASES)


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


def test_the_share_has_every_algorithm_at_every_delay_in_one_fragment_and_several() -> None:
    for label in toy.variants():
        name, delay, fragments = label.rsplit("-", 2)
        for number in (delay, fragments):
            assert any(f" {name}-" in case and number in case for case in SHARE), label


@pytest.mark.parametrize("name", SHARE)
def test_a_trajectory_is_the_recorded_one(name: str, recorded: Record) -> None:
    x = CASES[name]()
    assert x.shape[:2] == (STEPS, WORKERS)
    recorded.check(name, x, bit_equal=BIT_EQUAL)
