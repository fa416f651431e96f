"""CUDA parameters: over NCCL, and over gloo by way of pinned host memory. One GPU is enough.

Workers share it.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from distoptim import ALGORITHMS, OverlapLocalSGD, QuarantineWarning
from distoptim.comm import ProcessGroupCommunicator, SingleWorker
from distoptim.testing.processes import run
from tests.helpers import toy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 3 * toy.TAU


def trajectory(rank, make, device, communicator, sick=False):
    params = [torch.nn.Parameter(p.to(device)) for p in toy.start()]
    optimizer = make(params, communicator=communicator)
    out = []
    for step in range(STEPS):
        gradients = toy.gradient(rank, [p.detach().cpu() for p in params])
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to(device) * (math.nan if sick and rank == 1 and step == toy.TAU - 1 else 1)
        optimizer.step()
        optimizer.average()
        out.append(torch.cat([p.detach().reshape(-1).cpu() for p in params]))
    with optimizer.averaged():
        out.append(torch.cat([p.detach().reshape(-1).cpu() for p in params]))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    return torch.stack(out), optimizer.stats()


def _parity(rank):
    communicator = ProcessGroupCommunicator()
    # A group of NCCL has no CPU side.
    reference = communicator if communicator.size > 1 else SingleWorker()
    for name, make in toy.variants().items():
        on_gpu, stats = trajectory(rank, make, "cuda", communicator)
        on_cpu, _ = trajectory(rank, make, "cpu", reference)
        torch.testing.assert_close(
            on_gpu, on_cpu, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert stats["exposed_s"] >= 0
        assert stats["syncs"] > 0
    communicator.close()
    return True


@pytest.mark.parametrize(("backend", "workers"), [("nccl", 1), ("gloo", 2)])
def test_gpu_equals_cpu(backend, workers):
    assert all(run(_parity, workers, backend=backend))


def _offloaded(rank):
    communicator = ProcessGroupCommunicator()
    for name, make in toy.spread().items():
        on_gpu, _ = trajectory(rank, partial(make, offload=True), "cuda", communicator)
        on_cpu, _ = trajectory(rank, make, "cpu", communicator)
        torch.testing.assert_close(
            on_gpu, on_cpu, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    coded = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 3000, device=device))]
        optimizer = OverlapLocalSGD(
            params, lr=0.5, tau=2, codec="int8", offload=True, communicator=communicator
        )
        (sync,) = optimizer.engine.syncs
        assert sync.buffer.tensor.is_pinned() == (device == "cuda")
        for _ in range(5):
            params[0].grad = torch.full((3000,), 0.125 * rank, device=device)
            optimizer.step()
            optimizer.average()
        optimizer.flush()
        coded.append(params[0].detach().cpu())
    torch.testing.assert_close(coded[0], coded[1], rtol=0, atol=1e-6)
    communicator.close()
    return True


def test_anchors_in_host_memory_and_codes():
    assert all(run(_offloaded, 2))


def _quarantine(rank):
    communicator = ProcessGroupCommunicator()
    for name in ALGORITHMS:
        make = toy.variants(fragments=(1,)).get(f"{name}-delay{toy.TAU}-fragments1")
        make = make or toy.variants(fragments=(1,))[f"{name}-fragments1"]
        if rank == 1:
            # The flag is read at the merge: the GPU is not stopped for it at the launch.
            with pytest.warns(QuarantineWarning):
                x, stats = trajectory(rank, make, "cuda", communicator, sick=True)
        else:
            x, stats = trajectory(rank, make, "cuda", communicator, sick=True)
        assert torch.isfinite(x[-2:]).all(), name
        assert stats["quarantined"] == (rank == 1), name
    communicator.close()
    return True


def test_not_a_number_on_one_gpu_worker():
    assert all(run(_quarantine, 2))


def test_parameters_on_cpu_and_gpu():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, device="cuda"))]
    optimizer = toy.alone(toy.variants()["overlap-local-sgd-delay3-fragments1"], params)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.average()
    torch.testing.assert_close(params[0][:2], params[1].cpu())
