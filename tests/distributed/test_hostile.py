"""One worker is handed, has, or does something else than the others: all are told what, or nothing is wrong."""

from __future__ import annotations

import pytest

from distoptim.testing.processes import run
from tests.helpers import hostile

SEEDS = 25


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 8 * SEEDS, SEEDS))
@pytest.mark.parametrize("workers", [3, 4])
def test_what_one_worker_does_otherwise_is_told_to_all(workers, first):
    seeds = range(first, first + SEEDS)
    results = run(hostile.work, workers, workers, seeds, timeout_s=SEEDS * hostile.TIMEOUT_S)
    for i, seed in enumerate(seeds):
        hostile.judge(hostile.draw(seed, workers), [told[i] for told in results])
