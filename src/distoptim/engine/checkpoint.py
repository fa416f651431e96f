"""Whether saved rounds fit an engine, and where in its rounds a worker was saved."""

from __future__ import annotations

from typing import Any

from distoptim import rule as rules
from distoptim.engine.engine import Engine, Rounds
from distoptim.version import __version__

FORMAT = 2
# What format 1 (written before distoptim 0.2) calls by another name.
_RENAMED_RULES = {"Elastic": "Spring", "Late": "Restart"}


def save(rounds: Rounds) -> dict[str, Any]:
    """All of a worker's rounds, with what says who wrote them."""
    return {"format": FORMAT, "version": __version__, **rounds.state_dict()}


def understood(saved: Any) -> dict[str, Any]:
    """A saved state in today's format.

    Raises:
        ValueError: it has a format that is not known, or is none at all.
    """
    found = saved.get("format") if isinstance(saved, dict) else saved
    if found == FORMAT:
        return dict(saved)
    if found == 1:
        return _of_format_1(saved)
    by = saved.get("version") if isinstance(saved, dict) else None
    raise ValueError(
        f"checkpoint has format {found!r}, written by distoptim {by or 'unknown'}: allowed is 1 or "
        f"{FORMAT}"
    )


def check(engine: Engine, saved: dict[str, Any]) -> None:
    """Whether a saved state fits the engine.

    Raises:
        ValueError: it is of another algorithm, other parameters, or memory of another kind.
    """
    mine = {
        "rule": type(engine.rule).__name__,
        "fragments": [sync.fragment.signature() for sync in engine.syncs],
        "state": [rules.layout(rules.save(sync.state)) for sync in engine.syncs],
        "codec": [
            _coding(None if sync.compressed is None else sync.compressed.state_dict())
            for sync in engine.syncs
        ],
    }
    theirs = {
        "rule": saved["rule"],
        "fragments": [f["signature"] for f in saved["fragments"]],
        "state": [rules.layout(f["state"]) for f in saved["fragments"]],
        "codec": [_coding(f["compressed"]) for f in saved["fragments"]],
    }
    for key, value in mine.items():
        if theirs[key] != value:
            raise ValueError(f"checkpoint has {key} {theirs[key]}, this optimizer {value}")


def place(saved: dict[str, Any]) -> dict[str, Any]:
    """Where in its rounds a worker was saved; equal on all workers that go on together.

    "fragments" has of each how many means were merged, the steps of the last and of the next launch,
    and at which step the mean in flight is due.
    """
    return {
        "step": saved["step"],
        "tau": saved["tau"],
        "fragments": [
            [f["merges"], f["launched"], f["next_launch"], f["pending"] and f["pending"]["due"]]
            for f in saved["fragments"]
        ],
    }


def progress(where: dict[str, Any]) -> tuple[int, int]:
    """Of a place: grows with every merge, which all workers make in one order, and every step."""
    return sum(merges for merges, *_ in where["fragments"]), where["step"]


def _coding(saved: dict[str, Any] | None) -> str:
    """What a saved coded mean needs of another."""
    if saved is None:
        return "none"
    return "with a residual" if saved["residual"] is not None else "without a residual"


def _of_format_1(saved: dict[str, Any]) -> dict[str, Any]:
    pace = saved["pace"]
    kept = ("workers", "step", "tau", "delay", "levels")
    fragments = [
        {
            **f,
            "merges": f.get("merges", 0),
            "pending": f["flight"],
            "compressed": f.get("coder"),
        }
        for f in saved["fragments"]
    ]
    return {
        **{key: saved[key] for key in kept if key in saved},
        "format": FORMAT,
        "rule": _RENAMED_RULES.get(saved["rule"], saved["rule"]),
        "clock": {key: pace[key] for key in pace if key != "samples"},
        "weights": {"samples": pace["samples"]},
        "fragments": fragments,
    }
