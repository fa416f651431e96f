"""The optimizer of a run, and which options each algorithm takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from distoptim import checks
from distoptim.algorithms import ALGORITHMS
from distoptim.comm import Communicator
from distoptim.options import inner_optimizer
from distoptim_experiments.training import rounds

if TYPE_CHECKING:
    from distoptim_experiments.config import RunConfig

SYNCHRONOUS, POWERSGD = "ddp", "powersgd"
INNER = ("sgd", "adamw")


def names() -> list[str]:
    """All that `RunConfig.algorithm` may be."""
    return [SYNCHRONOUS, *ALGORITHMS, POWERSGD]


def own_options(algorithm: str) -> dict[str, type]:
    """The keyword arguments that are the algorithm's own (all but tau and the original code's gmf), with their type."""
    if algorithm == SYNCHRONOUS:
        return {}
    if algorithm == POWERSGD:
        return {"approximation_rank": int}
    types = {"int": int, "float": float, "bool": bool}
    parameters = inspect.signature(ALGORITHMS[algorithm]).parameters.values()
    annotations = {
        p.name: getattr(p.annotation, "__name__", str(p.annotation)).split(" ")[0]
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("tau", "gmf")
    }
    own = {name: types[text] for name, text in annotations.items() if text in types}
    return {"fragments": int, "pattern": str, **own, "reset_inner": bool, "codec": str}


def shared_options(options: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of options given once for several methods, each method's: those that it takes.

    Raises:
        ValueError: there is no such method, or one of the options is of none of them.
    """
    for method in methods:
        _known(method)
    taken = {method: own_options(method) for method in methods}
    for name in options:
        if not any(name in own for own in taken.values()):
            others = ", ".join(method for method in names() if name in own_options(method))
            raise ValueError(
                f"{', '.join(methods)}: none of them takes {name}; it is an option of {others}"
            )
    return {
        method: {name: value for name, value in options.items() if name in own}
        for method, own in taken.items()
    }


def _known(algorithm: str) -> None:
    if algorithm not in names():
        raise ValueError(f"algorithm={algorithm!r}: allowed is one of {', '.join(names())}")


def build(
    config: RunConfig,
    params: Iterable[Tensor],
    *,
    communicator: Communicator | None = None,
    group: dist.ProcessGroup | None = None,
    levels: Mapping[int, dist.ProcessGroup] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` describes.

    Args:
        config: the run.
        params: what it trains.
        communicator: moves the bytes instead of torch.distributed.
        group: with whom this rank averages; None means all.
        levels: period -> this worker's group, as `rounds.groups` makes them.

    Raises:
        ValueError: there is no such algorithm, it has no such option, or a value is outside its
            range.
    """
    _known(config.algorithm)
    allowed = own_options(config.algorithm)
    for name in config.options:
        if name not in allowed:
            takes = f"its options are {', '.join(allowed)}" if allowed else "it has none of its own"
            raise ValueError(f"{config.algorithm} takes no {name}; {takes}")
    inner = _inner(config, list(params))
    if config.algorithm == POWERSGD:
        checks.integer("approximation_rank", config.options.get("approximation_rank", 1), 1)
    if config.synchronous:
        return inner
    return ALGORITHMS[config.algorithm](
        inner,
        tau=rounds.period_of(config),
        communicator=communicator,
        group=group,
        levels=levels,
        timeout_s=config.timeout_s,
        **config.options,
    )


def _inner(config: RunConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    """What every worker steps with; its gradient is clipped, if so, just before the step."""
    inner: torch.optim.Optimizer
    if config.optimizer == "adamw":
        inner = torch.optim.AdamW(params, lr=config.peak_lr, weight_decay=config.weight_decay)
    else:
        inner = inner_optimizer(
            params,
            lr=config.peak_lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    if (norm := config.clip_norm) is not None:

        def clip(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(params, norm)

        inner.register_step_pre_hook(clip)
    return inner
