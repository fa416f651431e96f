"""Options that would do nothing beside the others are refused.

Who gives one expects something of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from distoptim_experiments.cli.options import is_given
from distoptim_experiments.config import POWERSGD, SYNCHRONOUS
from distoptim_experiments.data import datasets as data

Values = Mapping[str, Any]
TIMING = "Timing alone"
_SYNCHRONOUS = (SYNCHRONOUS, POWERSGD)
_TIMED = ("step_ms", "latency_ms", "workers", "fragments", "folder")
_ROUNDS = (
    "without --hide-communication, for a method that has rounds",
    lambda v: not v["hide_communication"] and v.get("algorithm") not in _SYNCHRONOUS,
)
_STEPS = ("with --schedule steps", lambda v: v["schedule"] == "steps")
_ISLANDS = ("with --island", lambda v: v["island"])
_UNTRACED = ("without --trace", lambda v: not v["trace"])

# Name of an option -> when it has an effect, in words and as a question to all options' values.
EFFECTIVE: dict[str, tuple[str, Callable[[Values], object]]] = {
    "tau": _ROUNDS,
    "taus": _ROUNDS,
    "momentum": ("with --optimizer sgd", lambda v: v["optimizer"] == "sgd"),
    "nesterov": (
        "with --optimizer sgd and a --momentum above 0",
        lambda v: v["optimizer"] == "sgd" and v["momentum"],
    ),
    "schedule": ("with --milestones", lambda v: v["schedule"] != "steps" or v["milestones"]),
    "milestones": _STEPS,
    "decay": _STEPS,
    "epochs": ("without --steps", lambda v: not v["steps"]),
    "data_dir": (
        "with data that have files in a folder",
        lambda v: "data" not in v or data.has_files(v["data"]),
    ),
    "carry": ("with a --delay above 0", lambda v: v.get("delay")),
    "step_ms": _UNTRACED,
    "slowdown": ("without --trace", lambda v: not v.get("trace")),
    "island": ("with more --workers than that", lambda v: v["island"] < v["workers"]),
    "island_latency_ms": _ISLANDS,
    "island_bandwidth_gbit_s": _ISLANDS,
    "collective": ("without --island", lambda v: not v["island"]),
    "workers": (
        "where this command starts them",
        lambda v: v.get("started") in (None, v["workers"]),
    ),
    "processes": ("on virtual workers", lambda v: not v["real"]),
}


def check_effects(values: Values) -> None:
    """Whether all options given on the command line have an effect; what switches something off may
    be given always.

    Args:
        values: of all options, by name.

    Raises:
        ValueError: naming the one that has none, and when it would have.
    """
    ctx = click.get_current_context()
    for option in ctx.command.params:
        name = option.name or ""
        value = ctx.params.get(name)
        if not is_given(name) or not value or value == "none":
            continue
        when, holds = _effective(option, values)
        if not holds(values):
            given = option.opts[0] if value is True else f"{option.opts[0]} {value}"
            raise ValueError(f"{given}: has an effect only {when}")


def _effective(option: click.Parameter, values: Values) -> tuple[str, Callable[[Values], object]]:
    """When the option has an effect; `simulate --timing` is almost another command."""
    timing = getattr(option, "section", "") == TIMING
    if timing or (values.get("timing") and option.name not in _TIMED):
        return f"with{'' if timing else 'out'} --timing", lambda v: v["timing"] is timing
    return EFFECTIVE.get(option.name or "", ("always", lambda v: True))
