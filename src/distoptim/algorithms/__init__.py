"""Math: one file an algorithm.

The table is read by the command line, the contract tests and the docs.
"""

from __future__ import annotations

from collections.abc import Callable

from distoptim.algorithms.bmuf import BMUF
from distoptim.algorithms.co2 import CO2
from distoptim.algorithms.cocod_sgd import CoCoDSGD
from distoptim.algorithms.diloco import DiLoCo
from distoptim.algorithms.eager_diloco import EagerDiLoCo
from distoptim.algorithms.easgd import EASGD
from distoptim.algorithms.local_sgd import LocalSGD
from distoptim.algorithms.overlap_bmuf import OverlapBMUF
from distoptim.algorithms.overlap_local_sgd import OverlapLocalSGD
from distoptim.algorithms.slowmo import SlowMo
from distoptim.algorithms.streaming_diloco import StreamingDiLoCo
from distoptim.optimizer import AveragingOptimizer

__all__ = [
    "ALGORITHMS",
    "BMUF",
    "CO2",
    "EASGD",
    "CoCoDSGD",
    "DiLoCo",
    "EagerDiLoCo",
    "LocalSGD",
    "OverlapBMUF",
    "OverlapLocalSGD",
    "SlowMo",
    "StreamingDiLoCo",
    "register",
]

ALGORITHMS: dict[str, Callable[..., AveragingOptimizer]] = {
    "local-sgd": LocalSGD,
    "easgd": EASGD,
    "cocod-sgd": CoCoDSGD,
    "bmuf": BMUF,
    "slowmo": SlowMo,
    "overlap-local-sgd": OverlapLocalSGD,
    "overlap-bmuf": OverlapBMUF,
    "diloco": DiLoCo,
    "streaming-diloco": StreamingDiLoCo,
    "eager-diloco": EagerDiLoCo,
    "co2": CO2,
}


def register(name: str, algorithm: Callable[..., AveragingOptimizer]) -> None:
    """Add an algorithm to the table, so that the command line knows it.

    Args:
        name: how the command line calls it: lower case, words joined by "-".
        algorithm: called as algorithm(params or optimizer, tau=..., **options).

    Raises:
        ValueError: the name is taken.
    """
    if name in ALGORITHMS:
        raise ValueError(f"algorithm {name!r} exists already: {ALGORITHMS[name]}")
    ALGORITHMS[name] = algorithm
