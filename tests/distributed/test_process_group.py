"""Real processes over gloo and over the emulated link: start, handshake, groups, evaluation."""

from __future__ import annotations

import copy
import gc
import math
import random
import resource
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distoptim import ALGORITHMS, EASGD, CoCoDSGD, LocalSGD, OverlapLocalSGD, QuarantineWarning
from distoptim.comm import Link, ProcessGroupCommunicator, emulate
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers.real import parameters, train

TAU = 3
BACKENDS = ["gloo", "emulated"]


# The start


def _start(rank):
    out = {}
    for name, make in ALGORITHMS.items():
        params = parameters(rank, (2, 3), (3,))
        optimizer = make(params, lr=0.1, tau=2)
        out[name] = (
            [float(p.mean()) for p in params],
            [
                view.buffer[:-1].mean().item()
                for view in inspect(optimizer).fragments
                if view.in_flight
            ],
        )
        optimizer.close()
    return out


def test_everybody_starts_from_rank_0s_parameters():
    for rank, result in enumerate(run(_start, 3)):
        for name, (start, sent) in result.items():
            assert start == [0, 0], (rank, name)
            assert all(mean == 0 for mean in sent), (rank, name)
        # Where rounds overlap, the start counts as sent.
        assert result["overlap-local-sgd"][1] == [0]


MISMATCHES = {
    "tau": (lambda p, odd: LocalSGD(p, tau=5 if odd else 4), "tau: rank 0 has 4, rank 2 has 5"),
    "delay": (
        lambda p, odd: CoCoDSGD(p, tau=4, delay=2 if odd else 4),
        "delay: rank 0 has 4, rank 2 has 2",
    ),
    "algorithm": (
        lambda p, odd: (EASGD if odd else CoCoDSGD)(p, tau=4),
        "algorithm: rank 0 has CoCoDSGD, rank 2 has EASGD",
    ),
    "hyperparameter": (
        lambda p, odd: OverlapLocalSGD(p, tau=4, alpha=0.5 if odd else 0.6),
        "alpha: rank 0 has 0.6, rank 2 has 0.5",
    ),
    "reset_inner": (
        lambda p, odd: LocalSGD(p, tau=4, reset_inner=odd),
        "reset_inner: rank 0 has False, rank 2 has True",
    ),
    "inner optimizer": (
        lambda p, odd: LocalSGD((torch.optim.Adam if odd else torch.optim.SGD)(p), tau=4),
        "inner optimizer: rank 0 has SGD, rank 2 has Adam",
    ),
    "shape": (
        lambda p, odd: LocalSGD(parameters(0, (2, 3), (4 if odd else 3,)), tau=4),
        "fragment 0: rank 0 has part (0, 1): float32[2, 3] float32[3], "
        "rank 2 has part (0, 1): float32[2, 3] float32[4]",
    ),
    "order": (
        lambda p, odd: LocalSGD(p[::-1] if odd else p, tau=4),
        "fragment 0: rank 0 has part (0, 1): float32[2, 3] ",
    ),
    "what is compared": (
        lambda p, odd: LocalSGD(p, tau=4, sync_module=odd),
        "sync_module: rank 0 has False, rank 2 has True",
    ),
    "number": (
        lambda p, odd: LocalSGD(p[:1] if odd else p, tau=4),
        "fragment 0: rank 0 has part (0, 1): float32[2, 3] ",
    ),
    "frozen": (
        lambda p, odd: LocalSGD([p[0].requires_grad_(not odd), p[1]], tau=4),
        "fragment 0: ",
    ),
    "dtype": (
        lambda p, odd: LocalSGD(
            [x.to(torch.float64 if odd else x.dtype).detach().requires_grad_() for x in p], tau=4
        ),
        "fragment 0: ",
    ),
    "fragments": (
        lambda p, odd: LocalSGD(p, tau=4, fragments=2 if odd else 1),
        "number of fragments: rank 0 has 1",
    ),
}


