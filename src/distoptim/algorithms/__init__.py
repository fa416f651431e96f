"""Math: one file an algorithm.

The table is read by the command line, the contract tests and the docs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from distoptim.algorithms.bmuf import BMUF
from distoptim.algorithms.co2 import CO2
from distoptim.algorithms.cocod_sgd import CoCoDSGD
from distoptim.algorithms.diloco import DiLoCo
from distoptim.algorithms.eager_diloco import EagerDiLoCo
from distoptim.algorithms.easgd import EASGD
from distoptim.algorithms.global_momentum import GlobalMomentum
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
    "GlobalMomentum",
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
    "global-momentum": GlobalMomentum,
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


def load_entry_points() -> None:
    """Register what installed packages offer as entry points of the group "distoptim.algorithms".

    The entry point's name is the algorithm's, its object the class. The command line and the
    experiments call this; in Python code importing a class is enough.

    Raises:
        ValueError: a name is taken by another algorithm.
    """
    for entry in entry_points(group="distoptim.algorithms"):
        algorithm = entry.load()
        if ALGORITHMS.get(entry.name) is not algorithm:
            register(entry.name, algorithm)
