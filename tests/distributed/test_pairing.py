"""No mean is taken for another one: workers in unlike calls get one error on all, that names both sides."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from distoptim import ALGORITHMS, CommunicationError, LocalSGD
from distoptim.periods import HideCommunication
from distoptim.testing.processes import run
from tests.helpers import toy
from tests.helpers.failures import is_documented
from tests.helpers.share import share

TAU, WORKERS, TIMEOUT_S = 4, 3, 30.0
# What a worker does alone after local step 6, in mid-round, or at the end; the others go on.
ALONE: dict[str, Any] = {
    "averaged()": lambda o: o.averaged().__enter__(),
    "flush()": lambda o: o.flush(),
    "consensus_distance()": lambda o: o.consensus_distance(),
}
MAKERS = {
    f"{name}-{count}-{codec}": partial(
        ALGORITHMS[name], lr=0.1, tau=TAU, fragments=count, codec=codec, timeout_s=TIMEOUT_S
    )
    for name in ("local-sgd", "overlap-local-sgd", "diloco", "co2", "streaming-diloco")
    for count in (1, 3)
    for codec in (None, "int8+ef")
}


Anchors = list[torch.Tensor]


def anchors(optimizer: Any) -> Anchors:
    return [
        value.tensor.clone()
        for state in optimizer.engine.shared_state()
        for name, value in state.items()
        if name == "anchor"
    ]


def attempt(rank: int, make: Any, act: Any, steps: int) -> tuple[str, dict[int, Anchors]]:
    """The error of this worker, and its anchors after so many merges: at each step and at the end."""
    params = [torch.nn.Parameter(p) for p in toy.start(torch.float32)]
    optimizer = make(params)
    seen: dict[int, Anchors] = {}
    error = ""
    try:
        for step in range(1, steps):
            for p, g in zip(params, toy.gradient(rank, params), strict=True):
                p.grad = g.detach()
            optimizer.step()
            act(rank, step, optimizer)
            optimizer.average()
            seen[optimizer.stats()["syncs"]] = anchors(optimizer)
        optimizer.close()
    except CommunicationError as failure:
        error = str(failure)
    assert all(bool(p.isfinite().all()) for p in params)
    seen[optimizer.stats()["syncs"]] = anchors(optimizer)
    return error, seen


def every_case(rank: int) -> dict[tuple[str, str], tuple[str, bool]]:
    """The error, and whether the anchors are at every time those of a run without a fault."""
    out = {}
    for i, (name, make) in enumerate(MAKERS.items()):
        _, right = attempt(rank, make, lambda *_: None, 4 * TAU)
        for what in share(ALONE, of=2, turn=i):

            def act(me: int, step: int, optimizer: Any, what: str = what) -> None:
                if me == 1 and step == 6:
                    ALONE[what](optimizer)

            error, seen = attempt(rank, make, act, 40 * TAU)
            valid = all(all(map(torch.equal, seen[count], right[count])) for count in seen)
            out[name, what] = error, valid
    return out


def test_a_worker_alone_in_a_call_is_an_error_on_all_that_names_both() -> None:
    for found in run(every_case, WORKERS):
        for (name, what), (text, valid) in found.items():
            assert f"rank 1 in {what}" in text, (name, text)
            assert "rank 0 in average(), the mean of fragment" in text, (name, text)
            assert valid, name


def skipping(rank: int) -> dict[str, tuple[str, bool]]:
    """Worker 2 leaves out a call of average(), and so is one behind at the end."""
    out = {}
    for name, make in MAKERS.items():
        params = [torch.nn.Parameter(p) for p in toy.start(torch.float32)]
        optimizer = make(params)
        try:
            for step in range(1, 5 * TAU + 1):
                for p, g in zip(params, toy.gradient(rank, params), strict=True):
                    p.grad = g.detach()
                optimizer.step()
                if (rank, step) != (2, 7):
                    optimizer.average()
            optimizer.flush()
        except CommunicationError as error:
            out[name] = str(error)
        else:
            out[name] = ""
    return out


def test_a_skipped_step_comes_out_by_the_flush_at_the_latest() -> None:
    for found in run(skipping, WORKERS):
        for name, text in found.items():
            assert "workers are not in the same call" in text, (name, text)
            assert f"rank 2 in flush() at local step {5 * TAU - 1}" in text, (name, text)


def balanced(rank: int) -> list[float]:
    """Steps 8, 10 and 12 have the mean 10: the worker in the middle must see it too."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = ALGORITHMS["local-sgd"]([parameter], lr=0.1, tau=100, timeout_s=TIMEOUT_S)
    for _ in range(8 + 2 * rank):
        optimizer.average()
    with pytest.raises(
        CommunicationError, match=r"rank 0 in flush.. at local step 8, rank 1 .* 10"
    ):
        optimizer.flush()
    return [float(parameter)]


