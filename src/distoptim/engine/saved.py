"""Whether a saved state fits: names, types, shapes and counts, all compared before anything is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from distoptim import rule as rules
from distoptim.comm import mesh
from distoptim.engine.engine import Engine
from distoptim.engine.fragment_sync import FragmentSync
from distoptim.fragments import Flat

# The largest integer that torch takes.
_MOST = 2**63 - 1


@final
@dataclass(frozen=True)
class Saved:
    """A value of a checkpoint, and what errors call it.

    Every method but `refuse` gives what was asked for or refuses.
    """

    value: Any
    name: str

    def refuse(self, allowed: str) -> NoReturn:
        """Say what it is and what it may be.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"checkpoint: {self.name} is {_short(self.value)}: allowed is {allowed}")

    def __getitem__(self, key: str) -> Saved:
        """What stands under a key, which must be there."""
        if key not in self.names():
            raise ValueError(f"checkpoint: {self.name} has no {key!r}")
        return Saved(self.value[key], f"{self.name}.{key}")

    def names(self) -> list[Any]:
        """The keys, where it is a dictionary; else refused."""
        if not isinstance(self.value, Mapping):
            self.refuse("a dictionary")
        return list(self.value)

    def items(self) -> Iterator[tuple[Any, Saved]]:
        """A dictionary's keys and values."""
        for key in self.names():
            yield key, Saved(self.value[key], f"{self.name}[{key!r}]")

    def parts(self, count: int | None = None) -> list[Saved]:
        """The values with their places, where it is a list; else refused."""
        if not isinstance(self.value, list | tuple) or count not in (None, len(self.value)):
            self.refuse("a list" if count is None else f"a list of {count}")
        return [Saved(value, f"{self.name}[{i}]") for i, value in enumerate(self.value)]

    def integer(self, low: int, high: int = _MOST) -> int:
        """An integer in a range."""
        found = self.value
        if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
            self.refuse(f"an integer from {low} to {high}")
        return found

    def number(self, low: float = -math.inf) -> float:
        """A finite number, an integer too."""
        found = self.value
        fits = _is_number(found) and math.isfinite(found) and found >= low
        if not fits or (isinstance(found, int) and abs(found) > _MOST):
            self.refuse("a finite number" + ("" if low == -math.inf else f", {low:g} or more"))
        return float(found)

    def flag(self) -> None:
        """The value, where it is True or False; else refused."""
        if not isinstance(self.value, bool):
            self.refuse("True or False")

    def text(self) -> str:
        """The value, where it is text; else refused."""
        if not isinstance(self.value, str):
            self.refuse("a text")
        return self.value

    def parameter(self) -> int | str:
        """What stands for a parameter: a number, or a name, as in torch.distributed.checkpoint."""
        return self.text() if isinstance(self.value, str) else self.integer(0)

    def tensor(self, like: Tensor | None = None) -> None:
        """A tensor; of the shape and dtype of another."""
        found = self.value
        if not isinstance(found, Tensor):
            self.refuse("a tensor")
        if like is not None and (found.shape, found.dtype) != (like.shape, like.dtype):
            self.refuse(_short(like))


# ---- the rounds -------------------------------------------------------------------------------------


def check_rounds(engine: Engine, rounds: Mapping[str, Any]) -> None:
    """Whether a saved state, in today's format, fits the engine.

    Raises:
        ValueError: it is of another algorithm or other parameters, or something in it cannot be what
            was saved; naming it.
    """
    saved = Saved(rounds, "distoptim")
    _same("rule", saved["rule"].text(), type(engine.rule).__name__)
    fragments = saved["fragments"].parts()
    _same(
        "fragments",
        [f["signature"].text() for f in fragments],
        [sync.fragment.signature() for sync in engine.syncs],
    )
    workers = saved["workers"].integer(1)
    if saved["rank"].value is not None:
        saved["rank"].integer(0, workers - 1)
    if engine.communicator.elastic:
        _check_elastic(engine, saved)
    step = saved["step"].integer(0)
    tau = saved["tau"].integer(1)
    saved["delay"].integer(0, tau)
    longest = max(tau, _check_clock(engine, saved["clock"]))
    for value in saved["time"].parts(3) if "time" in rounds else ():
        _any_float(value)
    _optional(saved["weights"]["samples"])
    own = rounds["rank"] in (None, engine.communicator.rank)
    for sync, f in zip(engine.syncs, fragments, strict=True):
        _check_counts(f, step, longest)
        _check_state(sync, f["state"])
        _check_pending(sync, f["pending"], step, longest)
        _check_coding(
            engine, sync, f["compressed"], step, workers == engine.communicator.size and own
        )
    for _, records in saved["levels"].items() if "levels" in rounds else ():
        for record in records.parts():
            launched, samples = record.parts(2)
            launched.integer(-longest, step)
            samples.number(0)


