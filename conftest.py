"""For the tests of both distributions."""

from __future__ import annotations

import pytest

IMPORTED_BY_WORKERS = (
    "pytest",
    "hypothesis",
    "distoptim.cli",
    "distoptim.integrations.checkpoint",
    "distoptim_experiments.training.launch",
    "sklearn.datasets",
)


@pytest.fixture(scope="session", autouse=True)
def preload() -> None:
    """Have it imported once, by the server from which all workers are forked.

    The first test that has workers starts it, of whichever distribution that is.
    """
    # Not at the top: with xdist this file is also read by the process that only hands tests out.
    from distoptim.testing import processes

    # What is not installed is passed over.
    processes.PRELOAD.extend(IMPORTED_BY_WORKERS)
