"""docs/failures.md: every error that its tables show is raised here, and reads as they say."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

import distoptim
from distoptim import LocalSGD
from distoptim.testing.processes import run
from tests.helpers.failures import is_documented, rows


def _model(rank: int = 0) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    module.register_buffer("table", torch.ones(2) * rank)
    return module


def _train(module: nn.Module, optimizer: distoptim.AveragingOptimizer, rank: int, steps: int = 3):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        module(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()


def _made(trained: nn.Module, **options):
    return LocalSGD(trained.parameters(), **{"lr": 0.1, "tau": 2, **options})


def _averaged(optimizer: distoptim.AveragingOptimizer, module: nn.Module | None = None) -> None:
    with optimizer.averaged(module):
        pass


def _buffer_differs(rank):
    module = _model(rank)
    _averaged(_made(module), module)


def _buffer_is_compared(rank):
    module = _model(rank)
    _made(module, module=module, sync_module=False)


def _sparse_differs(rank):
    module = _model()
    module.table = torch.eye(2).to_sparse() * (rank + 1)
    _made(module, module=module)


def _unfrozen(rank):
    module = _model()
    module[0].requires_grad_(False)
    optimizer = _made(module)
    module[0].requires_grad_(True)
    _train(module, optimizer, rank)


def _converted(rank):
    module = _model()
    optimizer = _made(module)
    module.double()
    optimizer.flush()


def _resumed_in_another_order(rank):
    module = _model()
    optimizer = _made(module)
    _train(module, optimizer, rank)
    saved = copy.deepcopy(optimizer.state_dict())
    _made(copy.deepcopy(module)).load_state_dict(saved)


def _two_optimizers(rank):
    module = _model()
    _averaged(_made(module[0]), module)


def _a_copy(rank):
    module = _model()
    _averaged(_made(module), copy.deepcopy(module))


def _fsdp1(rank):
    _made(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))


def _fsdp1_frozen(rank):
    frozen = nn.Linear(2, 2).requires_grad_(False)
    whole = FullyShardedDataParallel(frozen, device_id=torch.device("cpu"))
    module = nn.Sequential(whole, nn.Linear(2, 1))
    LocalSGD(module[1].parameters(), lr=0.1, tau=2, module=module)


def _no_mesh(rank):
    _made(fully_shard(nn.Linear(2, 2)))


def _one_place(rank):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.data = module[0].weight.data
    _made(module)


def _zero(rank):
    inner = ZeroRedundancyOptimizer(_model().parameters(), torch.optim.SGD, lr=0.1)
    LocalSGD(inner, tau=2)


def _meta(rank):
    _made(nn.Linear(2, 2, device="meta"))


def _equal_workers(rank):
    module = _model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(module, _made(module), 0, steps=20)


def _ddp(rank):
    module = _model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(nn.parallel.DistributedDataParallel(module), _made(module), rank)


def _alone_in_a_call(rank):
    module = _model()
    optimizer = _made(module, timeout_s=30)
    if rank:
        optimizer.flush()
    _train(module, optimizer, rank)


def _another_tau(rank):
    _made(_model(), tau=2 + rank)


def _another_order(rank):
    torch.manual_seed(0)
    modules = [nn.Linear(2, 2), nn.Linear(2, 2)]
    made = [_made(module) for module in (modules[::-1] if rank else modules)]
    assert not made


def _refused(rank):
    _made(_model(), tau=2 if rank == 0 else 0)


def _nobody_is_finite(rank):
    module = _model()
    optimizer = _made(module, tau=1)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.average()


def _damaged(rank):
    module = _model()
    optimizer = _made(module)
    saved = optimizer.state_dict()
    saved["distoptim"]["step"] += rank
    optimizer.load_state_dict(saved)


def _another_algorithm(rank):
    module = _model()
    saved = _made(module).state_dict()
    distoptim.EASGD(module.parameters(), lr=0.1, tau=2).load_state_dict(saved)


def _late(rank):
    """Rank 1 comes when rank 0 has given up."""
    module = _model()
    optimizer = _made(module, timeout_s=0.5)
    time.sleep(1.5 * rank)
    _train(module, optimizer, rank)


def _not_made(rank):
    time.sleep(1.5 * rank)
    _made(_model(), timeout_s=0.5)


def _unlike_ends(rank):
    module = _model()
    optimizer = _made(module, timeout_s=30, tau=4)
    _train(module, optimizer, rank, steps=3 - rank)
    optimizer.close()


def _samples_on_one(rank):
    module = _model()
    optimizer = _made(module, timeout_s=30)
    for _ in range(2):
        optimizer.average(samples=0.5 if rank else None)


def _unfrozen_on_one(rank):
    module = _model()
    module[0].requires_grad_(False)
    optimizer = _made(module, module=module, timeout_s=30)
    module[0].requires_grad_(bool(rank))
    _train(module, optimizer, rank)


def _other_rates(rank):
    module = _model()
    _train(module, distoptim.SlowMo(module.parameters(), lr=0.1 / (1 + rank), tau=2), rank)


def _no_state(rank):
    _made(_model()).load_state_dict(None)


def _others_residual(rank):
    module = _model()
    optimizer = _made(module, codec="int8+ef")
    files = [None] * 2
    dist.all_gather_object(files, optimizer.state_dict())
    optimizer.load_state_dict(files[1 - rank])


def _others_shard(rank):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    weight = distribute_tensor(torch.ones(2, 2), mesh["shard"], [Shard(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = LocalSGD([nn.Parameter(weight)], lr=0.1, tau=2, device_mesh=mesh)
    files = [None] * 2
    dist.all_gather_object(files, optimizer.state_dict())
    optimizer.load_state_dict(files[1 - rank])


FAULTS: list[Callable[[int], object]] = [
    _buffer_differs,
    _buffer_is_compared,
    _sparse_differs,
    _unfrozen,
    _converted,
    _resumed_in_another_order,
    _two_optimizers,
    _a_copy,
    _fsdp1,
    _fsdp1_frozen,
    _no_mesh,
    _one_place,
    _zero,
    _meta,
    _equal_workers,
    _ddp,
    _alone_in_a_call,
    _refused,
    _nobody_is_finite,
    _another_tau,
    _another_order,
    _damaged,
    _another_algorithm,
    _late,
    _not_made,
    _unlike_ends,
    _samples_on_one,
    _unfrozen_on_one,
    _other_rates,
    _no_state,
    _others_residual,
    _others_shard,
]


def _texts(rank: int) -> dict[str, str]:
    """By fault, what this worker has been told."""
    return {fault.__name__: _told(fault, rank) for fault in FAULTS}


def _told(fault: Callable[[int], object], rank: int) -> str:
    try:
        fault(rank)
    except (ValueError, ArithmeticError, distoptim.CommunicationError, RuntimeWarning) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    """Of each worker, what it was told by fault; and of a process that forgot the process group."""
    told = run(_texts, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="torchrun started 2 processes") as caught:
            _made(_model())
    for of_worker in told:
        of_worker["no process group"] = str(caught.value)
    return told


def test_every_fault_is_told_to_all_workers_as_the_page_says(texts):
    for told in texts:
        for fault, text in told.items():
            assert is_documented(text), f"{fault}: no row says {text}"


@pytest.mark.parametrize("row", rows())
def test_every_row_is_raised(row, texts):
    assert any(is_documented(text, [row]) for told in texts for text in told.values())
