"""What is damaged or unfit in a checkpoint is one ValueError before anything is written, and nothing ends the process."""

from __future__ import annotations

import copy
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._pytree import tree_leaves

from distoptim import ALGORITHMS, AveragingOptimizer, DiLoCo, LocalSGD, OverlapLocalSGD, Rule, State
from distoptim.engine import checkpoint
from distoptim.fragments import Flat
from distoptim.periods import AdaComm, Period, PostLocal
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.share import ALL, share
from tests.laws import checkpoints

TAU = 3
ADAM = partial(torch.optim.Adam, lr=0.1)


def around_adamw(params: Any, **options: Any) -> Any:
    return OverlapLocalSGD(torch.optim.AdamW(params, lr=0.01), **options)


@dataclass
class Memory(State):
    """Of every kind that a rule's memory may be."""

    anchor: Flat
    outer: torch.optim.Optimizer
    latest: float | None = None
    least: float = math.inf
    below: int = 0
    last: str = ""
    all: list[float] | None = None

    def unfit(self, fragment: Any, saved: Any) -> str | None:
        return None if isinstance(saved["all"], list | None) else "all: allowed is a list"


@dataclass(frozen=True)
class Remember(Rule):
    def start(self, fragment: Any) -> State:
        anchor = fragment.flat()
        fragment.read(anchor)
        return Memory(anchor, ADAM([torch.nn.Parameter(anchor.tensor)]))

    def merge(self, fragment: Any, state: Any, mean: Any) -> None:
        state.latest = float(mean.flat.tensor[0])
        state.least = min(state.least, state.latest)
        state.below -= 1
        state.last = f"mean {-state.below}"
        state.all = [*(state.all or []), state.latest]
        (z,) = state.outer.param_groups[0]["params"]
        z.grad = z.detach() - mean.flat.tensor[: fragment.numel]
        state.outer.step()
        fragment.write(state.anchor)

    def shared(self, state: Any) -> Any:
        return {"anchor": state.anchor, "outer": state.outer}


class Remembering(AveragingOptimizer):
    """Written elsewhere."""

    def __init__(self, params: Any, *, tau: Any, **options: Any) -> None:
        super().__init__(params, rule=Remember(), tau=tau, delay=0, **options)


@dataclass(frozen=True)
class Counting(Period):
    """Written elsewhere, too."""

    smallest = TAU

    def choose(self, step: int, tau: int, means: Any, memory: dict[str, float]) -> tuple[int, str]:
        memory["left"] = memory.get("left", 0) - 1
        memory["least"] = math.inf
        memory["any"] = True
        return tau, "counted"


MAKES: dict[str, Callable[..., Any]] = {
    "counting": partial(LocalSGD, lr=0.1, tau=Counting()),
    "remembering": partial(Remembering, lr=0.1, tau=TAU, fragments=2),
    **{name: partial(make, **toy.OPTIONS, tau=TAU) for name, make in ALGORITHMS.items()},
    **{
        f"{name} codec fragments3": partial(
            make, **toy.OPTIONS, tau=TAU, fragments=3, codec="int8+ef"
        )
        for name, make in ALGORITHMS.items()
    },
    "adamw": partial(around_adamw, tau=TAU),
    "diloco over adam": partial(DiLoCo, lr=0.1, tau=TAU, outer=ADAM, fragments=3),
    "adacomm": partial(LocalSGD, lr=0.1, tau=AdaComm(3, interval=3)),
    "post-local": partial(OverlapLocalSGD, lr=0.1, tau=PostLocal(start=9, tau=3), codec="int8+ef"),
}


def trained(name: str, steps: int = 2 * TAU + 1) -> Lockstep:
    workers = Lockstep(MAKES[name], [toy.start(torch.float32)] * 2)
    for step in range(steps):
        workers.step(toy.gradient, losses=[0.5**step] * 2)
    return workers


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a tree, containers too, with its path."""
    if path:
        yield path, tree
    items = tree.items() if isinstance(tree, dict) else ()
    for key, value in enumerate(tree) if isinstance(tree, list | tuple) else items:
        yield from leaves(value, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at a path; MISSING takes it away."""
    key, *rest = path
    if isinstance(tree, dict):
        out = {k: v for k, v in tree.items() if k != key or value is not MISSING or rest}
        if rest or value is not MISSING:
            out[key] = put(tree[key], tuple(rest), value) if rest else value
        return out
    parts = list(tree)
    parts[key : key + 1] = (
        [put(parts[key], tuple(rest), value)] if rest else [value] * (value is not MISSING)
    )
    return type(tree)(parts)


