"""A codec and a communicator written outside of the package, by public names alone, under every algorithm."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distoptim import ALGORITHMS, LocalSGD
from distoptim.comm import (
    Codec,
    Communicator,
    ErrorFeedback,
    FinishedHandle,
    Handle,
    codecs,
    register_codec,
)
from distoptim.testing.lockstep import Lockstep
from tests.helpers.coded import START, gradient

WORKERS = 3
STEPS = 13


class Half(Codec):
    """Numbers as float16."""

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, x: Tensor, code: Tensor) -> None:
        code.view(torch.float16).copy_(x)

    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        out.add_(code.view(torch.float16).float(), alpha=weight)


class Threads(Communicator):
    """Workers that are threads: each lays what it brings on a table, then all look at it."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(table)
        self.table = table
        self.barrier = barrier

    def meet(self, brought: Any) -> list[Any]:
        self.table[self.rank] = brought
        self.barrier.wait()
        everybody = list(self.table)
        self.barrier.wait()
        return everybody

    def all_reduce(self, buffer: Tensor) -> Handle:
        buffer.copy_(sum(self.meet(buffer.clone())) / self.size)
        return FinishedHandle(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        output.copy_(torch.stack(self.meet(input.clone())))
        return FinishedHandle(output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        output.copy_(torch.stack([rows[self.rank] for rows in self.meet(input.clone())]))
        return FinishedHandle(output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        buffer.copy_(self.meet(buffer.clone())[source])

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        return self.meet(message)


def in_threads(work: Callable[[Threads], Tensor]) -> list[Tensor]:
    """What every worker made, by rank; a worker that fails ends the others' wait."""
    table: list[Any] = [None] * WORKERS
    barrier = threading.Barrier(WORKERS, timeout=60)

    def run(rank: int) -> Tensor:
        try:
            return work(Threads(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(run, range(WORKERS)))


def train(make: Callable[..., Any], communicator: Threads) -> Tensor:
    params = [torch.nn.Parameter(p.clone()) for p in START]
    optimizer = make(params, communicator=communicator)
    for _ in range(STEPS):
        for p, g in zip(
            params, gradient(communicator.rank, [p.detach() for p in params]), strict=True
        ):
            p.grad = g
        optimizer.step()
        optimizer.average()
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("codec", [None, Half(), ErrorFeedback(Half()), "2bit+ef"], ids=repr)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_workers_of_another_kind_make_the_same_numbers(name: str, codec: Any) -> None:
    make = partial(ALGORITHMS[name], lr=0.05, tau=4, codec=codec)
    expected = Lockstep(make, [START] * WORKERS).run(STEPS, gradient)[-1]
    for rank, x in enumerate(in_threads(partial(train, make))):
        assert torch.equal(x, expected[rank])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_codec_of_ones_own_rounds_as_finely_as_it_says(name: str) -> None:
    make = partial(ALGORITHMS[name], lr=0.05, tau=4)
    plain, coded = (
        Lockstep(partial(make, codec=codec), [START] * WORKERS) for codec in (None, Half())
    )
    start = coded.x()
    a, b = plain.run(STEPS, gradient)[-1], coded.run(STEPS, gradient)[-1]
    # Two roundings of the difference, to 11 bits each, in each of three means.
    assert 0 < (a - b).abs().max() < 6 * 2**-11 * (b - start).abs().max()
    # Half of float32's bytes: one weight and one code a mean.
    both = [c.optimizers[0].stats()["bytes"] for c in (coded, plain)]
    assert both[0] / both[1] == pytest.approx(0.5, rel=0.1)


def test_a_registered_codec_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CODECS", dict(codecs.CODECS))
    register_codec("half", Half())
    assert repr(codecs.find("half")) == "Half()"
    assert isinstance(codecs.find("half+ef"), ErrorFeedback)
    named, given = (
        Lockstep(partial(LocalSGD, lr=0.05, tau=2, codec=codec), [START] * WORKERS).run(4, gradient)
        for codec in ("half", Half())
    )
    assert torch.equal(named, given)
    for name in ("half", "int8", "half+ef", "", 3):
        with pytest.raises(ValueError, match="name="):
            register_codec(name, Half())  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="codec="):
        register_codec("other", Half)  # type: ignore[arg-type]  # the class, not a codec


@pytest.mark.parametrize("codec", ["int8", None, ErrorFeedback(Half()), Half])
def test_error_feedback_is_of_a_codec(codec: Any) -> None:
    with pytest.raises(ValueError, match="ErrorFeedback"):
        ErrorFeedback(codec)
