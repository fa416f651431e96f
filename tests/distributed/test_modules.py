"""Modules on real workers: what is made equal at the start, averaged, left alone, and refused."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import distoptim
from distoptim import ALGORITHMS, LocalSGD
from distoptim.comm import SingleWorker
from distoptim.comm.mesh import local
from distoptim.testing.processes import run
from tests.helpers.failures import documented, is_documented
from tests.helpers.share import share


class Features(nn.Module):
    """Random features, a frozen layer, both kinds of spectral norm, batch norm, masks."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("frequencies", torch.randn(2, 6))
        self.register_buffer("wide", torch.randn(1).expand(4))
        self.register_buffer("brief", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("float8", torch.randn(3).to(torch.float8_e4m3fn))
        self.register_buffer("flags", torch.rand(5) > 0.5)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("nan", torch.tensor(float("nan")))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        with torch.inference_mode():
            self.register_buffer("inference", torch.ones(3) * seed)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.first = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.second = hooked_spectral_norm(nn.Linear(6, 6))
        self.out = nn.Linear(6, 1)

    def forward(self, x):
        x = self.norm(self.frozen(torch.cos(x @ self.frequencies)))
        return self.out(self.second(self.first(x)))


OWN = ("first.parametrizations.weight.0._u", "first.parametrizations.weight.0._v")
OWN += ("second.weight_u", "second.weight_v")


def state(module):
    """All tensors, as what all can be compared by."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: (t.to_dense() if t.layout != torch.strided else t).detach().to(torch.float64).clone()
        for name, t in tensors.items()
    }


def everybody(value):
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def train(module, optimizers, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        module(torch.randn(8, 2, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
            optimizer.average()


def same(a, b):
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def _start(rank):
    out = {}
    for name, options in {
        "module": lambda m: {"module": m},
        "two modules": lambda m: {"module": [nn.Sequential(m.frozen, m.out), m]},
        "no module": lambda m: {},
    }.items():
        module = Features(rank)
        optimizer = LocalSGD(module.parameters(), lr=0.1, tau=2, **options(module))
        out[name] = state(module)
        optimizer.close()
    out["refused"] = []
    for options in (
        {"sync_module": False},
        {"sync_module": False, "fragments": 3, "codec": "int8"},
    ):
        module = Features(rank)
        with documented("workers disagree on") as caught:
            LocalSGD(module.parameters(), lr=0.1, tau=4, module=module, **options)
        out["refused"].append(str(caught.value))
    # Equal ones pass.
    module = Features(0)
    LocalSGD(module.parameters(), lr=0.1, tau=2, module=module, sync_module=False).close()
    return out


def test_buffers_and_frozen_parameters_are_made_equal_at_the_start():
    results = run(_start, 3)
    first = state(Features(0))
    for rank, result in enumerate(results):
        local = state(Features(rank))
        for name, value in first.items():
            for way in ("module", "two modules"):
                expected = local[name] if name in OWN else value
                assert same(result[way][name], expected), (rank, way, name)
            is_buffer = name in dict(Features(0).named_buffers())
            assert same(result["no module"][name], local[name] if is_buffer else value), name
        assert all("'frequencies': rank 0 and rank 1 hold" in text for text in result["refused"])


def _cannot(rank):
    module = nn.Linear(2, 2)
    module.register_buffer("adjacency", (torch.eye(2) * (rank + 1)).to_sparse())
    with documented(r"'adjacency' differs between workers and is a .*sparse"):
        LocalSGD(module.parameters(), lr=0.1, tau=2, module=module)
    distoptim.local(module, "adjacency")
    LocalSGD(module.parameters(), lr=0.1, tau=2, module=module).close()
    shapes = nn.Linear(2, 2)
    shapes.register_buffer("cache", torch.ones(2 + rank))
    with pytest.raises(ValueError, match="disagree on buffers and frozen parameters"):
        LocalSGD(shapes.parameters(), lr=0.1, tau=2, module=shapes)
    with pytest.raises(ValueError, match="buffers and frozen parameters"):
        LocalSGD(shapes.parameters(), lr=0.1, tau=2, module=None if rank else shapes)
    return True


def test_what_cannot_be_made_equal_is_refused_by_all():
    assert all(run(_cannot, 2))


def _averaged(rank, codec, fragments):
    for algorithm in ALGORITHMS.values():
        module = Features(rank)
        optimizer = algorithm(
            module.parameters(), lr=0.01, tau=4, fragments=fragments, codec=codec, module=module
        )
        train(module, [optimizer], 7, rank)
        module.eval()
        before = state(module)
        with optimizer.averaged(module), torch.no_grad():
            inside = state(module)
            module(torch.ones(2, 2))
            for layer in (module.first, module.second):
                norm = torch.linalg.matrix_norm(layer.weight, 2).item()
                assert norm == pytest.approx(1, abs=0.02)
        after = state(module)
        all_before = everybody(before)
        assert not same(all_before[0]["norm.running_mean"], all_before[1]["norm.running_mean"])
        assert not same(all_before[0]["out.weight"], all_before[1]["out.weight"])
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        for name, value in before.items():
            assert same(after[name], value), name
            if name in trained or name in ("norm.running_mean", "norm.running_var"):
                mean = sum(x[name] for x in all_before) / 2
                torch.testing.assert_close(inside[name], mean, rtol=1e-5, atol=1e-6)
            elif name not in OWN:
                assert same(inside[name], value), name
        optimizer.close()
    return True


@pytest.mark.parametrize(("codec", "fragments"), [(None, 1), ("int8", 3)])
def test_statistics_are_averaged_and_the_rest_is_left_alone(codec, fragments):
    assert all(run(_averaged, 2, codec, fragments))


class Counter(nn.Module):
    """Buffers that follow the worker's data, of which nobody knows the meaning."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1))
        self.layer = nn.Linear(2, 1)


def _declared(rank):
    module = Counter()
    optimizer = LocalSGD(module.parameters(), lr=0.1, tau=2, module=module)
    module.total += 10 + rank
    module.cache += rank
    refused = []
    for declare, name in ((distoptim.statistics, "total"), (distoptim.local, "cache")):
        with documented("is neither a statistic") as caught, optimizer.averaged(module):
            pass
        refused.append(str(caught.value))
        declare(module, name)
    with optimizer.averaged(module):
        assert module.total.item() == 10.5
        assert module.cache.item() == rank
    assert module.total.item() == 10 + rank
    # A frozen copy as it follows the worker.
    module.teacher = copy.deepcopy(module.layer).requires_grad_(False)
    with torch.no_grad():
        module.teacher.bias.fill_(rank)
    distoptim.statistics(module.teacher)
    with optimizer.averaged(module):
        assert module.teacher.bias.item() == 0.5
    return refused


def test_what_nobody_knows_is_refused_until_it_is_declared():
    for refused in run(_declared, 2):
        for text, name in zip(refused, ("total", "cache"), strict=True):
            assert f"'{name}' differs between rank 0 and rank 1" in text
            assert f"distoptim.local(model, '{name}')" in text
            assert "module=model" in text


def _several(rank):
    return all(_several_in(rank, fragments) for fragments in (1, 3))


def _several_in(rank, fragments):
    module = Features(rank)
    params = [p for p in module.parameters() if p.requires_grad]
    first = LocalSGD(
        torch.optim.SGD(params[:3], lr=0.1), tau=50, fragments=fragments, module=module
    )
    second = distoptim.OverlapLocalSGD(torch.optim.AdamW(params[3:], lr=0.1), tau=50)
    train(module, [first, second], 3, rank)
    missing = next(n for n, p in module.named_parameters() if p is params[3])
    with documented(re.escape(f"{missing!r} is trained and is not")), first.averaged(module):
        pass
    before = everybody(state(module))
    # In another order on the other worker.
    both = [first, second][:: 1 - 2 * rank]
    with distoptim.averaged(module, *both):
        inside = state(module)
        for optimizer in (first, second):
            with pytest.raises(RuntimeError, match=r"inside averaged"):
                optimizer.step()
    for name, p in module.named_parameters():
        if p.requires_grad:
            mean = (before[0][name] + before[1][name]) / 2
            torch.testing.assert_close(inside[name], mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(p.detach().to(torch.float64), before[rank][name])
    distoptim.consolidate(module, *both)
    after = everybody(state(module))
    for name, p in module.named_parameters():
        if p.requires_grad:
            mean = (before[0][name] + before[1][name]) / 2
            torch.testing.assert_close(after[rank][name], mean, rtol=1e-5, atol=1e-6)
            assert same(after[0][name], after[1][name])
    # What is a worker's own may be trained by nobody's optimizer.
    distoptim.local(module, [n for n, p in module.named_parameters() if p in set(params[3:])])
    with first.averaged(module):
        pass
    return True


def test_several_optimizers_over_one_model():
    assert all(run(_several, 2))


def _copies(rank):
    module = nn.Linear(2, 2)
    optimizer = LocalSGD(module.parameters(), lr=0.1, tau=50)
    with torch.no_grad():
        module.bias.fill_(rank)
    average = torch.optim.swa_utils.AveragedModel(module)
    frozen = copy.deepcopy(module).requires_grad_(False)
    for other in (average, frozen):
        with documented("none of its parameters is this optimizer's"), optimizer.averaged(other):
            pass
        with documented("none of its parameters is this optimizer's"):
            LocalSGD(module.parameters(), lr=0.1, tau=50, module=other)
    # The remedies that the error names.
    with optimizer.averaged(module):
        frozen.load_state_dict(module.state_dict())
        average.update_parameters(module)
    assert frozen.bias.tolist() == average.module.bias.tolist() == [0.5, 0.5]
    return True


def test_copies_are_refused_with_what_to_do():
    assert all(run(_copies, 2))


def _resumed(rank):
    for algorithm, options in (
        *((algorithm, {}) for algorithm in ALGORITHMS.values()),
        (distoptim.OverlapLocalSGD, {"fragments": 2, "codec": "int8"}),
    ):
        make = partial(algorithm, lr=0.1, tau=4, **options)
        module = nn.Linear(2, 2)
        optimizer = make(module.parameters())
        train(module, [optimizer], 6, rank)
        saved = copy.deepcopy(optimizer.state_dict())
        again = copy.deepcopy(module)
        late = make(again.parameters())
        with documented("parameters were loaded before the optimizer was made"):
            late.load_state_dict(saved)
        # As the error says.
        again.load_state_dict(module.state_dict())
        late.load_state_dict(saved)
        train(again, [late], 5, rank)
        train(module, [optimizer], 5, rank)
        assert all(map(torch.equal, state(again).values(), state(module).values()))
        # The state that was saved before the first step is no such case.
        fresh = nn.Linear(2, 2)
        optimizer = make(fresh.parameters())
        first = copy.deepcopy(optimizer.state_dict())
        train(fresh, [optimizer], 2, rank)
        optimizer.load_state_dict(first)
        late.close()
        optimizer.close()
    return True


def test_loading_in_another_order_is_refused_by_all():
    assert all(run(_resumed, 2))


def _sharded(rank):
    for original in (False, True):
        torch.manual_seed(0)
        whole = FullyShardedDataParallel(
            nn.Linear(4, 4, bias=False), device_id=torch.device("cpu"), use_orig_params=original
        )
        with documented("FSDP1"):
            LocalSGD(torch.optim.SGD(whole.parameters(), lr=0.1), tau=4)
        # Where only a head is trained, what is frozen would be overwritten by rank 0's shard.
        whole.requires_grad_(False)
        _frozen_shards_are_refused(whole, "FSDP1")
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    with documented("ZeroRedundancyOptimizer"):
        LocalSGD(ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=1.0), tau=4)
    whole = nn.Linear(4, 4, bias=False).requires_grad_(False)
    fully_shard(whole)
    _frozen_shards_are_refused(whole, "a parameter is a DTensor, whose shards lie on several")
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Module()
    whole.register_buffer("table", distribute_tensor(torch.randn(2, 2), mesh, [Shard(0)]))
    _frozen_shards_are_refused(whole, "a parameter is a DTensor, whose shards lie on several")
    return True


def _frozen_shards_are_refused(whole, match):
    module = nn.Sequential(whole, nn.Linear(4, 1))
    before = [local(x).clone() for x in (*whole.parameters(), *whole.buffers())]
    trained = module[1].parameters()
    ways = [{"params": trained, "module": module}]
    if list(whole.parameters()):
        ways.append({"params": module.parameters()})
    for way in ways:
        with documented(match):
            LocalSGD(**way, lr=0.1, tau=4)
    after = [local(x) for x in (*whole.parameters(), *whole.buffers())]
    assert all(map(torch.equal, before, after))


def test_shards_of_one_model_are_refused():
    assert all(run(_sharded, 2))


def _islands(rank):
    """Two islands of two ranks: each rank compares and equalises with its like."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = Features(rank // 2)
    del module.sparse, module.float8, module.inference, module.wide  # which DDP cannot broadcast
    wrapped = nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group("shard"))
    optimizer = LocalSGD(module.parameters(), lr=0.01, tau=2, device_mesh=mesh, module=wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="DistributedDataParallel is around")
        train(wrapped, [optimizer], 5, rank)
    with optimizer.averaged(wrapped):
        return state(module)


def test_islands_hold_one_model_inside_averaged():
    results = run(_islands, 4)
    for name, value in results[0].items():
        if name not in OWN and "num_batches" not in name:
            # Of batch norm each rank of an island has statistics of its own.
            for other in results[2::2] if "running" in name else results[1:]:
                torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_under_torchrun_without_a_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parameters = [nn.Parameter(torch.zeros(2))]
    with documented(r"torchrun started 2 processes \(WORLD_SIZE\)"):
        LocalSGD(parameters, lr=0.1, tau=2)
    # Of which the rule does not depend on the number of workers.
    with documented(r"torchrun started 2 processes \(WORLD_SIZE\)"):
        distoptim.OverlapLocalSGD(parameters, lr=0.1, tau=2)
    LocalSGD(parameters, lr=0.1, tau=2, communicator=SingleWorker()).close()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.warns(RuntimeWarning, match="one worker"):
        LocalSGD(parameters, lr=0.1, tau=2)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (partial(torch.zeros, 2, device="meta"), "it is on the meta device"),
        (lambda: torch.zeros(1).expand(8), r"it is expanded to \[8\]"),
        (lambda: torch.zeros(2, dtype=torch.float8_e4m3fn), "it is of dtype torch.float8_e4m3fn"),
    ],
)
def test_parameters_that_cannot_be_averaged_are_refused(tensor, why):
    with documented(f"cannot average a parameter: {why}"):
        LocalSGD(torch.optim.SGD([nn.Parameter(tensor())], lr=0.1), tau=2)


def test_parameters_in_one_place_in_memory_are_refused():
    memory = torch.zeros(12)
    apart = [memory[:5], memory[5:9].view(2, 2), memory[9:9], memory[9:], torch.zeros(4, 4)[:, :2]]
    tied = nn.Linear(2, 2)
    for overlapping in ([memory[:5], memory[4:]], [tied.weight.data, tied.weight.data]):
        with documented("it lies in the memory of another one"):
            LocalSGD([nn.Parameter(x) for x in overlapping], lr=0.1, tau=2)
    with pytest.warns(RuntimeWarning, match="one worker"):
        LocalSGD([nn.Parameter(x) for x in apart], lr=0.1, tau=2)


def test_an_optimizer_around_another_that_is_none_itself_is_refused():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    around = PostLocalSGDOptimizer(inner, PeriodicModelAverager.__new__(PeriodicModelAverager))
    with pytest.raises(ValueError, match="PostLocalSGDOptimizer has no defaults"):
        LocalSGD(around, tau=2)


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match="cannot average a parameter: it is not initialised"):
        LocalSGD(torch.optim.SGD(nn.LazyLinear(2).parameters(), lr=0.1), tau=2)


@pytest.mark.parametrize("module", [3, "model", [nn.Linear(2, 2), None]])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(ValueError, match=r"module=.*: allowed is a torch.nn.Module"):
        LocalSGD(nn.Linear(2, 2).parameters(), lr=0.1, tau=2, module=module)


def _alike(rank, algorithm, codec, fragments, way):
    """The warnings of ten rounds."""
    torch.manual_seed(0)
    module = nn.Linear(4, 300)
    outer = nn.parallel.DistributedDataParallel(module) if way.startswith("ddp") else module
    if way == "ddp, own gradients":
        outer.register_comm_hook(None, noop_hook)
    generator = torch.Generator().manual_seed(0 if way == "data" else rank)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = ALGORITHMS[algorithm](
            module.parameters(), lr=0.01, tau=4, fragments=fragments, codec=codec
        )
        for _ in range(40):
            x = torch.randn(8, 4, generator=generator)
            if way != "nothing":
                with outer.no_sync() if way == "ddp, no sync" else nullcontext():
                    outer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.average()
        optimizer.close()
    return [str(w.message) for w in told if "equal" in str(w.message)]


@pytest.mark.parametrize(
    ("algorithms", "workers", "codec", "fragments"),
    [
        (["local-sgd", "overlap-local-sgd"], 2, None, 1),
        (["diloco", "easgd"], 2, "2bit+ef", 1),
        (share(ALGORITHMS, of=7), 3, "int8", 2),
    ],
)
def test_equal_workers_are_told_once_that_nothing_is_gained(algorithms, workers, codec, fragments):
    for told in run(_of_each, workers, algorithms, codec, fragments):
        for (algorithm, way), messages in told.items():
            expected = 1 if way in ("ddp", "data") else 0
            assert len(messages) == expected, (algorithm, way)
            assert all(map(is_documented, messages))
            assert all(
                text.startswith("DistributedDataParallel") == (way == "ddp") for text in messages
            )


def _of_each(rank, algorithms, codec, fragments):
    cases = [(name, way) for name in algorithms for way in ("data", "different")]
    cases += [("overlap-local-sgd", "ddp"), ("local-sgd", "ddp, no sync")]
    cases += [("local-sgd", "ddp, own gradients"), ("local-sgd", "nothing"), ("diloco", "nothing")]
    return {case: _alike(rank, case[0], codec, fragments, case[1]) for case in cases}


def _alone_and_in_an_island(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    module = nn.Linear(4, 1)
    wrapped = nn.parallel.DistributedDataParallel(module)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = LocalSGD(module.parameters(), lr=0.01, tau=2, device_mesh=mesh)
        for _ in range(20):
            wrapped(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.average()
    return [str(w.message) for w in told if "equal" in str(w.message)]


def test_one_worker_of_several_ranks_is_told_nothing():
    assert run(_alone_and_in_an_island, 2) == [[], []]
