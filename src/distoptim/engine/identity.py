"""What a message is, said in the message itself: no mean can be taken for another one.

A collective of torch pairs with whatever collective comes next on the other ranks. So every message
carries, uncoded and unweighted, the digits of its identity and their squares. The workers' means of both
equal the own values exactly where all workers sent the same: of numbers a_i, mean a = a_j and mean a^2 =
a_j^2 say that their variance is 0. The mean alone does not do: 8, 10 and 12 have the mean 10.

Digits go up to 63, so that sums of squares over 4,096 workers are exact in float32.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

import torch
from torch import Tensor

_BASE = 64
# Digits of the kind, the fragment, the number of the message, the local step, and what payloads weigh.
_LENGTHS = (1, 2, 2, 3, 1)
_DIGITS = sum(_LENGTHS)
SIZE = 2 * _DIGITS


class Weighing(IntEnum):
    """What a worker's payloads weigh.

    Workers that have made no step do not know, as where one had no data in `join()`; they weigh nothing.
    """

    UNKNOWN = 0
    ALIKE = 1
    SAMPLES = 2


class Kind(IntEnum):
    """What a worker calls, so that it sends a mean."""

    ROUND = 1
    FLUSH = 2
    AVERAGED = 3
    CONSENSUS = 4
    JOIN = 5
    CONSOLIDATE = 6
    MODULE = 7
    LOAD = 8
    CLOSE = 9
    AVERAGED_MODULE = 10
    CONSOLIDATE_MODULE = 11
    ERROR = 12

    @property
    def call(self) -> str:
        """What users write."""
        return {
            Kind.ROUND: "average()",
            Kind.FLUSH: "flush()",
            Kind.AVERAGED: "averaged()",
            Kind.CONSENSUS: "consensus_distance()",
            Kind.JOIN: "the end of join()",
            Kind.CONSOLIDATE: "consolidate()",
            Kind.MODULE: "average_module()",
            Kind.LOAD: "load_state_dict()",
            Kind.CLOSE: "close()",
            Kind.AVERAGED_MODULE: "averaged() with a module",
            Kind.CONSOLIDATE_MODULE: "consolidate() with a module",
            Kind.ERROR: "an error",
        }[self]


@final
@dataclass(frozen=True)
class Identity:
    """Of one message; made by `identify`.

    Attributes:
        code: [SIZE], digits and their squares.
        lr: learning rates that all workers must have.
        cause: of an error, what all are told.
    """

    kind: Kind
    fragment: int
    step: int
    weighing: Weighing
    code: Tensor
    lr: Sequence[float] = ()
    cause: str = ""

    def __str__(self) -> str:
        """As messages to people say it."""
        which = f", the mean of fragment {self.fragment}," if self.kind is Kind.ROUND else ""
        samples = " with samples=" if self.weighing is Weighing.SAMPLES else ""
        return f"{self.kind.call}{which} at local step {self.step}{samples}"

    def differs(self, found: Tensor, workers: int) -> bool:
        """Whether the mean of the workers' codes says that not all of them meant the same.

        Args:
            found: [SIZE].
            workers: how many are in it.
        """
        # Not exactly: some backends divide by the number of workers before they add. Means of
        # integers that differ do so by 1/workers at least.
        wrong = (found - self.code).abs() > 0.25 / workers
        weighing, square = found[_DIGITS - 1 :: _DIGITS].tolist()
        wrong[_DIGITS - 1 :: _DIGITS] = False
        # Where all who know say a, the mean of squares is a times the mean.
        alone = min(abs(square - a * weighing) for a in Weighing)
        return bool(wrong.any()) or alone > 0.25 / workers


def identify(
    kind: Kind,
    fragment: int,
    message: int,
    step: int,
    weighing: Weighing,
    *,
    alike: bool = True,
    lr: Sequence[float] = (),
) -> Identity:
    """The identity of a message.

    Args:
        kind: what it belongs to.
        fragment: its index.
        message: its number among those of this engine.
        step: the local step that all workers have made when they send it.
        weighing: of this worker's payloads.
        alike: whether they have; else it is this worker's, and for messages to people alone.
        lr: learning rates that must be equal, too; they move the numbers of message and step.
    """
    digits: list[int] = []
    moved = zlib.crc32(repr(lr).encode()) if lr else 0
    values = (kind, fragment, message + moved, alike * step + moved // _BASE**2, weighing)
    for value, length in zip(values, _LENGTHS, strict=True):
        digits += [value // _BASE**i % _BASE for i in range(length)]
    code = torch.tensor([*digits, *(d * d for d in digits)])
    return Identity(kind, fragment, step, weighing, code, lr)


def index_of(code: Sequence[float]) -> int:
    """The fragment's index in a message's identity."""
    first = _LENGTHS[0]
    digits = code[first : first + _LENGTHS[1]]
    return sum(int(digit) * _BASE**i for i, digit in enumerate(digits))