MISSING = object()


def damages(value: Any) -> list[Any]:
    """What may have become of a value."""
    out: list[Any] = [MISSING, None, "x", [], {}, -1, math.nan, 10**30, True, torch.zeros(3)]
    if isinstance(value, torch.Tensor):
        wrong = value.detach().clone().reshape(-1)
        out += [wrong[:-1], wrong.double(), wrong.reshape(1, -1), torch.tensor(math.nan)]
        if value.numel():
            flipped = value.detach().clone().reshape(-1).view(torch.uint8)
            flipped[0] ^= 1
            out.append(flipped.view(value.dtype).reshape(value.shape))
    return out


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    return type(a) is type(b) and a == b


def same(a: Any, b: Any) -> bool:
    ours, theirs = tree_leaves(a), tree_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("name", MAKES)
def test_every_damaged_value_is_one_value_error_and_nothing_is_written(name: str) -> None:
    workers = trained(name)
    optimizer = workers.optimizers[1]
    saved = copy.deepcopy(optimizer.state_dict())
    before = workers.x()
    chosen = random.Random(name)
    for path, value in leaves(saved):
        kinds = damages(value)
        for damaged in [*chosen.sample(kinds, 1), *kinds[-1:]]:
            # Without the rounds it is a plain optimizer's.
            if equal(damaged, value) or (path, damaged) == (("distoptim",), MISSING):
                continue
            with pytest.raises(ValueError, match="checkpoint") as error:
                optimizer.load_state_dict(put(saved, path, damaged))
            assert "\n" not in str(error.value)
    assert same(optimizer.state_dict(), saved)
    assert torch.equal(workers.x(), before)
    optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", share(MAKES, of=3))
def test_what_no_checksum_guards_is_refused_or_trains_on(name: str) -> None:
    """As in files of older versions; what still fits is as good as any."""
    workers = trained(name)
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in workers.optimizers])
    chosen = random.Random(name)
    refused = 0
    for path, value in leaves(saved[1]):
        if path in (("distoptim",), ("distoptim", "checksum")):
            continue
        for damaged in chosen.sample(damages(value), 2 if ALL else 1):
            try:
                for optimizer, state in zip(workers.optimizers, saved, strict=True):
                    optimizer.load_state_dict(checkpoint.sealed(put(state, path, damaged)))
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error), path  # noqa: PT017  # both outcomes are right
                continue
            try:
                for _ in range(TAU + 1):
                    workers.step(toy.gradient, losses=[0.1] * 2)
            except FloatingPointError:
                # Huge values have overflowed.
                workers = trained(name)
    assert refused > 20


