"""What is wrong with one worker alone is told to all: who it is, and what; also over groups of neighbours."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distoptim import (
    ALGORITHMS,
    AveragingOptimizer,
    CoCoDSGD,
    CommunicationError,
    LocalSGD,
    OverlapLocalSGD,
    Rule,
    StreamingDiLoCo,
)
from distoptim.comm.codecs import Codec, Int8
from distoptim.periods import PostLocal
from distoptim.testing.lockstep import Lockstep
from distoptim.testing.processes import run
from tests.helpers import coded, toy

TAU, TIMEOUT_S = 4, 30.0
BOUND_S = 3 * TIMEOUT_S


@pytest.mark.parametrize("codec", [None, "int8+ef"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_samples_on_one_worker_only_are_never_a_mean(name: str, count: int, codec: Any) -> None:
    """Neither as few that the mean weight is below 1, nor none at all."""
    for samples in ([0.5, None, None], [0.0, None, None], [None, 1.0, 1.0]):
        make = partial(ALGORITHMS[name], lr=0.1, tau=TAU, fragments=count, codec=codec)
        group = Lockstep(make, [toy.start(torch.float32)] * 3)
        with pytest.raises(CommunicationError, match=r"at local step \d( with samples=)?, another"):
            _rounds(group, samples)


def _rounds(group: Lockstep, samples: Sequence[float | None]) -> None:
    for _ in range(2 * TAU):
        group.step(toy.gradient, samples=samples)


def test_a_worker_without_data_may_have_no_samples() -> None:
    assert run(_joining, 3) == pytest.approx([-8 / 3] * 3)


def _joining(rank: int) -> float:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = LocalSGD([parameter], lr=1.0, tau=2, timeout_s=TIMEOUT_S)
    with optimizer.join():
        for _ in range(2 if rank else 0):
            parameter.grad = torch.ones(1) * rank / 2 + 0.5
            optimizer.step()
            optimizer.average(samples=float(rank))
    optimizer.close()
    return float(parameter.detach())


# What each does to all workers between step() and average(), of which one is the victim.
Act = Callable[[Any, list[torch.nn.Parameter], torch.nn.Parameter, bool], object]


def _unfreeze(_: Any, params: list[Tensor], frozen: torch.nn.Parameter, victim: bool) -> None:
    frozen.requires_grad_(victim)


def _convert(_: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    if victim:
        params[0].data = params[0].data.double()


def _raise(*_: object) -> None:
    raise ArithmeticError("of the user's own")


def _hook(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    if victim:
        optimizer.register_step_post_hook(_raise)
        optimizer.step()


def _evaluate(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    """Train in the block, which others have left."""
    with optimizer.averaged():
        if victim:
            optimizer.step()


def _load(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    saved = optimizer.state_dict()
    if victim:
        optimizer.register_load_state_dict_pre_hook(_raise)
    optimizer.load_state_dict(saved)


def _reload(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    saved = optimizer.state_dict()
    if victim:
        optimizer.register_load_state_dict_post_hook(_raise)
    optimizer.load_state_dict(saved)


@dataclass(frozen=True)
class _Fragile(Rule):
    """Local SGD whose second merge from now on fails, where there is something in `merges`."""

    merges: list[int] = field(default_factory=list)

    def merge(self, fragment: Any, state: Any, mean: Any) -> None:
        fragment.write(mean.flat)
        if self.merges:
            self.merges[0] -= 1
            if not self.merges[0]:
                _raise()


def _break(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    if victim:
        optimizer.engine.rule.merges.append(2)


def _spoil(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    """At whatever the next merge does with parameters."""
    if victim:
        optimizer.engine.syncs[0].fragment.add = _raise


def _flush(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
    # After the first of three, when the next is another one than that of the next launch.
    if victim:
        optimizer.engine.rule.merges.append(1)
    optimizer.flush()


@dataclass(frozen=True)
class _Brittle(Codec):
    """Of 8 bits; fails at one of the next codes, where there is something in `codes`."""

    codes: list[int] = field(default_factory=list, repr=False)

    def nbytes(self, numel: int) -> int:
        return Int8().nbytes(numel)

    def encode(self, x: Tensor, code: Tensor) -> None:
        if self.codes:
            self.codes[0] -= 1
            if not self.codes[0]:
                _raise()
        Int8().encode(x, code)

    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        Int8().add_decoded(code, out, weight=weight)


# With delay 0 nothing is in flight, and three parts are coded before the mean of the own one is.
BRITTLE = _Brittle()
BRITTLE_ONES = partial(LocalSGD, lr=0.1, tau=TAU, codec=BRITTLE, timeout_s=TIMEOUT_S)


def _crack(at: int) -> Act:
    def act(optimizer: Any, params: list[Tensor], frozen: Tensor, victim: bool) -> None:
        if victim:
            BRITTLE.codes[:] = [at]

    return act


PLAIN = partial(OverlapLocalSGD, lr=0.1, tau=TAU, timeout_s=TIMEOUT_S)
CODED = partial(
    ALGORITHMS["diloco"], lr=0.1, tau=TAU, fragments=3, codec="int8", timeout_s=TIMEOUT_S
)
OWN = "ArithmeticError: of the user's own"
REFUSED: dict[str, tuple[Act, list[Any], str]] = {
    "unfrozen": (_unfreeze, [PLAIN, CODED], "ValueError: .* was unfrozen after the optimizer was"),
    "converted": (
        _convert,
        [CODED],
        "ValueError: .*when the optimizer was made and is torch.float64",
    ),
    "samples": (
        lambda o, p, f, victim: victim and o.average(samples=3),
        [PLAIN, CODED],
        "ValueError: average.. with samples= after steps without",
    ),
    "another module": (
        lambda o, p, f, victim: victim and o.averaged(torch.nn.Linear(2, 2)).__enter__(),
        [PLAIN, CODED],
        "ValueError: averaged.Linear.: none of its parameters",
    ),
    "no module": (
        lambda o, p, f, victim: o.average_module(None if victim else torch.nn.Linear(2, 2)),
        [PLAIN],
        "ValueError: None: allowed is a torch.nn.Module",
    ),
    "hook": (_hook, [PLAIN], OWN),
    "closure": (lambda o, p, f, victim: victim and o.step(_raise), [CODED], OWN),
    "evaluation": (_evaluate, [PLAIN], "RuntimeError: inside averaged.. parameters are"),
    "codec": (_crack(1), [], OWN),
    "merge": (_break, ["fragile"], OWN),
    "merge in flush()": (_flush, ["fragile"], OWN),
    "hook after loading": (_reload, [CODED], OWN),
}


def _train(rank: int, victim: int, make: Any, act: Act, start: Sequence[Tensor] = ()) -> str:
    params = [torch.nn.Parameter(p.clone()) for p in start or toy.start(torch.float32)]
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    if make == "fragile":
        make = partial(
            AveragingOptimizer,
            rule=_Fragile(),
            lr=0.1,
            tau=TAU,
            delay=0,
            fragments=3,
            timeout_s=TIMEOUT_S,
        )
    optimizer = make([*params, frozen])
    error = ""
    try:
        for step in range(1, 40):
            for p in params:
                p.grad = p.detach() + rank
            optimizer.step()
            if step == 6:
                act(optimizer, params, frozen, rank == victim)
            optimizer.average()
    except (CommunicationError, ValueError, ArithmeticError, RuntimeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    optimizer.close()
    return error


def _refused(rank: int) -> dict[tuple[str, str], str]:
    """All errors of one worker, over both ways in which messages travel."""
    modules = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    params = [p for module in modules for p in module.parameters()]
    with pytest.raises(ValueError, match=r"workers disagree on order of modules: rank 0 has .0, 2"):
        LocalSGD(params, lr=0.1, tau=2, module=modules if rank != 1 else modules[::-1])
    told = {
        (what, i): _train(rank, 1, make, act)
        for what, (act, makers, _) in REFUSED.items()
        for i, make in enumerate(makers)
    }
    told["hook before loading", 0] = _train(rank, 1, CODED, _load)
    told["codec", 0] = _train(rank, 1, BRITTLE_ONES, _crack(1), coded.START)
    told["codec of a mean", 0] = _train(rank, 1, BRITTLE_ONES, _crack(4), coded.START)
    return told


def test_an_error_of_one_worker_is_told_to_the_others() -> None:
    for rank, found in enumerate(run(_refused, 3, timeout_s=BOUND_S)):
        # Loading compares before anything is changed: all go on as they were.
        loading = found.pop(("hook before loading", 0))
        assert loading == (OWN if rank == 1 else f"ValueError: rank 1 cannot load its state: {OWN}")
        # The others are in the second stage, of which there is none to tell in; but they do not wait.
        coding = found.pop(("codec of a mean", 0))
        cause = OWN if rank == 1 else "Connection closed"
        assert re.match(rf"CommunicationError: rank {rank}: mean of fragment 0 failed .*", coding)
        assert cause in coding, coding
        for (what, how), text in found.items():
            others = rf"CommunicationError: rank {rank}: rank 1 cannot go on: "
            expected = ("" if rank == 1 else others) + REFUSED[what][2]
            assert re.match(expected, text, re.DOTALL), (what, how, rank, text)


ALONE: dict[str, Act] = {
    "averaged()": lambda o, p, f, victim: victim and o.averaged().__enter__(),
    "flush()": lambda o, p, f, victim: victim and o.flush(),
    "consensus_distance()": lambda o, p, f, victim: victim and o.consensus_distance(),
    "load_state_dict()": lambda o, p, f, victim: victim and o.load_state_dict(o.state_dict()),
    "close()": lambda o, p, f, victim: victim and o.close(),
}


LEVELS: dict[str, tuple[Any, list[str]]] = {
    "plain": (partial(LocalSGD, tau=TAU), [*ALONE, "unfrozen"]),
    # In two stages, of which the second starts only while a worker waits, or calls.
    "coded": (partial(StreamingDiLoCo, tau=6, fragments=3, codec="int8"), ["flush()", "close()"]),
    # While the workers average after every step, nobody comes to the groups.
    "post-local": (partial(LocalSGD, tau=PostLocal(start=8, tau=TAU)), ["flush()"]),
    # Which others meet in their groups before they wait for the mean in whose place they are told.
    "delayed": (partial(CoCoDSGD, tau=6, codec="int8"), ["merge"]),
}
# Local steps of each worker, after which it ends.
ENDS = {"one has more": [6, 5, 5, 5], "a pair has more": [6, 6, 5, 5]}


@pytest.fixture(scope="module")
def in_levels() -> list[Any]:
    """Of four workers in pairs, what each is told of one that is alone, of unlike ends, and what it has computed."""
    return run(_in_levels, 4, timeout_s=BOUND_S)


def _in_levels(rank: int) -> tuple[dict[Any, str], dict[Any, str], list[Tensor]]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    options: Any = {"lr": 0.1, "levels": {2: pairs[rank // 2]}, "timeout_s": TIMEOUT_S}
    acts = {**ALONE, "unfrozen": _unfreeze, "merge": _spoil}
    alone = {
        (what, how): _train(rank, 1, partial(make, **options), acts[what], coded.START)
        for how, (make, whats) in LEVELS.items()
        for what in whats
    }
    ends = {
        (who, how): _end(partial(LEVELS[how][0], **options), steps[rank])
        for how in ("plain", "coded")
        for who, steps in ENDS.items()
    }
    make = partial(OverlapLocalSGD, tau=TAU, delay=2, codec="int8", **options)
    return alone, ends, [_save(rank, make, saves=saves) for saves in (False, True)]


def _end(make: Any, steps: int) -> str:
    """What a worker that makes so many local steps is told at the end."""
    optimizer = make([torch.nn.Parameter(p.clone()) for p in coded.START])
    try:
        for _ in range(steps):
            optimizer.average()
        optimizer.close()
    except CommunicationError as error:
        return str(error)
    return ""


def _save(rank: int, make: Any, *, saves: bool) -> Tensor:
    """Parameters at the end of a run in which rank 0 saves its state after every step, alone, or nobody does."""
    params = [torch.nn.Parameter(p.clone()) for p in coded.START]
    optimizer = make(params)
    for _ in range(2 * TAU + 1):
        for p, g in zip(params, coded.gradient(rank, params), strict=True):
            p.grad = g.detach()
        optimizer.step()
        optimizer.average()
        if saves and rank == 0:
            optimizer.state_dict()
            copy.deepcopy(optimizer)
    optimizer.close()
    return torch.cat([p.detach().flatten() for p in params])


def test_a_worker_alone_is_told_over_the_groups_of_neighbours(in_levels: list[Any]) -> None:
    """Those of other groups, who wait for all, hear what neighbours have found out."""
    for rank, (alone, *_) in enumerate(in_levels):
        for (what, how), text in alone.items():
            if what in ("unfrozen", "merge"):
                error = "ValueError: .*was unfrozen after" if what == "unfrozen" else OWN
                cause = error if rank == 1 else f"rank 1 cannot go on: {error}"
                assert re.search(cause, text), (rank, what, text)
            else:
                where = (
                    r"rank 0 in average.., the mean of fragment \d, at local step .*, rank 1 in "
                )
                assert re.search(where + re.escape(what), text), (rank, what, how, text)


def test_unlike_ends_are_told_over_the_groups_of_neighbours(in_levels: list[Any]) -> None:
    where = r"rank 0 in .* at local step 6, .*rank \d in .* at local step 5"
    for rank, (_, ends, _) in enumerate(in_levels):
        for at, text in ends.items():
            assert re.search(where, text), (rank, at, text)


def test_a_worker_that_saves_alone_holds_up_nobody(in_levels: list[Any]) -> None:
    """Its means' second stages start while the others wait for it in a group of neighbours."""
    for *_, (plain, saved) in in_levels:
        assert torch.equal(plain, saved)
