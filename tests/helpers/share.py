"""A share of what takes too long to be tried at every call: all of it with DISTOPTIM_ALL=1."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

ALL = os.environ.get("DISTOPTIM_ALL") == "1"


def share(cases: Iterable[T], *, of: int, turn: int = 0) -> list[T]:
    """Every `of`-th case, from the `turn`-th on.

    Where cases are all pairs of some kinds, `of` has no divisor in common with the number of any kind,
    so that all kinds are met.
    """
    return list(cases) if ALL else list(cases)[turn % of :: of]
