"""What four real processes compute is what they computed when it was recorded."""

from __future__ import annotations

import os

import pytest
from torch import Tensor

from tests.distributed.trajectories_gloo import CASES, RECORD, trajectories
from tests.laws.trajectories import STEPS, WORKERS, Record

BIT_EQUAL = os.environ.get("DISTOPTIM_BIT_EQUAL") == "1"


@pytest.fixture(scope="module")
def found() -> dict[str, Tensor]:
    return trajectories()


@pytest.fixture(scope="module")
def recorded() -> Record:
    return Record(RECORD)


def test_every_case_is_recorded(recorded: Record) -> None:
    assert list(recorded.digests) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_trajectory_is_the_recorded_one(
    name: str, found: dict[str, Tensor], recorded: Record
) -> None:
    assert found[name].shape[:2] == (STEPS, WORKERS)
    recorded.check(name, found[name], bit_equal=BIT_EQUAL)
