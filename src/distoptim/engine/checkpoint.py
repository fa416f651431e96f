"""Saved rounds: their format, their checksum, and where in its rounds a worker was saved."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from distoptim import rule as rules
from distoptim.checksum import checksum
from distoptim.engine.calls import Calls
from distoptim.engine.engine import Engine
from distoptim.version import __version__

FORMAT = 3
KEY = "distoptim"
# What format 1 calls by another name.
_RENAMED_RULES = {"Elastic": "Spring", "Late": "Restart"}


def save(calls: Calls) -> dict[str, Any]:
    """All of a worker's rounds, with what says who wrote them."""
    return {"format": FORMAT, "version": __version__, **calls.state_dict()}


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the checksum of all that is in it beside its rounds."""
    return {**state, KEY: {**state[KEY], "checksum": _content(state)}}


def verify(state: Mapping[str, Any]) -> None:
    """Whether a state dict is as it was when it was sealed; older formats are not, which is said.

    Raises:
        ValueError: it is not.
    """
    saved = state[KEY]
    if not isinstance(saved, Mapping):
        return
    if not isinstance(saved.get("format"), int):
        return
    if saved["format"] in (1, 2) and "checksum" not in saved:
        warnings.warn(
            "checkpoint is unchecked: it was written by an older distoptim, which kept no checksum, so a "
            "damaged value in it may go unseen",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    found = _content(state)
    written = saved.get("checksum")
    if not isinstance(written, int) or written != found:
        raise ValueError(
            f"checkpoint is damaged: its content has the checksum {found}, what was written "
            f"{str(written)[:20]}. Or something in it has changed since state_dict(), whose tensors go "
            "on with the training: copy or save them at once"
        )


def _content(state: Mapping[str, Any]) -> int:
    rounds = {name: value for name, value in state[KEY].items() if name != "checksum"}
    return checksum({**state, KEY: rounds})


def understood(saved: Any) -> dict[str, Any]:
    """A saved state in today's format.

    Raises:
        ValueError: it has a format that is not known, or is none at all.
    """
    found = saved.get("format") if isinstance(saved, dict) else saved
    if isinstance(found, int) and found == FORMAT:
        return dict(saved)
    if isinstance(found, int) and found in (1, 2):
        older = saved if found == 2 else _of_format_1(saved)
        return {**older, "format": FORMAT, "rank": None}
    by = saved.get("version") if isinstance(saved, dict) else None
    raise ValueError(
        f"checkpoint has format {str(found)[:60]!r}, written by distoptim {str(by or 'unknown')[:60]}: "
        f"allowed is 1 to {FORMAT}"
    )


def position(saved: dict[str, Any]) -> dict[str, Any]:
    """Where in its rounds a worker was saved; equal on all workers that go on together.

    "fragments" has of each how many means were merged, the steps of the last and of the next launch,
    and at which step the mean in flight is due. Where rounds last equally long, steps are everybody's
    own.
    """
    if "time" in saved:
        rounds = [[f["merges"], f["pending"] is not None] for f in saved["fragments"]]
        return {"step": 0, "tau": 0, "fragments": rounds}
    return {
        "step": saved["step"],
        "tau": saved["tau"],
        "fragments": [
            [f["merges"], f["launched"], f["next_launch"], f["pending"] and f["pending"]["due"]]
            for f in saved["fragments"]
        ],
    }


def progress(where: dict[str, Any]) -> tuple[int, int]:
    """Of a position: grows with every merge, which all workers make in one order, and every step."""
    return sum(merges for merges, *_ in where["fragments"]), where["step"]


def shared(engine: Engine, saved: dict[str, Any]) -> dict[str, object]:
    """By name, the checksums of what all workers have saved alike: anchors and outer states."""
    out: dict[str, object] = {}
    for sync, f in zip(engine.syncs, saved["fragments"], strict=True):
        for name in rules.compared(engine.rule, sync.state):
            value = f["state"][name]
            memory = value["state"] if isinstance(value, Mapping) else value
            out[f"{name} of {sync.name}"] = f"{checksum(memory):08x}"
    return out


def digest(engine: Engine) -> str:
    """In hex, of all that workers share: anchors and outer states."""
    found = hashlib.sha256()
    for sync in engine.syncs:
        values = rules.save(rules.compared(engine.rule, sync.state))
        # Of an optimizer, what it remembers; its settings are the rule's.
        memory = {n: v["state"] if isinstance(v, dict) else v for n, v in values.items()}
        for leaf in tree_leaves(memory):
            if isinstance(leaf, Tensor):
                found.update(leaf.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()


def keeps_residual(saved: dict[str, Any]) -> bool:
    """Whether something in it is the worker's that saved it: its codes, and what they have lost."""
    coded = [f["compressed"] for f in saved["fragments"] if f["compressed"]]
    return any(c["residual"] is not None or c.get("sent") is not None for c in coded)


def _of_format_1(saved: dict[str, Any]) -> dict[str, Any]:
    try:
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
            "rule": _RENAMED_RULES.get(saved["rule"], saved["rule"]),
            "clock": {key: pace[key] for key in pace if key != "samples"},
            "weights": {"samples": pace["samples"]},
            "fragments": fragments,
        }
    except KeyError as error:
        raise ValueError(f"checkpoint of format 1 has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint of format 1 is damaged: {error}") from error