def _check_elastic(engine: Engine, rounds: Saved) -> None:
    """Of a worker that comes and goes: whose it is, how far the run was, and in which rounds."""
    saved = rounds["elastic"]
    own = engine.communicator.state_dict()
    if saved["name"].text() != own["name"]:
        saved["name"].refuse(
            f"{own['name']!r}: each worker loads its own file, and who has none takes over what others share"
        )
    now = [repr(engine.clock.period), engine.clock.delay]
    if [rounds["clock"]["period"].value, rounds["delay"].value] != now:
        rounds["delay"].refuse(
            f"{now[1]} with tau {now[0]}: workers that come and go keep their rounds"
        )
    saved["history"].text()
    saved["count"].integer(0)
    for event in saved["events"].parts():
        if sorted(event.names()) != ["time", "what", "why", "worker"]:
            event.refuse("what has happened to a worker: time, what, why, worker")
        event["time"].number(0)
        for name in ("what", "why", "worker"):
            event[name].text()


def _check_clock(engine: Engine, clock: Saved) -> int:
    """Returns its tau."""
    period = engine.clock.period
    same = clock["period"].text() == repr(period)
    clock["whole"].flag()
    remembered = dict(clock["memory"].items())
    if same and period.remembers and remembered:
        for name in period.remembers:
            clock["memory"][name].number()
    for value in remembered.values():
        if not period.remembers:
            # Of a period from elsewhere, which may remember that nothing was yet as an infinite number.
            _any_number(value)
        else:
            # What is counted is an integer, what is measured a float.
            value.integer(0) if isinstance(value.value, int) else value.number()
    for name, value in clock["means"].items():
        if same and name not in period.measures:
            value.refuse(f"nothing; what is measured is {period.measures}")
        _any_float(value)
    if same and clock["means"].value:
        for name in period.measures:
            _any_float(clock["means"][name])
    for value in clock["losses"].parts():
        _any_float(value)
    return clock["tau"].integer(1)


def _check_counts(f: Saved, step: int, longest: int) -> None:
    f["launched"].integer(-longest, step)
    f["next_launch"].integer(step, step + longest)
    f["merges"].integer(0)
    f["samples"].number(0)
    f["seconds"].number(0)


def _check_state(sync: FragmentSync, saved: Saved) -> None:
    """The rule's memory, field by field."""
    _same(
        "state",
        rules.layout({name: value.value for name, value in saved.items()}),
        rules.layout(rules.save(sync.state)),
    )
    for name, value in vars(sync.state).items():
        if isinstance(value, Flat):
            saved[name].tensor(value.tensor)
        elif isinstance(value, torch.optim.Optimizer):
            _check_memory(value, saved[name]["state"], value.param_groups)
        else:
            _check_data(value, saved[name])
    why = sync.state.unfit(sync.fragment, {name: value.value for name, value in saved.items()})
    if why is not None:
        raise ValueError(f"checkpoint: {saved.name}: {why}")


def _check_data(mine: object, saved: Saved) -> None:
    """Plain data of a rule: of the kind that it has now, if it has some."""
    if mine is None or isinstance(mine, list):
        _check_plain(saved)
    elif isinstance(mine, bool):
        saved.flag()
    elif isinstance(mine, int):
        saved.integer(-_MOST)
    elif isinstance(mine, float):
        # An infinite one is none by accident where there is one now.
        if not _is_number(saved.value) or saved.value != mine:
            saved.number()
    elif not isinstance(saved.value, type(mine)):
        saved.refuse(f"a {type(mine).__name__}")


