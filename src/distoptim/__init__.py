"""PyTorch optimizers that hide communication in distributed training."""

from __future__ import annotations

import logging

from distoptim.algorithms import (
    ALGORITHMS,
    BMUF,
    CO2,
    EASGD,
    CoCoDSGD,
    DiLoCo,
    EagerDiLoCo,
    GlobalMomentum,
    LocalSGD,
    OverlapBMUF,
    OverlapLocalSGD,
    SlowMo,
    StreamingDiLoCo,
    register,
)
from distoptim.comm import CommunicationError, Elastic
from distoptim.engine.engine import QuarantineWarning
from distoptim.engine.history import Span
from distoptim.inner_state import copies
from distoptim.module_state import local, statistics
from distoptim.optimizer import AveragingOptimizer, averaged, consolidate
from distoptim.rule import Mean, Rule, State
from distoptim.version import __version__

logging.getLogger("distoptim").addHandler(logging.NullHandler())

__all__ = [
    "ALGORITHMS",
    "BMUF",
    "CO2",
    "EASGD",
    "AveragingOptimizer",
    "CoCoDSGD",
    "CommunicationError",
    "DiLoCo",
    "EagerDiLoCo",
    "Elastic",
    "GlobalMomentum",
    "LocalSGD",
    "Mean",
    "OverlapBMUF",
    "OverlapLocalSGD",
    "QuarantineWarning",
    "Rule",
    "SlowMo",
    "Span",
    "State",
    "StreamingDiLoCo",
    "__version__",
    "averaged",
    "consolidate",
    "copies",
    "local",
    "register",
    "statistics",
]
