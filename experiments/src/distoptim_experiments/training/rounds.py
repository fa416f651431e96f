"""How long a run's rounds are, and which workers average in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from distoptim import checks
from distoptim.engine.hierarchy import check_periods
from distoptim.periods import AdaComm, HideCommunication, Period, PostLocal, Schedule

if TYPE_CHECKING:
    from distoptim_experiments.config import RunConfig

# Fields of RunConfig that mean nothing to a method that averages gradients, with the values that
# say so.
NONE: dict[str, Any] = {
    "tau_at": "",
    "post_local": 0,
    "hide_communication": False,
    "adacomm": 0,
    "levels": "",
}
_CHOOSE = ("tau_at", "hide_communication", "adacomm")


def check(config: RunConfig, *, synchronous: bool) -> None:
    """Whether what is said of the rounds goes together.

    Raises:
        ValueError: a value outside its range, two that say how tau changes, levels that do not fit
            tau or the workers, or any of them for a synchronous method.
    """
    checks.integer("post_local", config.post_local, 0)
    checks.integer("adacomm", config.adacomm, 0)
    checks.flag("hide_communication", config.hide_communication)
    given = [
        f"{name}={getattr(config, name)!r}" for name in NONE if getattr(config, name) != NONE[name]
    ]
    if synchronous and given:
        raise ValueError(
            f"{given[0]}: {config.algorithm} averages gradients at every step, it has no rounds"
        )
    choose = [text for text in given if text.startswith(_CHOOSE)]
    if len(choose) > 1:
        raise ValueError(f"{' with '.join(choose)}: each says how tau changes; give one")
    if any(step < 1 for step in pairs("tau_at", config.tau_at)):
        raise ValueError(
            f"tau_at={config.tau_at!r}: allowed are local steps from 1 on; until then it is tau"
        )
    sizes = pairs("levels", config.levels)
    if sizes:
        smaller = 1
        for period in check_periods(sizes, period_of(config)):
            size = checks.integer("group size of levels", sizes[period], 2)
            if size % smaller or config.workers % size or size == config.workers:
                raise ValueError(
                    f"levels={config.levels!r} with workers={config.workers}: allowed are group sizes "
                    "below the number of workers that divide it and each other, the largest last"
                )
            smaller = size


def pairs(name: str, text: str) -> dict[int, int]:
    """From text: "4:2,8:4" is {4: 2, 8: 4}.

    Raises:
        ValueError: naming the text that is none of this kind.
    """
    parts = text.split(",") if isinstance(text, str) and text else []
    try:
        out = {int(key): int(value) for key, value in (part.split(":") for part in parts)}
    except ValueError:
        out = {}
    if not isinstance(text, str) or len(out) < len(parts):
        raise ValueError(
            f"{name}={text!r}: allowed are different integers with others behind a colon, as in 4:2,8:4"
        )
    return out


def period_of(config: RunConfig) -> int | Period:
    """The `tau` of the algorithm."""
    tau: int | Period = config.tau
    if config.hide_communication:
        tau = HideCommunication()
    elif config.adacomm:
        tau = AdaComm(config.tau, interval=config.adacomm)
    elif config.tau_at:
        tau = Schedule({0: config.tau, **pairs("tau_at", config.tau_at)})
    return PostLocal(start=config.post_local, tau=tau) if config.post_local else tau


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