def test_steps_whose_mean_is_the_own_one_are_told_apart() -> None:
    assert run(balanced, 3) == [[0.0]] * 3


def closing(rank: int) -> str:
    """Worker 0 is a round ahead, and nobody merges the mean that it has sent."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = ALGORITHMS["overlap-local-sgd"]([parameter], lr=0.1, tau=4, timeout_s=TIMEOUT_S)
    for _ in range(8 if rank else 12):
        optimizer.average()
    with pytest.raises(CommunicationError) as caught:
        (optimizer.flush if rank else optimizer.close)()
    return str(caught.value)


def test_close_tells_of_a_mean_in_flight_that_was_of_unlike_calls() -> None:
    for text in run(closing, 2):
        assert "rank 1 in flush() at local step 8" in text


def in_the_first_round(rank: int) -> str:
    """Worker 1 is alone in a call while the others agree on how long their rounds shall be."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = ALGORITHMS["overlap-local-sgd"](
        [parameter], lr=0.1, tau=HideCommunication(), timeout_s=TIMEOUT_S
    )
    optimizer.average()
    with pytest.raises(CommunicationError) as caught:
        (optimizer.consensus_distance if rank else optimizer.average)()
    return str(caught.value)


def test_a_call_beside_the_first_round_of_a_period_that_hides_is_told_to_all() -> None:
    for text in run(in_the_first_round, 2):
        assert "rank 0 in average(), the mean of fragment 0, at local step 2, rank 1 in" in text


def in_another_order(rank: int) -> list[str]:
    """Two optimizers of equal shapes, made the other way round on worker 2; then three of other values."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(2)) for _ in range(2)]
    told = ""
    made = []
    try:
        made += [LocalSGD([p], lr=0.1, tau=4) for p in (params[::-1] if rank == 2 else params)]
    except ValueError as error:
        told = str(error)
    # Workers that begin with values of their own, some of them another's of before.
    made += [
        LocalSGD([torch.nn.Parameter(torch.ones(3) * (rank + i))], lr=0.1, tau=4) for i in range(4)
    ]
    for optimizer in made:
        optimizer.close()
    return [told]


def test_optimizers_that_are_made_in_another_order_are_refused_on_all() -> None:
    for (text,) in run(in_another_order, 3):
        assert is_documented(text)
        assert text.startswith("rank 2 makes its optimizers in another order than rank 0")


def equal_counts(rank: int) -> float:
    """Workers that leave out other batches, equally many, are in phase."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = ALGORITHMS["local-sgd"]([parameter], lr=1.0, tau=4, timeout_s=TIMEOUT_S)
    for step in range(20):
        if step % 5 != rank:
            parameter.grad = torch.ones(1)
            optimizer.step()
            optimizer.average()
    optimizer.flush()
    return float(parameter)


def test_equal_counts_of_other_batches_are_right() -> None:
    assert run(equal_counts, 2) == [-16.0, -16.0]


def with_and_without(rank: int) -> str:
    """Only one worker gives the module, whose statistics it would average."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = ALGORITHMS["local-sgd"](module.parameters(), lr=0.1, tau=4, timeout_s=TIMEOUT_S)
    with pytest.raises(CommunicationError) as caught:
        optimizer.averaged(module if rank else None).__enter__()
    return str(caught.value)


def test_a_module_that_only_one_gives_is_told_to_all() -> None:
    for text in run(with_and_without, 2):
        assert "rank 0 in averaged() at local step 0, rank 1 in averaged() with a module" in text