def _handshake(rank):
    odd = rank == 2
    messages = {}
    for name, (make, _) in MISMATCHES.items():
        with pytest.raises(ValueError, match="workers disagree on") as caught:
            make(parameters(0, (2, 3), (3,)), odd)
        messages[name] = str(caught.value)
    with (
        mock.patch("distoptim.optimizer.__version__", "9.9" if odd else "9.8"),
        pytest.raises(ValueError, match=r"version: rank 0 has 9[.]8, rank 2 has 9[.]9"),
    ):
        LocalSGD(parameters(0), tau=4)
    # A process group outlives it.
    optimizer = LocalSGD(parameters(0), tau=4)
    optimizer.close()
    return messages


def test_workers_that_disagree_all_fail_with_a_message_that_names_both():
    for result in run(_handshake, 3):
        for name, (_, message) in MISMATCHES.items():
            assert message in result[name], name


REFUSED = {
    "tau": lambda p, odd: LocalSGD(p, lr=0.1, tau=-1 if odd else 4),
    "lr": lambda p, odd: LocalSGD(p, lr=-1.0 if odd else 0.1, tau=4),
    "alpha": lambda p, odd: OverlapLocalSGD(p, lr=0.1, alpha=7.0 if odd else 0.5, tau=4),
    "codec": lambda p, odd: LocalSGD(p, lr=0.1, tau=4, codec="nope" if odd else None),
    "levels": lambda p, odd: LocalSGD(p, lr=0.1, tau=4, levels=3 if odd else None),
    "empty parameter list": lambda p, odd: LocalSGD([] if odd else p, lr=0.1, tau=4),
    "memory": lambda p, odd: LocalSGD(_out_of_memory() if odd else p, lr=0.1, tau=4),
}


def _out_of_memory():
    yield torch.nn.Parameter(torch.zeros(1))
    raise RuntimeError("no memory")


def _refusals(rank):
    """A bad value on rank 2 alone, then on all."""
    messages = []
    for name, make in REFUSED.items():
        for odd in (rank == 2, True):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=name) as caught:
                make(parameters(0), odd)
            messages.append(str(caught.value))
    LocalSGD(parameters(0), tau=4).close()
    return messages


def test_a_bad_value_on_one_worker_is_told_to_all():
    results = run(_refusals, 3)
    for alone, other, everywhere in zip(
        results[2][::2], results[0][::2], results[0][1::2], strict=True
    ):
        assert other == f"rank 2 was refused its arguments: {alone}"
        assert everywhere == alone
    assert results[0] == results[1]


# Groups


