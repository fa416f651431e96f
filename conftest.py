"""For the tests of both distributions."""

from __future__ import annotations

import os

import pytest

# Before torch is imported, which reads it once. Processes that run tests side by side would wait for
# each other's threads at every fused step: 4 ms for 0.01. Threads that torch itself starts, as for
# a hook of DDP's, would take all cores again, and with several a product of matrices is not the same
# to the last bit every time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

IMPORTED_BY_WORKERS = (
    "pytest",
    "hypothesis",
    "distoptim.cli",
    "distoptim.integrations.checkpoint",
    "distoptim.integrations.lightning",
    "distoptim.integrations.transformers",
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
