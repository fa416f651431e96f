"""Whether somebody averages gradients already: torch's DistributedDataParallel around a model."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def averages_gradients(params: Sequence[Tensor], ranks: Sequence[int] | None) -> bool:
    """Whether DDP has just averaged gradients of some of these over several of the ranks.

    To be asked after a backward pass. DDP leaves no mark on parameters, and trainers put it around a model
    of which an optimizer knows nothing, so all objects of the process are looked through, which takes
    a tenth of a second.

    Args:
        params: that are trained.
        ranks: of different workers, among all; DDP over the ranks of one worker is no harm. None: any.
    """
    own = set(map(id, params))
    return any(
        # The group of one that is left over from another training may be gone.
        own & set(map(id, ddp.module.parameters())) and _averages(ddp, ranks)
        for ddp in _instances()
    )


# How many references the classes had when there was no instance of them.
_references = -1


def _instances() -> list[DistributedDataParallel]:
    """All that there are."""
    global _references
    kinds = _with_subclasses(DistributedDataParallel)
    # An instance holds its class. So where there are no more references than last time nothing is looked
    # through, which a program that makes many optimizers would notice.
    references = sum(map(sys.getrefcount, kinds))
    if references == _references:
        return []
    # By type: to ask a stranger for its class may run code of its own.
    found = [x for x in gc.get_objects() if type(x) in kinds]
    if not found:
        _references = references
    return found


def _with_subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_with_subclasses, cls.__subclasses__()))


def _averages(ddp: DistributedDataParallel, ranks: Sequence[int] | None) -> bool:
    # Not inside no_sync(); and a hook does with gradients what it likes.
    if not ddp.require_forward_param_sync or ddp._comm_hooks:  # noqa: SLF001  # no other way
        return False
    found = set(dist.get_process_group_ranks(ddp.process_group))
    return len(found if ranks is None else found & set(ranks)) > 1
