"""Workers that are groups of ranks.

DDP and FSDP2 islands over real gloo processes, and what is refused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distoptim
from distoptim import LocalSGD, OverlapLocalSGD, QuarantineWarning, SlowMo
from distoptim.comm import SingleWorker
from distoptim.periods import AdaComm
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from tests.helpers.marks import fsdp

STEPS, BATCH = 10, 4
EXAMPLE = Path(__file__).parents[2] / "examples" / "islands.py"


class OnCopies(torch.optim.Optimizer):
    """SGD that steps on copies of the parameters, and writes them over these."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            copied = self.state[p].setdefault("copy", p.detach().clone())
            copied.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.copy_(copied)


def on_copies(params, **options):
    inner = OnCopies(params, lr=0.1)
    distoptim.copies(inner, "copy")
    return OverlapLocalSGD(inner, tau=2, **options)


METHODS = {
    "local-sgd": lambda p, **o: LocalSGD(p, lr=0.1, momentum=0.9, tau=3, **o),
    "slowmo-fragments": lambda p, **o: SlowMo(p, lr=0.1, tau=4, fragments=2, **o),
    "overlap": lambda p, **o: OverlapLocalSGD(p, lr=0.1, momentum=0.9, tau=2, **o),
    "adamw-late": lambda p, **o: LocalSGD(torch.optim.AdamW(p, lr=0.05), tau=4, delay=2, **o),
    "copies": on_copies,
}


def network(island: int) -> torch.nn.Module:
    # On two ranks five rows make shards of three and two, one row shards of one and none.
    torch.manual_seed(island)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).double()


