"""Which workers average between two rounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from distoptim_experiments.config import RunConfig
from distoptim_experiments.optimizers import pairs


def groups(config: RunConfig) -> Mapping[int, dist.ProcessGroup]:
    """This rank's group at each level; collective. The emulated link does not slow them.

    Neighbours are near.
    """
    return {
        period: dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]  # torch has no types
            [
                range(first + place, first + size * config.island_size, config.island_size)
                for first in range(0, config.ranks, size * config.island_size)
                for place in range(config.island_size)
            ],
            backend="gloo",
        )[0]
        for period, size in pairs("levels", config.levels).items()
    }
