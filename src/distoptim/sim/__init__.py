"""A cluster of virtual workers on a virtual clock.

The same engine and algorithms, in one process.
"""

from __future__ import annotations

from distoptim.sim.cluster import Cluster
from distoptim.sim.compute import Compute, Constant, Pareto, ShiftedExponential, Trace
from distoptim.sim.fabric import Fabric, VirtualCommunicator
from distoptim.sim.network import Islands, Network, Ring, Tree

__all__ = [
    "Cluster",
    "Compute",
    "Constant",
    "Fabric",
    "Islands",
    "Network",
    "Pareto",
    "Ring",
    "ShiftedExponential",
    "Trace",
    "Tree",
    "VirtualCommunicator",
]