def _check_plain(saved: Saved) -> None:
    """Of any kind that plain data may be."""
    if isinstance(saved.value, list | tuple):
        for value in saved.parts():
            _check_plain(value)
    elif _is_number(saved.value):
        saved.number()
    elif not isinstance(saved.value, bool | str | None):
        saved.refuse("None, True, False, a finite number, text, or a list of these")


def _check_pending(sync: FragmentSync, saved: Saved, step: int, longest: int) -> None:
    """A mean in flight, or None."""
    if saved.value is None:
        return
    mean = saved["mean"]
    mean.tensor()
    size, least = mean.value.numel(), sync.fragment.numel + 1
    if mean.value.dim() != 1 or size < least or mean.value.dtype != sync.fragment.dtype:
        mean.refuse(f"{least} or more numbers of {sync.fragment.dtype}")
    saved["finite"].flag()
    saved["due"].integer(step, step + longest)
    for value in saved["lr"].parts(len(sync.fragment.segments)):
        value.number()


def _check_coding(engine: Engine, sync: FragmentSync, saved: Saved, step: int, own: bool) -> None:
    """What codes have lost, and what they are relative to.

    Args:
        engine: whose.
        sync: the fragment's.
        saved: its coded mean.
        step: of the checkpoint.
        own: whether residuals are this worker's.
    """
    mine = sync.compressed
    residual = None if saved.value is None else saved["residual"].value
    kinds = {None: "none", False: "without a residual", True: "with a residual"}
    _same(
        "codec",
        kinds[None if saved.value is None else residual is not None],
        kinds[None if mine is None else mine.residual is not None],
    )
    if mine is None:
        return
    shared = engine.rule.shared(sync.state).get("anchor")
    # In the synchronous phase the reference is the last mean, whatever the rule.
    if step < engine.clock.period.start or not isinstance(shared, Flat):
        saved["reference"].tensor(mine.reference)
    if mine.residual is not None:
        saved["residual"].tensor(mine.residual)
    mean_residual = saved["mean_residual"]
    if own and mine.mean_residual is not None:
        mean_residual.tensor(mine.mean_residual)
    if mine.sent is not None:
        saved["sent"].tensor(mine.sent if own else None)


# ---- the inner optimizer ----------------------------------------------------------------------------


def check_inner(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Whether a plain optimizer's state dict fits an optimizer that reads it as torch does.

    Raises:
        ValueError: naming what does not.
    """
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    saved = Saved(dict(state), "state_dict")
    groups = saved["param_groups"].parts(len(optimizer.param_groups))
    ids: list[int | str] = []
    for mine, group in zip(optimizer.param_groups, groups, strict=True):
        ids += [p.parameter() for p in group["params"].parts(len(mine["params"]))]
        for name, value in mine.items():
            # What else there is is others', as a scheduler's initial_lr.
            if name in optimizer.defaults:
                _check_hyperparameter(value, name, group)
    if len(set(ids)) != len(ids):
        saved["param_groups"].refuse("groups in which each parameter is once")
    memory = {}
    for key, value in saved["state"].items():
        if key in ids:
            memory[key] = value
        elif not isinstance(key, str):
            value.refuse(f"nothing: parameters are {_short(ids)}")
    # Saved numbers stand for this optimizer's parameters in the order of the groups.
    places = {key: place for place, key in enumerate(ids)}
    _check_memory(
        optimizer,
        Saved({places[key]: value.value for key, value in memory.items()}, "state_dict.state"),
        [group.value for group in groups],
    )


def _check_hyperparameter(mine: object, name: str, group: Saved) -> None:
    """A number stays one; what a newer torch has added may be missing."""
    if name not in group.names() and (mine is None or isinstance(mine, bool | str)):
        return
    saved = group[name]
    if isinstance(saved.value, Tensor):
        if saved.value.numel() != 1 or not torch.isfinite(saved.value).all():
            saved.refuse("one finite number")
    elif isinstance(mine, tuple | list):
        for own, part in zip(mine, saved.parts(len(mine)), strict=True):
            _check_kind(own, part)
    else:
        _check_kind(mine, saved)


def _check_kind(mine: object, saved: Saved) -> None:
    if _is_number(mine) or isinstance(mine, Tensor):
        # An infinite one is none by accident where there is one now.
        if not _is_number(saved.value) or saved.value != mine:
            saved.number()
    elif isinstance(mine, str):
        saved.text()
    elif isinstance(mine, bool) and saved.value is not None:
        saved.flag()


def _check_memory(
    optimizer: torch.optim.Optimizer, saved: Saved, groups: Sequence[Mapping[str, Any]]
) -> None:
    """What an optimizer remembers of each parameter: shapes as in a step of its own.

    Args:
        optimizer: whose; its parameters are numbered in the order of the groups.
        saved: number of a parameter -> its state.
        groups: the saved hyperparameters.
    """
    states = [
        state
        for mine, group in zip(optimizer.param_groups, groups, strict=True)
        for state in _rehearsed(optimizer, mine["params"], group, saved.name)
    ]
    for key, state in saved.items():
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < len(states):
            state.refuse(f"nothing: parameters are 0 to {len(states) - 1}")
        for name, value in states[key].items():
            _check_remembered(value, state[name])


def _check_remembered(mine: object, saved: Saved) -> None:
    if not isinstance(mine, Tensor):
        if _is_number(mine):
            saved.number()
        return
    counts = saved.name.endswith(".step")
    if counts and _is_number(saved.value):
        # As older versions of torch count steps.
        saved.number(0)
        return
    saved.tensor()
    if (
        mesh.local(saved.value).shape != mesh.local(mine).shape
        or saved.value.is_complex() != mine.is_complex()
    ):
        saved.refuse(f"a tensor of shape {list(mine.shape)}")
    if counts and not (0 <= float(saved.value) < math.inf):
        saved.refuse("a number of steps, 0 or more")


def to_come(optimizer: torch.optim.Optimizer) -> dict[int, Mapping[str, Any]]:
    """What an optimizer will remember after its first step of those parameters of which it has nothing.

    Returns: number of a parameter -> its state, tensors without values; of torch's own optimizers only.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [
        state
        for group in optimizer.param_groups
        for state in _rehearsed(optimizer, group["params"], group, "param_groups")
    ]
    return {
        number: state
        for number, (p, state) in enumerate(zip(params, states, strict=True))
        if not optimizer.state.get(p)
    }


