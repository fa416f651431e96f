"""PyTorch optimizers that hide communication in distributed training."""

from __future__ import annotations

import logging

from distoptim.algorithms import (
    ALGORITHMS,
    BMUF,
    EASGD,
    CoCoDSGD,
    LocalSGD,
    OverlapLocalSGD,
    SlowMo,
    register,
)
from distoptim.algorithms.rule import Mean, Rule, State
from distoptim.comm import CommunicationError
from distoptim.optimizer import AveragingOptimizer
from distoptim.slot import QuarantineWarning
from distoptim.version import __version__

logging.getLogger("distoptim").addHandler(logging.NullHandler())

__all__ = [
    "ALGORITHMS",
    "BMUF",
    "EASGD",
    "AveragingOptimizer",
    "CoCoDSGD",
    "CommunicationError",
    "LocalSGD",
    "Mean",
    "OverlapLocalSGD",
    "QuarantineWarning",
    "Rule",
    "SlowMo",
    "State",
    "__version__",
    "register",
]
