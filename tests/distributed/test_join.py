"""Workers with loaders of different lengths, and payloads that weigh as many samples as they are made of."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import distoptim
from distoptim import CommunicationError, LocalSGD
from distoptim.comm import SingleWorker
from distoptim.periods import PostLocal, Schedule
from distoptim.testing import processes as workers
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.share import share

STEPS = (3, 5, 9)


def train(optimizer, params, rank, steps, **average):
    """Local steps downhill on this worker's quadratic."""
    for _ in range(steps):
        for p, g in zip(params, toy.gradient(rank, [p.detach() for p in params]), strict=True):
            p.grad = g
        optimizer.step()
        optimizer.average(**average)


def uneven(rank, names):
    """x of this worker after the block, and after three more steps and a flush, for each algorithm."""
    out = {}
    kinds = {
        "4": (4, 1),
        "schedule": (Schedule({0: 2, 3: 4}), 2),
        "post-local": (PostLocal(start=4, tau=2), 1),
    }
    for i, name in enumerate(names):
        # By turns, so that every kind of rounds is met with some algorithms.
        for label in share(kinds, of=len(kinds), turn=i):
            tau, fragments = kinds[label]
            params = [torch.nn.Parameter(p) for p in toy.start()]
            optimizer = distoptim.ALGORITHMS[name](
                params, tau=tau, lr=0.1, fragments=fragments, timeout_s=30.0
            )
            with optimizer.join():
                train(optimizer, params, rank, STEPS[rank])
            x = torch.cat([p.detach().reshape(-1) for p in params])
            train(optimizer, params, rank, 3)
            optimizer.flush()
            out[name, label] = x.tolist(), optimizer.stats()["steps"]
            optimizer.close()
    return out


def test_loaders_of_different_lengths_with_all_algorithms():
    results = workers.run(uneven, len(STEPS), list(distoptim.ALGORITHMS))
    for key, (x, steps) in results[0].items():
        assert all(torch.isfinite(torch.tensor(x)))
        assert x != torch.cat([p.reshape(-1) for p in toy.start()]).tolist()
        for other in results[1:]:
            assert other[key] == (x, steps), key
    # Local SGD by hand: rounds end at steps 4, 8 and 12, and what a round is worth is its share of
    # local steps.
    x = torch.tensor(results[0]["local-sgd", "4"][0], dtype=torch.float64)
    torch.testing.assert_close(x, local_sgd_by_hand(), rtol=0, atol=1e-12)


def local_sgd_by_hand():
    mean = toy.start()
    for before in range(0, 12, 4):
        weights = [max(0, min(steps - before, 4)) / 4 for steps in STEPS]
        total = [torch.zeros_like(p) for p in mean]
        for rank, weight in enumerate(weights):
            x = [p.clone() for p in mean]
            for _ in range(round(4 * weight)):
                x = [p - 0.1 * g for p, g in zip(x, toy.gradient(rank, x), strict=True)]
            total = [t + weight * p for t, p in zip(total, x, strict=True)]
        mean = [t / sum(weights) for t in total]
    return torch.cat([p.reshape(-1) for p in mean])


def test_payloads_weigh_their_samples():
    """x <- sum n_i x_i / sum n_i over the round's samples, here 2 and 3 local steps of 1, 2, 3, 4 samples."""
    make = partial(LocalSGD, tau=2, lr=0.1)
    group = Lockstep(make, [toy.start()] * toy.WORKERS)
    reference = Lockstep(partial(LocalSGD, tau=100, lr=0.1), [toy.start()] * toy.WORKERS)
    for _ in range(2):
        group.step(toy.gradient, samples=[1, 2, 3, 4])
        reference.step(toy.gradient)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = (weights[:, None] * reference.x()).sum(0) / weights.sum()
    for x in group.x():
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", distoptim.ALGORITHMS)
def test_equal_samples_are_no_samples(name):
    make = partial(distoptim.ALGORITHMS[name], tau=toy.TAU, **toy.OPTIONS)
    plain, weighted = (Lockstep(make, [toy.start()] * toy.WORKERS) for _ in range(2))
    for _ in range(3 * toy.TAU):
        plain.step(toy.gradient)
        weighted.step(toy.gradient, samples=[32] * toy.WORKERS)
    torch.testing.assert_close(weighted.x(), plain.x(), rtol=0, atol=1e-12)


def test_a_worker_without_samples_counts_nothing():
    group = Lockstep(partial(LocalSGD, tau=1, lr=0.1), [toy.start()] * toy.WORKERS)
    expected = [p - 0.1 * g for p, g in zip(toy.start(), toy.gradient(2, toy.start()), strict=True)]
    group.step(toy.gradient, samples=[0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(
        group.x()[0], torch.cat([p.reshape(-1) for p in expected]), rtol=0, atol=1e-12
    )


def test_with_another_number_of_workers_samples_are_counted_anew():
    make = partial(LocalSGD, tau=2, lr=0.1)
    group, smaller = Lockstep(make, [toy.start()] * toy.WORKERS), Lockstep(make, [toy.start()] * 2)
    for cluster, steps in ((group, 3), (smaller, 2)):
        for optimizer in smaller.optimizers if cluster is smaller else ():
            optimizer.load_state_dict(group.optimizers[0].state_dict())
        for _ in range(steps):
            cluster.step(toy.gradient, samples=[10, 9, 8, 7][: len(cluster.optimizers)])
    # The weights are the samples of two local steps, 20 and 18, not those less what was made
    # before.
    assert inspect(smaller.optimizers[0]).fragments[0].samples == 20
    plain = Lockstep(partial(LocalSGD, tau=9, lr=0.1), [toy.start()] * 2).run(2, toy.gradient)[-1]
    torch.testing.assert_close(
        smaller.x()[0], (20 * plain[0] + 18 * plain[1]) / 38, rtol=0, atol=1e-12
    )


def test_an_exception_starts_no_collective():
    class Silent(SingleWorker):
        def all_reduce(self, buffer):
            raise AssertionError("a collective in an exception")

    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = LocalSGD([p], tau=2, lr=0.1, communicator=Silent())
    with pytest.raises(KeyError), optimizer.join():
        raise KeyError
    assert optimizer.stats()["steps"] == 0


def test_samples_out_of_range():
    optimizer = toy.alone(LocalSGD, [torch.nn.Parameter(torch.zeros(2))], tau=2, lr=0.1)
    with pytest.raises(ValueError, match="samples=-1"):
        optimizer.average(samples=-1)


def test_samples_on_some_steps_only_are_refused():
    for first, second in ((4, None), (None, 4)):
        optimizer = toy.alone(LocalSGD, [torch.nn.Parameter(torch.zeros(2))], tau=2, lr=0.1)
        optimizer.average(samples=first)
        with pytest.raises(ValueError, match=r"samples= after steps with.*every step or never"):
            optimizer.average(samples=second)


def test_samples_on_some_steps_only_are_refused_after_a_resume():
    optimizer, resumed = (
        toy.alone(LocalSGD, [torch.nn.Parameter(torch.zeros(2))], tau=2, lr=0.1) for _ in range(2)
    )
    optimizer.average(samples=4)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="without samples= after steps with"):
        resumed.average()


def test_samples_on_some_workers_only_are_refused_by_the_others():
    group = Lockstep(partial(LocalSGD, tau=1, lr=0.1), [toy.start()] * toy.WORKERS)
    with pytest.raises(CommunicationError, match=r"this worker in .* with samples=, another one"):
        group.step(toy.gradient, samples=[32, None, None, None])
