"""Argument checks that name the value and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real

LARGEST = 1e30  # far enough from the end of float32 that a product with a parameter is finite


def is_zero(value: object) -> bool:
    """Whether it is the integer 0, of anything that may still have to be refused."""
    return isinstance(value, Integral) and value == 0


def number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """`value` as a float if it is a finite number in the range; ends belong to it unless open.

    Raises:
        ValueError: naming the value and the range.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:
            x = math.inf
        if (
            math.isfinite(x)
            and (low < x if open_low else low <= x)
            and (x < high if open_high else x <= high)
        ):
            return x
    left, right = (
        "(" if open_low or low == -math.inf else "[",
        ")" if open_high or high == math.inf else "]",
    )
    raise ValueError(f"{name}={value!r}: allowed is a number in {left}{low:g}, {high:g}{right}")


def integer(name: str, value: object, low: int, high: float = math.inf) -> int:
    """`value` if it is an integer in [low, high].

    Raises:
        ValueError: naming the value and the range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    limit = f"{low} or more" if high == math.inf else f"from {low} to {high}"
    raise ValueError(f"{name}={value!r}: allowed is an integer, {limit}")


def flag(name: str, value: object) -> bool:
    """`value` if it is a bool.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r}: allowed is True or False")


def address(name: str, value: object) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 address stands in brackets.

    Raises:
        ValueError: naming the value.
    """
    host, _, port = str(value).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{name}={value!r}: allowed is HOST:PORT, as in 10.0.0.1:29510")
    return host, int(port)


def outer_momentum(
    value: object, gmf: object, *, default: float, name: str = "outer_momentum"
) -> float:
    """The momentum given under either of its names, in [0, 1).

    Raises:
        ValueError: both are given, or it is outside its range.
    """
    if value is not None and gmf is not None:
        raise ValueError(f"{name}={value!r} and gmf={gmf!r}: two names of one thing; give one")
    if gmf is not None:
        name, value = "gmf", gmf
    return default if value is None else number(name, value, 0, 1, open_high=True)


def no_outer_momentum(algorithm: str, gmf: object) -> None:
    """Accept the original code's `gmf` where it means nothing.

    Raises:
        ValueError: it asks for something.
    """
    if gmf is not None and number("gmf", gmf, 0, 1, open_high=True):
        raise ValueError(f"gmf={gmf!r}: {algorithm} has no outer momentum; allowed is 0")
