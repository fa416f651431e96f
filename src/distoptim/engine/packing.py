"""Payloads with their weight on the way out, means on the way in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distoptim.comm.handles import Handle
from distoptim.engine.fragment_sync import Slot
from distoptim.fragments import Fragment
from distoptim.rule import Rule


def pack(
    rule: Rule,
    slot: Slot,
    weight: float,
    extra: Sequence[Tensor | float],
    heal: Callable[[Slot], None],
) -> Tensor:
    """Fill a slot's buffer: payload, `extra` and 1, all times the weight; or 0 where the payload is
    not finite.

    Returns: whether it was finite, on the host once the collective has ended.
    """
    fragment, buffer = slot.fragment, slot.buffer
    rule.payload(fragment, slot.state, buffer)
    finite = weigh(buffer.tensor, fragment)
    on_cpu = fragment.device.type == "cpu"
    if not on_cpu:
        # The flag follows the payload through the stream; reading it here would stop host and
        # device.
        finite = finite.to("cpu", non_blocking=True)
    elif not finite:
        heal(slot)
        rule.payload(fragment, slot.state, buffer)
    rule.launched(fragment, slot.state, buffer)
    if on_cpu and not finite:
        buffer.tensor.zero_()
    for i, value in enumerate(extra):
        buffer.tensor[fragment.numel + i] = value
    if extra:
        buffer.tensor[fragment.numel : -1].mul_(buffer.tensor[-1])
    if weight != 1:
        buffer.tensor.mul_(weight)
    return finite


def normalise(buffer: Tensor, handle: Handle, name: str, may_be_empty: bool = False) -> float:
    """Mean of weighted payloads -> weighted mean; returns the mean weight.

    Raises:
        FloatingPointError: the weight is 0, which it may not be.
    """
    weight = handle.tail()
    if weight == 0 and not may_be_empty:
        raise FloatingPointError(
            f"{name}: no worker has finite values (and samples to weigh them by, where they are "
            "given); the anchor is as it was"
        )
    if weight not in (0, 1):
        buffer.div_(weight)
    return weight


def name_of(slot: Slot | None) -> str:
    """How messages call it."""
    return "all parameters" if slot is None else f"fragment {slot.index}"


def weigh(buffer: Tensor, fragment: Fragment) -> Tensor:
    """Set the last element to 1 if all are finite, else everything to 0; return which. A sum that
    overflows is not.

    All ranks of an island decide alike: a worker of which one shard were missing would be torn
        apart.
    """
    buffer[fragment.numel :] = 0
    total = buffer.sum()
    if buffer.device.type == "cpu":
        finite = fragment.island.everywhere(torch.tensor(math.isfinite(total)))
        if not finite:
            buffer.zero_()
    else:
        finite = fragment.island.everywhere(torch.isfinite(total))
        buffer.copy_(torch.where(finite, buffer, 0.0))
    buffer[-1] = finite
    return finite
