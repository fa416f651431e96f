"""What holds for every algorithm of the table, at every delay, in one message and in several."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch

import distoptim
from distoptim.engine.identity import SIZE
from distoptim.periods import AdaComm, HideCommunication, PostLocal, Schedule
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.copies import COPIES, resumed
from tests.helpers.share import share

MAKERS = toy.spread()


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def cluster(make, dtype=torch.float64):
    return Lockstep(make, [toy.start(dtype)] * toy.WORKERS)


@functools.cache
def history(make):
    """x after each step of four rounds."""
    return cluster(make).run(4 * toy.TAU, toy.gradient)


def test_consensus_is_a_fixed_point(make):
    workers = cluster(make)
    before = workers.x()
    for x in workers.run(3 * toy.TAU, toy.zero):
        torch.testing.assert_close(x, before, rtol=0, atol=1e-12)


def test_permuting_workers_permutes_results(make):
    order = [2, 0, 3, 1]
    x = history(make)[: 3 * toy.TAU]
    permuted = cluster(make).run(
        3 * toy.TAU, lambda rank, params: toy.gradient(order[rank], params)
    )
    torch.testing.assert_close(permuted, x[:, order], rtol=0, atol=1e-12)
    assert not torch.equal(x[-2, 0], x[-2, 1])


def test_anchors_are_bit_equal_on_all_ranks(make):
    workers = cluster(make, torch.float32)
    if not workers.has_anchor():
        pytest.skip("an algorithm without an anchor")
    start = workers.anchors()[0].clone()
    for _ in range(3 * toy.TAU):
        workers.step(toy.gradient)
        first, *others = workers.anchors()
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, start)


def test_all_start_from_rank_0(make):
    starts = [[p + rank for p in toy.start()] for rank in range(toy.WORKERS)]
    workers = Lockstep(make, starts)
    for x in workers.x():
        assert torch.equal(x, torch.cat([p.reshape(-1) for p in starts[0]]))


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.complex64]


@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for i, dtype in enumerate(DTYPES) for name in toy.once(i)]
)
def test_dtype_is_kept(name, dtype):
    make = MAKERS[name]
    workers = cluster(make, dtype)
    start = workers.x()
    x = workers.run(2 * toy.TAU, toy.gradient)[-1]
    assert all(p.dtype == dtype for mine in workers.params for p in mine)
    assert torch.isfinite(torch.view_as_real(x) if dtype.is_complex else x).all()
    assert not torch.equal(x, start)
    # Half precision is averaged in single.
    assert all(
        view.buffer.dtype == torch.float32 for view in inspect(workers.optimizers[0]).fragments
    )


def test_deterministic(make):
    assert torch.equal(cluster(make).run(2 * toy.TAU, toy.gradient), history(make)[: 2 * toy.TAU])


# At the start, in the first round, and after each step of one that follows another.
COPIED_AT = (0, 2, 4, 5, 6)


@pytest.mark.parametrize(
    ("how", "name", "steps"),
    [
        *(("state_dict", name, share(COPIED_AT, of=4, turn=i)) for i, name in enumerate(MAKERS)),
        *(("pickle", name, COPIED_AT) for name in toy.once(0)),
        *(("deepcopy", name, COPIED_AT) for name in toy.once(1)),
    ],
)
def test_a_copy_from_any_step_goes_on_bit_equally(how, name, steps):
    """Also with rounds in flight, which are most of the steps at a delay."""
    make = MAKERS[name]
    rounds = 2 * toy.TAU
    workers = cluster(make)
    expected = history(make)
    for step in range(rounds + 1):
        if step:
            workers.step(toy.gradient)
        if step not in steps:
            continue
        going_on = COPIES[how](make, workers)
        rest = going_on.run(2 * toy.TAU, toy.gradient)
        assert torch.equal(rest, expected[step : step + 2 * toy.TAU]), f"saved after step {step}"
        # Saving changes nothing for those who are saved.
        assert torch.equal(workers.x(), expected[step - 1] if step else cluster(make).x())


# What every algorithm takes; join and levels need processes: test_join, test_levels_contract.
EVERYWHERE = {
    "codec": {"tau": 3, "codec": "int8+ef"},
    "strided": {"tau": 3, "fragments": 2, "pattern": "strided"},
    "reset": {"tau": 3, "reset_inner": True},
    "samples": {"tau": 3},
    "schedule": {"tau": Schedule({0: 2, 5: 4}), "fragments": 2},
    "post-local": {"tau": PostLocal(start=3, tau=3), "codec": "bf16"},
    "adacomm": {"tau": AdaComm(3, interval=3)},
    "hide": {"tau": HideCommunication(smallest=2, largest=4), "fragments": 2},
}
BLOCKS = {"local-sgd", "bmuf", "slowmo", "diloco", "streaming-diloco"}


@pytest.mark.parametrize(
    ("name", "option", "stops"),
    [
        (name, option, share((4, 7, 8), of=3, turn=i))
        for i, (name, option) in enumerate(share(product(distoptim.ALGORITHMS, EVERYWHERE), of=3))
    ],
)
def test_what_all_algorithms_take_resumes_in_flight_bit_equally(name, option, stops):
    make = functools.partial(distoptim.ALGORITHMS[name], **toy.OPTIONS, **EVERYWHERE[option])
    if option == "hide" and name in BLOCKS:
        with pytest.raises(ValueError, match="a longer round hides no more at a fixed delay"):
            cluster(make)
        return

    def go(workers, stop):
        out = []
        for step in range(inspect(workers.optimizers[0]).step, stop):
            samples = [1.0 + rank * (step % 3) for rank in range(toy.WORKERS)]
            workers.step(
                toy.gradient,
                losses=[2.0**-step] * toy.WORKERS,
                samples=samples if option == "samples" else None,
            )
            out.append(workers.x())
        return out

    expected = go(cluster(make, torch.float32), 13)
    assert torch.isfinite(expected[-1]).all()
    for stop in stops:
        workers = cluster(make, torch.float32)
        go(workers, stop)
        assert torch.equal(
            torch.stack(go(resumed(make, workers), 13)), torch.stack(expected[stop:])
        ), stop


@pytest.mark.parametrize("name", distoptim.ALGORITHMS)
def test_a_step_that_averages_is_a_step_and_an_average(name):
    xs = []
    for inside in (False, True):
        params = [torch.nn.Parameter(p) for p in toy.start()]
        optimizer = toy.alone(
            distoptim.ALGORITHMS[name], params, tau=2, average_in_step=inside, **toy.OPTIONS
        )
        for _ in range(5):
            for p, g in zip(params, toy.gradient(0, [p.detach() for p in params]), strict=True):
                p.grad = g
            optimizer.step()
            if not inside:
                optimizer.average()
        assert optimizer.stats()["steps"] == 5
        xs.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert torch.equal(*xs)


def test_counters_are_exact(make):
    """One launch a round and fragment, each of the parameters, an identity and the weight."""
    workers = cluster(make)
    optimizer = workers.optimizers[0]
    delay = inspect(optimizer).delay
    for step in range(1, 3 * toy.TAU + 1):
        workers.step(toy.gradient)
        launches = merges = nbytes = 0
        views = inspect(optimizer).fragments
        for view in views:
            first = view.offset or toy.TAU
            launched = list(range(first, step + 1, toy.TAU))
            launches += len(launched)
            nbytes += len(launched) * (view.numel + SIZE + 1) * 8
            # At delay = tau the start counts as sent before.
            known = [first - toy.TAU] if delay == toy.TAU else []
            merges += sum(t + delay <= step for t in known + launched)
        stats = optimizer.stats()
        assert (stats["steps"], stats["syncs"], stats["bytes"]) == (step, merges, nbytes)
        assert stats["staleness"] == (delay if merges else 0)
    assert launches == 3 * len(views)


@pytest.mark.parametrize("delay", [0, 1, toy.TAU])
def test_fragments_are_launched_at_their_own_steps(delay):
    from distoptim import LocalSGD

    workers = Lockstep(
        lambda params, **o: LocalSGD(params, tau=toy.TAU, delay=delay, fragments=3, **o),
        [toy.start()] * toy.WORKERS,
    )
    launched = {0: [], 1: [], 2: []}
    for step in range(1, 3 * toy.TAU + 1):
        workers.step(toy.gradient)
        for i, view in enumerate(inspect(workers.optimizers[0]).fragments):
            if view.launched == step:
                launched[i].append(step)
    assert launched == {0: [3, 6, 9], 1: [1, 4, 7], 2: [2, 5, 8]}
