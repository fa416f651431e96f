"""One random fault at a random moment among real workers: nobody gets a wrong mean, waits for ever, or is told nothing.

A seed that fails is in the test's name; `python -m pytest -m soak tests/distributed/test_chaos.py` tries many
more than the suite. `DISTOPTIM_CHAOS=500-800 make chaos` tries those.
"""

from __future__ import annotations

import os

import pytest

from tests.helpers import chaos

# Together they have every fault, with codec and without, one and three fragments, levels, both backends.
IN_SUITE = [0, 2, 4, 5, 7, 11, 23, 30, 41, 47, 77, 82, 86, 91, 129, 185, 1092, 1369]
FIRST, LAST = map(int, os.environ.get("DISTOPTIM_CHAOS", "0-200").split("-"))


@pytest.mark.parametrize("seed", IN_SUITE)
def test_a_fault_is_told_to_all_and_spoils_nothing(seed):
    chaos.replay(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_any_fault_is_told_to_all_and_spoils_nothing(seed):
    chaos.replay(seed)


def test_the_seeds_of_the_suite_have_every_kind_of_fault():
    cases = [chaos.draw(seed) for seed in IN_SUITE]
    assert {case.fault for case in cases} >= chaos.FAULTS
    assert {type(case.at) for case in cases} == {int, str}
    assert {case.backend for case in cases} == {"gloo", "emulated"}
    assert any(case.levels for case in cases)
