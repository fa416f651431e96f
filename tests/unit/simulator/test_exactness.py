"""A virtual cluster computes what real processes compute."""

from __future__ import annotations

import warnings

import pytest
import torch

from distoptim import ALGORITHMS
from distoptim.comm import ProcessGroupCommunicator
from distoptim.simulator import Cluster
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run

WORKERS, STEPS = 4, 11
VARIANTS = [(name, options) for name in ALGORITHMS for options in ({}, {"fragments": 2})]


def model():
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()


def optimizer(name, params, **options):
    return ALGORITHMS[name](params, lr=0.05, momentum=0.9, tau=3, **options)


class Task:
    """Worker `rank`'s loss on its own stream of data."""

    def __init__(self, rank):
        self.generator = torch.Generator().manual_seed(rank)

    def __call__(self, net):
        x = torch.randn(16, 6, generator=self.generator, dtype=torch.float64)
        return torch.nn.functional.cross_entropy(
            net(x), (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
        )


def _real(rank):
    results = []
    communicator = ProcessGroupCommunicator()
    for name, options in VARIANTS:
        net, task = model(), Task(rank)
        opt = optimizer(name, net.parameters(), communicator=communicator, **options)
        for _ in range(STEPS):
            task(net).backward()
            opt.step()
            opt.zero_grad()
            opt.average()
        results.append([p.detach().clone() for p in net.parameters()])
    communicator.close()
    return results


@pytest.fixture(scope="module")
def real():
    return run(_real, WORKERS)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=str)
def test_parameters_equal_those_of_gloo_processes(real, index, threads):
    name, options = VARIANTS[index]
    tasks = [Task(rank) for rank in range(WORKERS)]
    cluster = Cluster(
        workers=WORKERS,
        model=model,
        threads=threads,
        optimizer=lambda params, communicator: optimizer(
            name, params, communicator=communicator, **options
        ),
    )
    for _ in range(STEPS):
        cluster.step(lambda net, rank: tasks[rank](net))
    for rank in range(WORKERS):
        for ours, theirs in zip(cluster.models[rank].parameters(), real[rank][index], strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-12)


def test_the_mean_model_is_the_mean():
    cluster = Cluster(
        workers=3,
        model=model,
        optimizer=lambda params, communicator: optimizer(
            "overlap-local-sgd", params, communicator=communicator
        ),
    )
    tasks = [Task(rank) for rank in range(3)]
    for _ in range(4):
        cluster.step(lambda net, rank: tasks[rank](net))
    mean = cluster.mean_model()
    for key, value in mean.state_dict().items():
        values = torch.stack([m.state_dict()[key].double() for m in cluster.models])
        torch.testing.assert_close(value.double(), values.mean(0))


def test_many_workers_cost_memory_in_proportion():
    def held(workers):
        cluster = Cluster(
            workers=workers,
            model=lambda: torch.nn.Linear(10, 10),
            threads=1,
            optimizer=lambda params, communicator: optimizer(
                "overlap-local-sgd", params, communicator=communicator
            ),
        )
        views = [inspect(o).fragments[0] for o in cluster.optimizers]
        return sum(view.buffer.nbytes + view.anchor.nbytes for view in views)

    assert held(64) == 16 * held(4)


@pytest.mark.parametrize("synchronous", [True, False])
def test_only_workers_that_were_meant_to_differ_are_told_that_they_do_not(synchronous):
    workers = Cluster(
        workers=2,
        model=model,
        optimizer=lambda params, **options: ALGORITHMS["local-sgd"](
            params, tau=1, lr=0.01, **options
        ),
        threads=1,
        synchronous=synchronous,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            workers.step(lambda model, rank: sum(p.square().sum() for p in model.parameters()))
    told = [w for w in caught if "all workers have sent equal parameters" in str(w.message)]
    assert bool(told) == (not synchronous)
