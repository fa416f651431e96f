"""How far below DDP each algorithm ended in the recorded studies, for the planner.

Generated: python -m distoptim_experiments.studies.planned
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Studied:
    """One setting of one study.

    Attributes:
        study: its name in results/.
        inner: the inner optimizer.
        algorithm: its name in `ALGORITHMS`.
        tau: local steps in a round.
        below: mean test accuracy below DDP's of the same study, in points.
        spread: standard deviation over the seeds.
        seeds: how many.
        lr: of the inner optimizer, the best for this algorithm.
        options: of the algorithm where they were others than the defaults, as JSON.
    """

    study: str
    inner: str
    algorithm: str
    tau: int
    below: float
    spread: float
    seeds: int
    lr: float
    options: str = ""


def inner_optimizers() -> tuple[str, ...]:
    """Those that were studied."""
    return tuple(dict.fromkeys(row.inner for row in STUDIED))


def below(inner: str, tau: int) -> dict[str, float]:
    """Points below DDP by algorithm with its best options, at each one's studied tau that is nearest in
    ratio; best first."""
    rows = [row for row in STUDIED if row.inner == inner]
    found = {}
    for name in dict.fromkeys(row.algorithm for row in rows):
        mine = [row for row in rows if row.algorithm == name]
        nearest = min({row.tau for row in mine}, key=lambda t: (abs(math.log(t / tau)), t))
        found[name] = min(row.below for row in mine if row.tau == nearest)
    return dict(sorted(found.items(), key=lambda item: item[1]))


# fmt: off
STUDIED = (
    Studied("small", "sgd", "bmuf", 1, 2.5, 0.01, 3, 0.01, '{"block_momentum": 0.7}'),
    Studied("small", "sgd", "bmuf", 2, 3.77, 0.08, 3, 0.03, '{"block_momentum": 0.7}'),
    Studied("small", "sgd", "bmuf", 8, 2.19, 0.43, 3, 0.03, '{"block_momentum": 0.7}'),
    Studied("small", "sgd", "bmuf", 24, 2.27, 0.03, 3, 0.03, '{"block_momentum": 0.7}'),
    Studied("small", "sgd", "cocod-sgd", 1, 0.53, 0.18, 3, 0.1, ""),
    Studied("small", "sgd", "cocod-sgd", 2, 1.26, 0.12, 3, 0.3, ""),
    Studied("small", "sgd", "cocod-sgd", 8, 3.3, 0.05, 3, 0.1, ""),
    Studied("small", "sgd", "cocod-sgd", 24, 4.04, 0.14, 3, 0.03, ""),
    Studied("small", "sgd", "easgd", 1, 2.4, 0.06, 3, 0.1, ""),
    Studied("small", "sgd", "easgd", 2, 2.97, 0.15, 3, 0.03, ""),
    Studied("small", "sgd", "easgd", 8, 3.77, 0.15, 3, 0.03, ""),
    Studied("small", "sgd", "easgd", 24, 4.55, 0.13, 3, 0.03, ""),
    Studied("small", "sgd", "local-sgd", 1, -0.12, 0.09, 3, 0.1, ""),
    Studied("small", "sgd", "local-sgd", 2, 0.14, 0.07, 3, 0.3, ""),
    Studied("small", "sgd", "local-sgd", 8, 1.45, 0.18, 3, 0.1, ""),
    Studied("small", "sgd", "local-sgd", 24, 2.66, 0.12, 3, 0.1, ""),
    Studied("small", "sgd", "overlap-local-sgd", 1, 0.9, 0.22, 3, 0.3, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("small", "sgd", "overlap-local-sgd", 2, 1.25, 0.16, 3, 0.1, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("small", "sgd", "overlap-local-sgd", 8, 3.05, 0.14, 3, 0.1, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("small", "sgd", "overlap-local-sgd", 24, 4.22, 0.22, 3, 0.03, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("beyond", "sgd", "overlap-bmuf", 8, 2.42, 0.14, 5, 0.03, '{"gain": 0.5, "block_momentum": 0.5}'),
    Studied("beyond", "sgd", "overlap-bmuf", 24, 2.94, 0.18, 5, 0.03, '{"gain": 0.5, "block_momentum": 0.5}'),
    Studied("beyond", "sgd", "overlap-local-sgd", 8, 3.0, 0.1, 5, 0.1, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("beyond", "sgd", "overlap-local-sgd", 24, 4.18, 0.16, 5, 0.03, '{"alpha": 0.6, "outer_momentum": 0.7}'),
    Studied("shakespeare", "adamw", "co2", 10, 9.62, 0.3, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "co2", 50, 13.34, 0.59, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "cocod-sgd", 10, 8.09, 0.57, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "cocod-sgd", 50, 7.37, 0.59, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "diloco", 10, 2.17, 0.33, 3, 0.01, '{"outer_momentum": 0.5}'),
    Studied("shakespeare", "adamw", "diloco", 10, 6.06, 0.11, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "diloco", 50, 4.93, 0.3, 3, 0.01, '{"outer_momentum": 0.5}'),
    Studied("shakespeare", "adamw", "diloco", 50, 7.07, 0.61, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "eager-diloco", 10, 9.85, 0.29, 3, 0.004, '{"outer_momentum": 0.5, "outer_lr": 0.7}'),
    Studied("shakespeare", "adamw", "eager-diloco", 10, 21.41, 1.03, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "eager-diloco", 50, 10.27, 0.71, 3, 0.01, '{"outer_momentum": 0.5, "outer_lr": 0.7}'),
    Studied("shakespeare", "adamw", "eager-diloco", 50, 36.6, 2.15, 3, 0.025, ""),
    Studied("shakespeare", "adamw", "local-sgd", 10, 2.84, 0.34, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "local-sgd", 50, 5.14, 0.43, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "overlap-bmuf", 10, 5.19, 0.05, 3, 0.004, ""),
    Studied("shakespeare", "adamw", "overlap-bmuf", 50, 6.44, 0.29, 3, 0.004, ""),
    Studied("shakespeare", "adamw", "overlap-local-sgd", 10, 5.31, 0.31, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "overlap-local-sgd", 50, 9.43, 0.88, 3, 0.01, ""),
    Studied("shakespeare", "adamw", "streaming-diloco", 10, 4.25, 0.22, 3, 0.01, '{"fragments": 2, "outer_momentum": 0.5, "outer_lr": 0.7, "delay": 5}'),
    Studied("shakespeare", "adamw", "streaming-diloco", 10, 3.24, 0.25, 3, 0.01, '{"fragments": 2}'),
    Studied("shakespeare", "adamw", "streaming-diloco", 50, 5.51, 0.39, 3, 0.01, '{"fragments": 2, "outer_momentum": 0.5, "outer_lr": 0.7, "delay": 5}'),
    Studied("shakespeare", "adamw", "streaming-diloco", 50, 6.12, 0.44, 3, 0.01, '{"fragments": 2}'),
)
# fmt: on
