"""A cluster of virtual workers on a virtual clock.

The same engine and algorithms, in one process.
"""

from __future__ import annotations

from distoptim.simulator.churn import Change, Churn, Listed, Regular
from distoptim.simulator.cluster import Cluster
from distoptim.simulator.compute import (
    Compute,
    Constant,
    Pareto,
    ShiftedExponential,
    Trace,
    Unequal,
)
from distoptim.simulator.fabric import Fabric, VirtualCommunicator
from distoptim.simulator.network import Gloo, Network, Ring, Tree, TwoTier

__all__ = [
    "Change",
    "Churn",
    "Cluster",
    "Compute",
    "Constant",
    "Fabric",
    "Gloo",
    "Listed",
    "Network",
    "Pareto",
    "Regular",
    "Ring",
    "ShiftedExponential",
    "Trace",
    "Tree",
    "TwoTier",
    "Unequal",
    "VirtualCommunicator",
]