def _rehearsed(
    optimizer: torch.optim.Optimizer, params: list[Tensor], group: Mapping[str, Any], name: str
) -> list[Mapping[str, Any]]:
    """What an optimizer remembers of its parameters after a step with a group's hyperparameters.

    Of torch's own ones by a step over parameters without memory: a new optimizer has none yet, and one
    of a wrong shape ends the process in a fused step. Of others, what they remember now.
    """
    kind = type(optimizer)
    states = [optimizer.state.get(p, {}) for p in params]
    known: list[Mapping[str, Any]] = [s if isinstance(s, Mapping) else {} for s in states]
    if not kind.__module__.startswith("torch.optim."):
        return known
    slow = ("fused", "foreach", "capturable", "differentiable")
    names = inspect.signature(kind).parameters.keys() - {"params", *slow}
    settings = {key: value for key, value in group.items() if key in names}
    if isinstance(settings.get("lr"), Tensor):
        settings["lr"] = float(settings["lr"])
    doubles = [
        torch.nn.Parameter(torch.empty(mesh.local(p).shape, dtype=p.dtype, device="meta"))
        for p in params
    ]
    try:
        made = kind(doubles, **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"checkpoint: hyperparameters beside {name}: {error}") from error
    for double in doubles:
        double.grad = torch.empty_like(double)
    try:
        with torch.no_grad():
            # Without the hooks around it, which are the user's.
            inspect.unwrap(kind.step)(made)
    except (TypeError, RuntimeError, NotImplementedError):
        # LBFGS wants a closure, Adafactor values.
        return known
    return [made.state.get(double, {}) for double in doubles]


# ---- pieces -----------------------------------------------------------------------------------------


def _same(what: str, theirs: object, mine: object) -> None:
    if theirs != mine:
        raise ValueError(f"checkpoint has {what} {theirs}, this optimizer {mine}")


def _optional(saved: Saved) -> None:
    if saved.value is not None:
        saved.number(0)


def _any_number(saved: Saved) -> None:
    if not isinstance(saved.value, int | float):
        saved.refuse("a number")


def _any_float(saved: Saved) -> None:
    """A measured value, which may have overflowed."""
    if not _is_number(saved.value):
        saved.refuse("a number")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
