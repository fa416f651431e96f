"""What a run's configuration means to `distoptim`: the optimizer, its period, its options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from distoptim import AveragingOptimizer, checks
from distoptim.algorithms import ALGORITHMS
from distoptim.comm import Communicator, FinishedHandle, Handle
from distoptim.periods import (
    AdaComm,
    EqualTime,
    HideCommunication,
    Period,
    PostLocal,
    Schedule,
    level_periods,
)
from distoptim_experiments.config import (
    POWERSGD,
    ROUNDS_ONLY,
    SYNCHRONOUS,
    RunConfig,
    algorithms,
)

_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool}
_EVERY: dict[str, type] = {"fragments": int, "pattern": str, "reset_inner": bool, "codec": str}
"""Of the options that every averaging optimizer has, those that are a number or a word and belong
to the algorithm rather than to the run."""

_CHOOSE = ("tau_at", "hide_communication", "adacomm", "equal_time")


def own_options(algorithm: str) -> dict[str, type]:
    """The algorithm's options by keyword, with their type."""
    if algorithm == SYNCHRONOUS:
        return {}
    if algorithm == POWERSGD:
        return {"approximation_rank": int}
    found = {}
    for p in inspect.signature(constructor(algorithm)).parameters.values():
        # Who writes no type may have said it by the default.
        said = type(p.default) if p.annotation is p.empty else p.annotation
        name = getattr(said, "__name__", str(said)).split(" ")[0]
        if p.kind is p.KEYWORD_ONLY and p.name not in ("tau", "gmf") and name in _TYPES:
            found[p.name] = _TYPES[name]
    every = dict(_EVERY)
    reset_and_codec = {name: every.pop(name) for name in ("reset_inner", "codec")}
    return {**every, **found, **reset_and_codec}


def constructor(algorithm: str) -> Callable[..., Any]:
    """What says which arguments are the algorithm's own, and what they mean."""
    made = ALGORITHMS[algorithm]
    # A class has all options in its own signature; its constructor has those that it adds.
    return made.__init__ if isinstance(made, type) else made  # type: ignore[misc]  # of this very class


def shared_options(options: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of options given once for several methods, each method's: those that it takes.

    Raises:
        ValueError: there is no such method, or one of the options is of none of them.
    """
    for method in methods:
        RunConfig(algorithm=method)
    taken = {method: own_options(method) for method in methods}
    for name in options:
        if not any(name in own for own in taken.values()):
            others = ", ".join(method for method in algorithms() if name in own_options(method))
            raise ValueError(
                f"{', '.join(methods)}: none of them takes {name}; it is an option of {others}"
            )
    return {
        method: {name: value for name, value in options.items() if name in own}
        for method, own in taken.items()
    }


def check(config: RunConfig) -> RunConfig:
    """`config`, if an optimizer can be made of it; called before anything is started.

    Raises:
        ValueError: the algorithm has no such option, a value is outside the range it has there, two
            say how tau changes, or levels do not fit tau or the workers; or any of them for a
            synchronous method.
    """
    _check_rounds(config)
    _tried(config)
    return config


def _tried(config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer, of few parameters and without other workers."""
    # As many as there can be fragments.
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(min(config.tau, 1000))]
    return build(config.replace(streams=None), params, communicator=_Absent(config.workers))


def rule_facts(config: RunConfig) -> dict[str, Any]:
    """By name, what the algorithm's rule goes by: options as given, else the algorithm's defaults."""
    made = _tried(config)
    assert isinstance(made, AveragingOptimizer)
    return made.engine.rule.facts()


def build(config: RunConfig, params: Iterable[Tensor], **where: Any) -> torch.optim.Optimizer:
    """The optimizer that `config` describes.

    Args:
        config: the run.
        params: what it trains.
        where: the arguments of the algorithm that say with whom it averages: `communicator`,
            `group`, `levels`.

    Raises:
        ValueError: the algorithm has no such option, or a value is outside its range.
    """
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
    if config.streams is not None:
        where["streams"] = config.streams
    return ALGORITHMS[config.algorithm](
        inner, tau=period_of(config), timeout_s=config.timeout_s, **where, **config.options
    )


def period_of(config: RunConfig) -> int | Period:
    """The `tau` of the algorithm."""
    tau: int | Period = config.tau
    if config.hide_communication:
        tau = HideCommunication()
    elif config.adacomm:
        tau = AdaComm(config.tau, interval=config.adacomm)
    elif config.equal_time:
        tau = EqualTime(config.equal_time, weigh=config.weigh)
    elif config.tau_at:
        tau = Schedule({0: config.tau, **pairs("tau_at", config.tau_at)})
    return PostLocal(start=config.post_local, tau=tau) if config.post_local else tau


def pairs(name: str, text: str) -> dict[int, int]:
    """From text: "4:2,8:4" is {4: 2, 8: 4}.

    Raises:
        ValueError: naming the text that is none of this kind.
    """
    parts = text.split(",") if text else []
    try:
        out = {int(key): int(value) for key, value in (part.split(":") for part in parts)}
    except ValueError:
        out = {}
    if len(out) < len(parts):
        raise ValueError(
            f"{name}={text!r}: allowed are different integers with others behind a colon, as in 4:2,8:4"
        )
    return out


def _check_rounds(config: RunConfig) -> None:
    """Whether what is said of the rounds goes together."""
    unset = RunConfig()
    given = [
        f"{name}={getattr(config, name)!r}"
        for name in ROUNDS_ONLY
        if getattr(config, name) != getattr(unset, name)
    ]
    if config.synchronous and given:
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
    if config.levels:
        _check_levels(config, pairs("levels", config.levels))


def _check_levels(config: RunConfig, sizes: Mapping[int, int]) -> None:
    smaller = 1
    for period in level_periods(sizes, period_of(config)):
        size = checks.integer("group size of levels", sizes[period], 2)
        if size % smaller or config.workers % size or size == config.workers:
            raise ValueError(
                f"levels={config.levels!r} with workers={config.workers}: allowed are group sizes "
                "below the number of workers that divide it and each other, the largest last"
            )
        smaller = size


def _inner(config: RunConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    """What every worker steps with; its gradient is clipped, if so, just before the step."""
    inner: torch.optim.Optimizer
    if config.optimizer == "adamw":
        inner = torch.optim.AdamW(params, lr=config.peak_lr, weight_decay=config.weight_decay)
    else:
        inner = torch.optim.SGD(
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


@final
class _Absent(Communicator):
    """Stands for the workers that are not there yet, so that an optimizer can check its arguments.

    All say what this one says; no mean is ever asked for.
    """

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, buffer: Tensor) -> Handle:
        return FinishedHandle(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        return FinishedHandle(output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        return FinishedHandle(output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        pass

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        return [json.loads(json.dumps(message))] * self.size
