"""Workers whose saved states are a round apart, as a failure in the middle of a mean leaves them, resume together."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch

import distoptim
from distoptim import ALGORITHMS
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers.real import parameters, train

TAU, WORKERS, AHEAD = 4, 3, 1
MAKES = {
    **ALGORITHMS,
    "diloco over adam": partial(distoptim.DiLoCo, outer=partial(torch.optim.Adam, lr=0.01)),
    "overlap, two fragments": partial(distoptim.OverlapLocalSGD, fragments=2),
    "overlap, int8+ef": partial(distoptim.OverlapLocalSGD, codec="int8+ef"),
    "local, int8": partial(distoptim.LocalSGD, codec="int8"),
}


def _saved(optimizer, params):
    return copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))


def _memory(optimizer):
    """What all workers must share: anchors, outer states, the references of codes."""
    view = inspect(optimizer)
    coded_means = [part.coded for part in view.fragments if part.coded is not None]
    return view.shared() + [coded_mean.reference.clone() for coded_mean in coded_means]


def _apart(rank, name):
    """Worker AHEAD has merged the second mean, the others have lost it; then all load."""
    params = parameters(0, (40, 40), (8,))
    make = partial(MAKES[name], lr=0.05, momentum=0.5, tau=TAU)
    optimizer = make(params)
    train(optimizer, params, 2 * TAU - 1, rank)
    behind = _saved(optimizer, params)
    train(optimizer, params, TAU, rank)
    # All save at both times, since the second stage of a coded mean needs all.
    ahead = _saved(optimizer, params)
    saved = ahead if rank == AHEAD else behind
    expected = _memory(optimizer)
    torch.distributed.barrier()
    optimizer.close()

    params = [torch.nn.Parameter(x.clone()) for x in saved[1]]
    optimizer = make(params)
    with torch.no_grad():
        torch._foreach_copy_(params, saved[1])
    optimizer.load_state_dict(saved[0])
    loaded = {
        "x": [p.detach().clone() for p in params],
        "memory": _memory(optimizer),
        "step": inspect(optimizer).step,
        "anchored": inspect(optimizer).anchors() is not None,
    }
    train(optimizer, params, 3 * TAU, rank)
    optimizer.flush()
    with optimizer.averaged():
        mean = [p.detach().clone() for p in params]
    after = _memory(optimizer)
    optimizer.close()
    return {**loaded, "expected": expected, "mean": mean, "after": after}


def _all_apart(rank):
    return {name: _apart(rank, name) for name in MAKES}


@pytest.fixture(scope="module")
def results():
    return run(_all_apart, WORKERS)


def _equal(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MAKES)
def test_all_go_on_from_the_one_that_is_furthest(results, name):
    workers = [result[name] for result in results]
    for worker in workers:
        assert worker["step"] == 3 * TAU - 1
        _equal(worker["memory"], workers[AHEAD]["expected"])
    for a, b in itertools.pairwise(workers):
        for key in ("memory", "after", "mean"):
            _equal(a[key], b[key])
    assert all(torch.isfinite(x).all() for x in workers[0]["mean"])
    if workers[0]["anchored"]:
        for a, b in itertools.pairwise(workers):
            _equal(a["x"], b["x"])


def _some_plain(rank):
    params = parameters(0)
    optimizer = distoptim.LocalSGD(params, lr=0.1, tau=TAU)
    saved = optimizer.state_dict() if rank == 0 else optimizer.inner.state_dict()
    with pytest.raises(
        ValueError, match=r"disagree on what to resume: rank 0 has rounds, rank 1 has a plain"
    ):
        optimizer.load_state_dict(saved)
    # Nothing was changed, and all can go on.
    train(optimizer, params, TAU, rank)
    optimizer.close()


def test_rounds_on_some_workers_only_are_refused_by_all():
    run(_some_plain, 2)