def test_what_a_rule_from_elsewhere_remembers_comes_back() -> None:
    workers = trained("remembering")
    saved = copy.deepcopy([optimizer.state_dict() for optimizer in workers.optimizers])
    new = Lockstep(MAKES["remembering"], [toy.start(torch.float32)] * 2)
    for params, theirs in zip(new.params, workers.params, strict=True):
        torch._foreach_copy_([p.data for p in params], theirs)
    for optimizer, state in zip(new.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    for mine, theirs in zip(new.views(), workers.views(), strict=True):
        assert [view.own for view in mine.fragments] == [view.own for view in theirs.fragments]
    workers.run(TAU, toy.gradient)
    new.run(TAU, toy.gradient)
    assert torch.equal(new.x(), workers.x())


def test_a_flipped_byte_of_a_file_is_seen() -> None:
    workers = trained("overlap-local-sgd codec fragments3")
    optimizer = workers.optimizers[0]
    file = io.BytesIO()
    saved = copy.deepcopy(optimizer.state_dict())
    torch.save(saved, file)
    content = file.getvalue()
    chosen = random.Random(0)
    seen = 0
    for position in chosen.sample(range(len(content)), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chosen.randrange(8)
        try:
            read = torch.load(io.BytesIO(bytes(damaged)), weights_only=True)
        except Exception:  # noqa: BLE001, S112  # torch's own; not what is tested
            continue
        try:
            optimizer.load_state_dict(read)
        except ValueError:
            seen += 1
        else:
            # A byte between the values.
            assert same(read, saved)
    assert seen > 20


def test_what_is_trained_on_after_it_was_saved_is_refused() -> None:
    workers = trained("overlap-local-sgd")
    saved = workers.optimizers[0].state_dict()
    workers.run(TAU, toy.gradient)
    with pytest.raises(ValueError, match=r"changed since state_dict\(\).*copy or save them"):
        workers.optimizers[0].load_state_dict(saved)


@pytest.mark.parametrize("name", ["overlap-local-sgd", "diloco over adam", "co2", "slowmo"])
def test_a_short_outer_momentum_is_refused_by_a_new_optimizer(name: str) -> None:
    """torch's fused step would read behind its end."""
    saved = copy.deepcopy(trained(name).optimizers[0].state_dict())
    state = saved["distoptim"]["fragments"][0]["state"]
    if name == "co2":
        state["momentum"] = state["momentum"][:1]
    else:
        memory = state["outer"]["state"][0]
        key = next(k for k in memory if memory[k].dim())
        memory[key] = memory[key][:1].clone()
    new = trained(name, steps=0).optimizers[0]
    with pytest.raises(ValueError, match=r"momentum|exp_avg"):
        new.load_state_dict(checkpoint.sealed(saved))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_short_inner_momentum_is_refused_by_a_new_optimizer(kind: Any) -> None:
    def made() -> Any:
        p = torch.nn.Parameter(torch.ones(4))
        settings = {"momentum": 0.9} if kind is not torch.optim.AdamW else {}
        return p, toy.alone(LocalSGD, kind([p], lr=0.1, **settings), tau=2)

    p, old = made()
    p.grad = torch.ones(4)
    old.step()
    for plain in (False, True):
        saved = copy.deepcopy(old.inner.state_dict() if plain else old.state_dict())
        memory = saved["state"][0]
        name = next(k for k in memory if memory[k].dim())
        memory[name] = memory[name][:2].clone()
        _, new = made()
        with pytest.raises(ValueError, match=rf"state\[0\].{name} is a tensor .*shape \[2\]"):
            new.load_state_dict(saved if plain else checkpoint.sealed(saved))


@pytest.mark.parametrize("name", ["overlap-local-sgd", "codec-int8-two-stages"])
def test_older_files_say_once_that_they_are_unchecked(name: str) -> None:
    saved = checkpoints.read(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        workers = checkpoints.load(name, saved)
    assert [str(w.message)[:23] for w in told] == ["checkpoint is unchecked"] * len(
        workers.optimizers
    )
    assert {w.filename for w in told} == {checkpoints.__file__}


def test_hooks_may_change_what_is_saved() -> None:
    workers = trained("overlap-local-sgd")
    optimizer = workers.optimizers[0]

    def half(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        for memory in state["state"].values():
            memory["momentum_buffer"] = memory["momentum_buffer"].bfloat16()
        return state

    optimizer.register_state_dict_post_hook(half)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["momentum_buffer"].dtype == torch.bfloat16
    optimizer.load_state_dict(saved)
    optimizer.register_state_dict_post_hook(lambda _, state: {"wrapped": state})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


SCALARS = st.sampled_from(
    [None, True, 0, 1, 3, -1, 10**30, 0.1, math.nan, "", "x", b"x", torch.zeros(3), torch.tensor(0)]
)
KEYS = st.sampled_from(
    [
        "state",
        "param_groups",
        checkpoint.KEY,
        "params",
        "lr",
        "format",
        "checksum",
        "rank",
        0,
        1,
        None,
    ]
)
JUNK = st.recursive(
    SCALARS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=4),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(JUNK)
def test_what_is_no_state_at_all_is_one_value_error(junk: Any) -> None:
    params = [torch.nn.Parameter(p) for p in toy.start(torch.float32)]
    optimizer = toy.alone(MAKES["overlap-local-sgd"], params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        optimizer.load_state_dict(junk)
    assert all(map(torch.equal, params, before))