def _islands(rank):
    islands = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, other = islands[rank // 2], islands[1 - rank // 2]
    with pytest.raises(ValueError, match="not a member"):
        LocalSGD(parameters(rank), tau=1, group=other)
    for options in ({"group": "all"}, {"levels": {1: "all"}}):
        with pytest.raises(ValueError, match="'all': allowed is a process group"):
            LocalSGD(parameters(rank), tau=2, **options)
    near, far = parameters(rank), parameters(rank)
    inside = OverlapLocalSGD(
        near, lr=0.1, tau=2, alpha=0.5, outer_momentum=0, delay=0, group=mine, size=2
    )
    across = LocalSGD(far, lr=0.1, tau=4, size=4)
    start = float(near[0][0])
    for _ in range(4):
        train(inside, near, 1, rank)
        train(across, far, 1, rank)
    with inside.averaged():
        evaluated = float(near[0][0])
    out = start, float(near[0][0]), evaluated, float(far[0][0])
    inside.close()
    train(across, far, 4, rank)
    across.close()
    return (*out, float(far[0][0]))


def test_islands_average_on_their_own_beside_an_optimizer_of_all():
    results = run(_islands, 4)
    for rank, (start, near, evaluated, far, far_later) in enumerate(results):
        first = rank // 2 * 2
        assert start == first
        mean = first + 0.5
        # x moves by -0.2 rank a round, then half way to the mean of its island.
        xs = [first, first]
        for _ in range(2):
            xs = [x - 0.2 * (first + i) for i, x in enumerate(xs)]
            z = sum(xs) / 2
            xs = [(x + z) / 2 for x in xs]
        assert near == pytest.approx(xs[rank - first])
        assert evaluated == pytest.approx(first - 0.4 * mean)
        assert (far, far_later) == pytest.approx((-0.1 * 4 * 1.5, -0.1 * 8 * 1.5))


# Evaluation, flush, quarantine


def _evaluation(rank):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    params = list(module.parameters())
    optimizer = CoCoDSGD(params, lr=0.1, tau=TAU)
    twin_module = copy.deepcopy(module)
    twin = CoCoDSGD(twin_module.parameters(), lr=0.1, tau=TAU)
    for p, q in zip(params, twin_module.parameters(), strict=True):
        assert torch.equal(p, q)
    train(optimizer, params, TAU + 1, rank)
    train(twin, list(twin_module.parameters()), TAU + 1, rank)
    with torch.no_grad():
        for x, value in ((module, rank), (twin_module, rank)):
            x[1].running_mean.fill_(value)
            x[1].num_batches_tracked.fill_(value)
    before = copy.deepcopy(module.state_dict())
    distance = optimizer.consensus_distance()
    with optimizer.averaged(module):
        inside = copy.deepcopy(module.state_dict())
    # Nobody is left behind by a worker's exception in the block.
    try:
        with optimizer.averaged():
            if rank == 0:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    train(optimizer, params, 2 * TAU, rank)
    train(twin, list(twin_module.parameters()), 2 * TAU, rank)
    assert all(torch.equal(p, q) for p, q in zip(params, twin_module.parameters(), strict=True))
    optimizer.flush()
    assert optimizer.consensus_distance() < 1e-6
    numel = sum(p.numel() for p in params)
    return {"before": before, "inside": inside, "distance": distance, "numel": numel}


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_of_the_mean(backend):
    results = run(_evaluation, 4, backend=backend)
    for rank, result in enumerate(results):
        for key, value in result["inside"].items():
            if key.endswith("num_batches_tracked"):
                assert int(value) == rank
                continue
            mean = torch.stack([other["before"][key] for other in results]).mean(0)
            torch.testing.assert_close(value, mean)
        # After one merge, all are apart by one step of 0.1 rank and what the mean has not yet
        # brought.
        apart = torch.stack(
            [
                torch.cat(
                    [
                        other["before"][k].reshape(-1)
                        for k in ("0.weight", "0.bias", "1.weight", "1.bias")
                    ]
                )
                for other in results
            ]
        )
        assert apart.shape[1] == result["numel"]
        expected = (apart - apart.mean(0)).square().sum(1).mean().sqrt()
        assert result["distance"] == pytest.approx(float(expected), rel=1e-5)


def _flush(rank):
    out, communicator = {}, ProcessGroupCommunicator()
    for name, make in ALGORITHMS.items():
        params = parameters(0)
        optimizer = make(params, lr=0.1, communicator=communicator, tau=TAU)
        train(optimizer, params, TAU + 1, rank)
        optimizer.flush()
        x, anchor = float(params[0][0]), inspect(optimizer).anchors()
        train(optimizer, params, 2 * TAU, rank)
        out[name] = x, anchor, float(params[0][0]), optimizer.stats()["syncs"]
    communicator.close()
    return out


def test_flush_merges_a_partial_round_on_all():
    results = run(_flush, 3)
    for name in ALGORITHMS:
        xs, anchors, later, syncs = zip(*(result[name] for result in results), strict=True)
        if anchors[0] is not None:
            assert all(torch.equal(anchors[0], a) for a in anchors)
        if name in ("local-sgd", "cocod-sgd", "bmuf", "slowmo"):
            assert len(set(xs)) == 1 or max(xs) - min(xs) < 1e-6, name
        if name in ("local-sgd", "cocod-sgd"):
            assert xs[0] == pytest.approx(-0.1 * (TAU + 1) * 1.0)
            assert sum(later) / 3 == pytest.approx(-0.1 * (3 * TAU + 1) * 1.0)
        assert len(set(syncs)) == 1


def _quarantine(rank):
    out, communicator = {}, ProcessGroupCommunicator()
    for name, make in ALGORITHMS.items():
        params = parameters(0)
        optimizer = make(params, lr=0.1, communicator=communicator, tau=TAU)
        train(optimizer, params, TAU - 1, rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(optimizer, params, 1, math.nan if rank == 1 else rank)
            train(optimizer, params, TAU, rank)
        told = len(caught)
        # Then all of them.
        with (
            pytest.warns(QuarantineWarning),
            pytest.raises(FloatingPointError, match="no worker has finite values"),
        ):
            train(optimizer, params, 2 * TAU, math.nan)
        out[name] = told, optimizer.stats()["quarantined"]
    communicator.close()
    return out


def test_not_a_number_on_one_worker_and_then_on_all():
    for rank, result in enumerate(run(_quarantine, 3)):
        for name, (told, quarantined) in result.items():
            assert told == (rank == 1), name
            assert quarantined == told + 1, name


# The emulated link


def test_link_times():
    link = Link(latency_s=1e-3, bandwidth_gbit_s=1.0)
    assert link.all_reduce_s(10**6, 4) == pytest.approx(2 * 3 * 1e-3 + 2 * 3 / 4 * 8e6 / 1e9)
    assert link.broadcast_s(10**6, 4) == pytest.approx(3 * (1e-3 + 8e6 / 1e9))
    assert link.all_reduce_s(10**6, 1) == 0
    assert Link(0.0, math.inf).all_reduce_s(10**9, 8) == 0


def _plain(rank):
    """What they are for."""
    out = {}
    for op in ("SUM", "MAX", "PRODUCT"):
        x = torch.arange(3.0) + rank + 1
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        out[op] = x
    out["broadcast"] = torch.full((2,), float(rank))
    dist.broadcast(out["broadcast"], src=1)
    return out


def _beside(rank, size):
    """Small collectives beside one that is under way, on the same group."""
    emulate(latency_s=0.02, bandwidth_gbit_s=1.0)
    x = torch.full((1000,), float(rank))
    start = time.monotonic()
    work = dist.all_reduce(x, async_op=True)
    under_way = not work.is_completed() and bool((x == rank).all())
    gathered = [None] * size
    dist.all_gather_object(gathered, rank)
    dist.barrier()
    work.wait()
    return under_way, time.monotonic() - start, float(x[0]), gathered


def _mixed(rank, size):
    """Also when every worker is at another place while the link is at work."""
    emulate(latency_s=0.0005, bandwidth_gbit_s=10.0)
    out = []
    pauses = random.Random(rank)
    for _ in range(20):
        x = torch.full((1000,), float(rank))
        time.sleep(0.003 * pauses.randrange(2))
        work = dist.all_reduce(x, async_op=True)
        time.sleep(0.003 * pauses.randrange(2))
        dist.all_gather(
            everybody := [torch.zeros(1) for _ in range(size)], torch.tensor([float(rank)])
        )
        work.wait()
        out.append((float(x[0]), [float(y) for y in everybody]))
    # Tensors that gloo's thread frees, for which it needs the interpreter, while the next
    # collective starts.
    for _ in range(500):
        dist.all_gather([torch.zeros(1)[:] for _ in range(size)], torch.ones(1)[:])
    return out


def _crossed(rank, size):
    """Rows for everybody, over two groups, in another order on each rank."""
    groups = [dist.new_group() for _ in range(2)]
    emulate(latency_s=0.02, bandwidth_gbit_s=1.0)
    got = [torch.zeros(size, 1000) for _ in groups]
    start = time.monotonic()
    works = [
        dist.all_to_all_single(
            got[i], torch.full((size, 1000), float(rank)), group=groups[i], async_op=True
        )
        for i in ((0, 1) if rank % 2 else (1, 0))
    ]
    for work in works:
        work.wait()
    return time.monotonic() - start, [rows.mean(1).tolist() for rows in got]


def _collectives(rank):
    size = dist.get_world_size()
    out = _plain(rank)
    out["slow"] = _beside(rank, size)
    out["mixed"] = _mixed(rank, size)
    out["crossed"] = _crossed(rank, size)
    emulate(latency_s=0.0, bandwidth_gbit_s=1000.0)
    pair = dist.new_group([0, 1])
    if rank < 2:
        y = torch.ones(1)
        dist.all_reduce(y, group=pair)
        out["pair"] = float(y)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    z = torch.tensor([float(rank)])
    dist.all_reduce(z, group=mesh.get_group("b"))
    out["mesh"] = float(z)
    return out


def test_collectives_on_the_emulated_link():
    predicted = Link(0.02, 1.0).all_reduce_s(4000, 4)
    for rank, result in enumerate(run(_collectives, 4, backend="emulated")):
        parts = [torch.arange(3.0) + r + 1 for r in range(4)]
        assert torch.equal(result["SUM"], sum(parts))
        assert torch.equal(result["MAX"], parts[3])
        assert torch.equal(result["PRODUCT"], parts[0] * parts[1] * parts[2] * parts[3])
        assert torch.equal(result["broadcast"], torch.ones(2))
        under_way, seconds, total, gathered = result["slow"]
        assert under_way
        assert seconds >= predicted
        assert (total, gathered) == (6.0, [0, 1, 2, 3])
        assert result["mixed"] == [(6.0, [0, 1, 2, 3])] * 20
        seconds, got = result["crossed"]
        assert seconds >= 2 * Link(0.02, 1.0).broadcast_s(4000, 4), (
            "one after the other on one cable"
        )
        assert got == [[0.0, 1.0, 2.0, 3.0]] * 2
        assert result.get("pair", 2.0) == 2.0
        assert result["mesh"] == (1.0 if rank < 2 else 5.0)


def _ddp(rank):
    torch.manual_seed(0)
    module = DistributedDataParallel(
        torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
        )
    )
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(rank + 1)
    for _ in range(3):
        module(torch.randn(5, 4)).square().mean().backward()
        sgd.step()
        sgd.zero_grad()
    return [p.detach() for p in module.parameters()]


def test_ddp_over_the_emulated_link_is_ddp_over_gloo():
    gloo, emulated = run(_ddp, 2), run(_ddp, 2, backend="emulated")
    for a, b in zip(gloo[0] + gloo[1], emulated[0] + emulated[1], strict=True):
        assert torch.equal(a, b)


def _methods(rank):
    out, communicator = {}, ProcessGroupCommunicator()
    for name, make in ALGORITHMS.items():
        params = parameters(0, (2, 3), (3,))
        optimizer = make(params, lr=0.1, communicator=communicator, tau=TAU, fragments=2)
        train(optimizer, params, 2 * TAU + 1, rank)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        train(optimizer, params, TAU, rank)
        out[name] = torch.cat([p.detach().reshape(-1) for p in params]), optimizer.stats()["bytes"]
    communicator.close()
    return out


def _rollback(rank):
    params = parameters(0)
    optimizer = CoCoDSGD(params, lr=0.1, momentum=0.9, tau=TAU)
    train(optimizer, params, TAU + 1, rank)
    saved, x = copy.deepcopy(optimizer.state_dict()), params[0].detach().clone()
    emulate(latency_s=0.05, bandwidth_gbit_s=1000.0)
    train(optimizer, params, 2 * TAU - 1, rank)
    expected = params[0].detach().clone()
    # A mean is on its way; meanwhile the old state comes back.
    time.sleep(0.03)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        params[0].copy_(x)
    time.sleep(Link(0.05, 1000.0).all_reduce_s(16, 2) + 0.1)
    train(optimizer, params, 2 * TAU - 1, rank)
    optimizer.close()
    return torch.equal(params[0], expected)


def test_a_mean_on_its_way_does_not_land_in_a_run_that_is_loaded():
    assert run(_rollback, 2, backend="emulated") == [True, True]


@pytest.mark.soak
def test_methods_over_the_emulated_link_are_those_over_gloo():
    for gloo, emulated in zip(run(_methods, 4), run(_methods, 4, backend="emulated"), strict=True):
        for name in ALGORITHMS:
            torch.testing.assert_close(gloo[name], emulated[name])


def _forget(rank):
    """Optimizers that are dropped without close(), some with a mean in flight, on few files."""
    own = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (own + 250, own + 250))
    pairs = dist.new_group([0, 1])
    threads = []
    for i in range(24):
        params = parameters(0.0, (3,))
        # Circles of references, as they come about in a user's program.
        optimizer = OverlapLocalSGD(params, lr=0.1, tau=2, group=pairs if i % 2 else None)
        optimizer.me = optimizer
        train(optimizer, params, 2 + i % 3, rank)
        if rank and i % 4 == 0:
            # At other times on every worker.
            del optimizer
            gc.collect()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    with optimizer.averaged():
        return max(threads[10:]) - max(threads[:10]), params[0].detach().clone()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts files in /proc")
def test_forgotten_optimizers_cost_nothing_in_the_long_run():
    (grown, x), (other_grown, y) = run(_forget, 2)
    assert torch.equal(x, y)
    # A garbage collection more or less, not 6 threads each.
    assert max(grown, other_grown) < 6 * 8