def batch(island: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an island sees in one step: twice a rank's batch."""
    generator = torch.Generator().manual_seed(100 * step + island)
    data = torch.randn(2 * BATCH, 3, generator=generator, dtype=torch.float64)
    return data, data.sum(1, keepdim=True).sin() + island


def train(model, optimizer, island, part=None, steps=STEPS):
    """Some steps.

    `part` is the share of the island's batch that this rank sees, all where it is None.
    """
    for step in range(steps):
        data, label = batch(island, step)
        if part is not None:
            data, label = data.chunk(2)[part], label.chunk(2)[part]
        torch.nn.functional.mse_loss(model(data), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()


def mesh_2d() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh)
    # What the root itself holds stays gathered after a forward pass.
    return fully_shard(model, mesh=mesh)


def whole(model) -> torch.Tensor:
    return torch.cat(
        [
            getattr(p, "full_tensor", lambda p=p: p)().detach().reshape(-1)
            for p in model.parameters()
        ]
    )


def _plain(rank):
    """Two workers, each with an island's whole batch.

    Parameters at the end, outputs of the mean.
    """
    out = {}
    for name, make in METHODS.items():
        model = network(rank)
        optimizer = make(model.parameters())
        train(model, optimizer, rank)
        with optimizer.averaged(model), torch.no_grad():
            mean = model(torch.ones(1, 3, dtype=torch.float64)).item()
        out[name] = whole(model), mean, optimizer.consensus_distance()
        optimizer.close()
    return out


def _sharded(rank, hybrid):
    mesh, inner, out = mesh_2d(), "shard", {}
    if hybrid:
        mesh, inner = (
            init_device_mesh(
                "cpu", (2, 2, 1), mesh_dim_names=("island", "dp_replicate", "dp_shard")
            ),
            ("dp_replicate", "dp_shard"),
        )
    island, part = divmod(rank, 2)
    for name, make in METHODS.items():
        model = shard(network(island), mesh[inner])
        if hybrid:
            with pytest.raises(ValueError, match="share DTensors with this rank"):
                make(model.parameters(), device_mesh=mesh)
        optimizer = make(model.parameters(), device_mesh=mesh["island"] if hybrid else mesh, size=2)
        pointers = [p.to_local().data_ptr() for p in model.parameters()]
        train(model, optimizer, island, part)
        assert [p.to_local().data_ptr() for p in model.parameters()] == pointers
        one = torch.ones(1, 3, dtype=torch.float64)
        with torch.no_grad():
            before = model(one).item()
            with optimizer.averaged(model):
                mean = model(one).item()
            assert model(one).item() == before != mean
        for m in model.modules():
            getattr(m, "reshard", lambda: None)()
        out[name] = whole(model), mean, optimizer.consensus_distance()
        optimizer.close()
    return out


def _ddp(rank):
    mesh, out = mesh_2d(), {}
    island, part = divmod(rank, 2)
    for name, make in METHODS.items():
        model = torch.nn.parallel.DistributedDataParallel(
            network(island), process_group=mesh.get_group("shard")
        )
        optimizer = make(model.parameters(), device_mesh=mesh["replicate"])
        train(model, optimizer, island, part)
        out[name] = whole(model)
        optimizer.close()
    return out


@pytest.fixture(scope="module")
def plain():
    return run(_plain, 2)


@fsdp
@pytest.mark.parametrize(
    "hybrid",
    [pytest.param(False, id="FSDP2"), pytest.param(True, id="HSDP", marks=pytest.mark.soak)],
)
def test_two_fsdp_islands_equal_two_workers_with_twice_the_batch(plain, hybrid):
    results = run(_sharded, 4, hybrid)
    for rank, result in enumerate(results):
        for name, (x, mean, _) in result.items():
            expected, expected_mean, _ = plain[rank // 2][name]
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-12, msg=name)
            assert mean == pytest.approx(expected_mean, abs=1e-12), name
    for name, (_, _, distance) in plain[0].items():
        shards = [results[rank][name][2] for rank in ((0,) if hybrid else (0, 1))]
        assert sum(d**2 for d in shards) ** 0.5 == pytest.approx(distance), name


def test_two_ddp_islands_equal_two_workers_with_twice_the_batch(plain):
    for rank, result in enumerate(run(_ddp, 4)):
        for name, x in result.items():
            torch.testing.assert_close(x, plain[rank // 2][name][0], rtol=0, atol=1e-12, msg=name)


def _quarantine(rank):
    mesh = mesh_2d()
    out = {}
    for name, make in METHODS.items():
        model = shard(network(rank // 2), mesh["shard"])
        optimizer = make(model.parameters(), device_mesh=mesh)
        train(model, optimizer, rank // 2, rank % 2, steps=5)
        if rank == 1:
            with torch.no_grad():
                next(model.parameters()).to_local().fill_(torch.nan)
        warned = (
            pytest.warns(QuarantineWarning, match="not finite")
            if rank < 2
            else contextlib.nullcontext()
        )
        with warned:
            optimizer.flush()
        with optimizer.averaged(model):
            mean = whole(model)
        out[name] = whole(model), mean, optimizer.stats()["quarantined"]
        optimizer.close()
    return out


@fsdp
def test_a_nan_in_one_shard_takes_the_whole_island_out():
    results = run(_quarantine, 4)
    for name in METHODS:
        quarantined = [result[name][2] for result in results]
        assert quarantined[0] == quarantined[1] > 0 == quarantined[2] == quarantined[3], name
        assert all(result[name][1].isfinite().all() for result in results), name
        # Both ranks of an island see one model.
        assert all(torch.equal(results[i][name][0], results[i + 1][name][0]) for i in (0, 2)), name
    # Local SGD goes on from the other island alone.
    assert torch.equal(results[0]["local-sgd"][0], results[2]["local-sgd"][0])


def _saved(rank):
    mesh = mesh_2d()
    out = []
    for resume in (False, True):
        model = shard(network(rank // 2), mesh["shard"])
        optimizer = METHODS["overlap"](model.parameters(), device_mesh=mesh)
        train(model, optimizer, rank // 2, rank % 2, steps=3)
        if resume:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            optimizer.close()
            model = shard(network(5), mesh["shard"])
            optimizer = METHODS["overlap"](model.parameters(), device_mesh=mesh)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, rank // 2, rank % 2, steps=4)
        out.append(whole(model))
        optimizer.close()
    return out


@fsdp
def test_an_fsdp_island_resumes_in_flight_bit_for_bit():
    for stopped, resumed in run(_saved, 4):
        assert torch.equal(stopped, resumed)


def _permuted(rank):
    """The ranks of both islands have taken each other's files, whose shards are of equal shapes."""
    mesh = mesh_2d()
    model = shard(torch.nn.Sequential(torch.nn.Linear(4, 4)), mesh["shard"])
    optimizer = LocalSGD(model.parameters(), lr=0.1, tau=2, device_mesh=mesh)
    files = [None] * 4
    dist.all_gather_object(files, optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of the shards at .* each rank loads its own file"):
        optimizer.load_state_dict(files[rank ^ 1])
    optimizer.load_state_dict(files[rank])
    optimizer.close()


@fsdp
def test_files_of_other_shards_are_refused():
    run(_permuted, 4)


def _apart(rank):
    """An island, or one shard of all islands, is a round ahead of the others."""
    mesh = mesh_2d()
    out = []
    for ahead in ((2, 3), (1, 3)):
        model = shard(network(rank // 2), mesh["shard"])
        optimizer = METHODS["overlap"](model.parameters(), device_mesh=mesh)
        states = []
        for steps in (3, 2):
            train(model, optimizer, rank // 2, rank % 2, steps=steps)
            states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        saved = states[rank in ahead]
        optimizer.close()
        model = shard(network(5), mesh["shard"])
        optimizer = METHODS["overlap"](model.parameters(), device_mesh=mesh)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        loaded = whole(model)
        train(model, optimizer, rank // 2, rank % 2, steps=4)
        with optimizer.averaged(model):
            out.append((inspect(optimizer).step, loaded, whole(model)))
        optimizer.close()
    return out


@fsdp
def test_islands_that_are_a_round_apart_resume_together():
    for case in zip(*run(_apart, 4), strict=True):
        steps, loaded, means = zip(*case, strict=True)
        assert steps == (9, 9, 9, 9)
        for x in (loaded, means):
            assert all(torch.equal(x[0], other) for other in x)
        assert means[0].isfinite().all()


def _refused(rank):
    mesh = mesh_2d()
    model = shard(network(0), mesh["shard"])
    plain = list(network(0).parameters())
    everywhere = init_device_mesh("cpu", (4,))
    unnamed = init_device_mesh("cpu", (2, 2))
    sharded = partial(LocalSGD, list(model.parameters()), lr=0.1, tau=2)
    follows = partial(LocalSGD, list(model.parameters()), lr=0.1, tau=AdaComm(2))
    cases = [
        (
            follows,
            {"device_mesh": mesh},
            "tau follows loss and lr: each rank of an island would choose",
        ),
        (sharded, {}, "DTensor, whose shards lie on several ranks"),
        (
            sharded,
            {"group": dist.group.WORLD},
            rf"ranks \[{rank ^ 1}\] share DTensors with this rank",
        ),
        (sharded, {"device_mesh": mesh["shard"]}, "ranks of other islands"),
        (sharded, {"device_mesh": everywhere}, "ranks of other islands"),
        (
            partial(LocalSGD, plain, tau=2),
            {"device_mesh": unnamed},
            "dimensions .*: allowed is one dimension",
        ),
        (
            partial(LocalSGD, plain, tau=2),
            {"device_mesh": "replicate"},
            "allowed is a torch.distributed DeviceMesh",
        ),
        (
            partial(LocalSGD, plain, tau=2),
            {"device_mesh": mesh, "group": dist.group.WORLD},
            "give one",
        ),
        (
            partial(LocalSGD, plain, tau=2),
            {"device_mesh": mesh, "communicator": SingleWorker()},
            "give one",
        ),
        (
            partial(LocalSGD, plain, tau=2),
            {"group": dist.group.WORLD, "communicator": SingleWorker()},
            "give one",
        ),
        (sharded, {"device_mesh": mesh, "size": 4}, "size=4, but the process group has 2 workers"),
    ]
    for make, options, message in cases:
        with pytest.raises(ValueError, match=message):
            make(**options)
    # Rank 1 disagrees with rank 0 of its island and with rank 3, of which it holds the same shard.
    with pytest.raises(ValueError, match="disagree on tau: rank 0 has 2, rank 1 has 3"):
        LocalSGD(model.parameters(), lr=0.1, tau=3 if rank == 1 else 2, device_mesh=mesh)
    with pytest.raises(
        ValueError, match="^tau=0" if rank == 1 else "^rank 1 was refused its arguments: tau=0"
    ):
        LocalSGD(model.parameters(), lr=0.1, tau=0 if rank == 1 else 2, device_mesh=mesh)
    # Two parameters of one shape in another order: seen where torch knows the names.
    named = [("a", torch.nn.Parameter(torch.ones(2))), ("b", torch.nn.Parameter(torch.ones(2)))]
    with pytest.raises(
        ValueError, match=r"names of parameters: rank 0 has .*'a', 'b'.*, rank 1 has .*'b', 'a'"
    ):
        LocalSGD(named[:: -1 if rank == 1 else 1], lr=0.1, tau=2)


def test_what_cannot_be_averaged_is_refused():
    run(_refused, 4)


def test_torch_distributed_checkpoint_carries_the_inner_state_and_starts_a_new_run():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(3, 2)
    first, second = [
        OverlapLocalSGD(torch.optim.AdamW(model.parameters()), tau=2, communicator=SingleWorker())
        for _ in range(2)
    ]
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        first.step()
        first.zero_grad()
        first.average()
    set_optimizer_state_dict(model, second, get_optimizer_state_dict(model, first))
    for p in model.parameters():
        assert all(
            torch.equal(first.state[p][key], value) for key, value in second.state[p].items()
        )
        assert second.state[p]["step"] == 3
    assert second.stats()["steps"] == 0


def _example(rank):
    train = runpy.run_path(str(EXAMPLE))["train"]
    return [train(kind, 30) for kind in ("ddp", "fsdp2")]


@fsdp
def test_the_example_learns_and_ddp_and_fsdp_islands_are_one_thing():
    results = run(_example, 4)
    assert all(result == results[0] for result in results)
    for before, after in results[0]:
        assert after < 0.9 * before
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-4)
