"""Rounds of equal time: workers of unequal speed arrive together, and what each sends weighs what it says."""

from __future__ import annotations

import copy
import time
from functools import partial

import pytest
import torch

import distoptim
from distoptim import CoCoDSGD, LocalSGD, OverlapLocalSGD
from distoptim.engine.clock import Clock
from distoptim.engine.weights import Weights
from distoptim.periods import EqualTime, PostLocal
from distoptim.simulator import Cluster, Constant
from distoptim.testing import processes

ONCE = {n: a for n, a in distoptim.ALGORITHMS.items() if n != "streaming-diloco"}
STEP_S = 0.1
OPTIMUM = torch.tensor([[1.0], [-2.0], [4.0], [0.5]])


def model():
    made = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(made.weight, 0.3)
    return made


def cluster(make, tau, *, speeds=(1, 1, 1, 1), compute=None, **options):
    """A worker for each speed, on parabolas of unlike optima; steps take 0.1 s at speed 1."""
    return Cluster(
        workers=len(speeds),
        model=model,
        optimizer=partial(make, tau=tau, lr=0.05, **options),
        compute=compute or Constant([STEP_S / speed for speed in speeds]),
        threads=1,
    )


def parabola(model, rank):
    return (model.weight - OPTIMUM[rank]).square().sum() / 2


def x(workers):
    return torch.stack([m.weight.detach().clone() for m in workers.models])


def steps(workers):
    return [optimizer.engine.step for optimizer in workers.optimizers]


def rounds(workers, count, loss=parabola):
    while workers.optimizers[0].rounds < count:
        workers.step(loss)


@pytest.mark.parametrize(("tau", "weigh"), [(5, "steps"), (8, "workers")])
@pytest.mark.parametrize("make", ONCE.values(), ids=ONCE)
def test_equal_workers_are_bit_equal_to_the_ordinary_period(make, tau, weigh):
    fixed = cluster(make, tau)
    timed = cluster(make, EqualTime(tau * STEP_S, weigh=weigh))
    for _ in range(3 * tau + 2):
        fixed.step(parabola)
        timed.step(parabola)
        assert torch.equal(x(fixed), x(timed))
    assert steps(timed) == steps(fixed)
    assert [o.stats()["tau"] for o in timed.optimizers] == [tau] * 4


@pytest.mark.parametrize("delay", [0, None])
def test_rounds_take_equal_time_and_nobody_waits(delay):
    workers = cluster(LocalSGD, EqualTime(1.0), speeds=(1, 2, 3.1, 4), delay=delay)
    rounds(workers, 10)
    assert [o.rounds for o in workers.optimizers] == [10] * 4
    made = steps(workers)
    assert made[0] == 100
    assert [n / made[0] for n in made] == pytest.approx([1, 2, 3.1, 4], rel=0.02)
    # Half a step of the slowest at the most.
    assert max(o.stats()["exposed_s"] for o in workers.optimizers) < 10 * STEP_S / 2
    assert workers.seconds() == pytest.approx(10, abs=STEP_S)


def test_the_weights_of_a_round_are_its_steps_and_sum_to_one():
    workers = cluster(LocalSGD, EqualTime(1.0), speeds=(1, 2, 3, 4))
    rounds(workers, 1, lambda model, rank: 0 * parabola(model, rank))
    before = steps(workers)
    start = x(workers)[0].clone()
    # Whoever sends start + rank makes the mean start + sum of w rank.
    with torch.no_grad():
        for rank, model in enumerate(workers.models):
            model.weight.add_(rank)
    rounds(workers, 2, lambda model, rank: 0 * parabola(model, rank))
    made = [b - a for a, b in zip(before, steps(workers), strict=True)]
    assert made == [10, 20, 30, 40]
    share = torch.tensor(made) / sum(made)
    assert share.sum() == 1
    torch.testing.assert_close(
        x(workers), (start + (share * torch.arange(4)).sum()).expand(4, 1, 1)
    )


@pytest.mark.parametrize(
    ("weigh", "samples", "usual", "expected"),
    [
        ("steps", None, None, 1),
        ("workers", None, None, 1),
        ("steps", None, 4, 6 / 4),
        ("workers", None, 4, 4 / 6),
        ("steps", 30, 4, 30),
        # The mean batch, 5, over the steps.
        ("workers", 30, 4, 5 / 6),
    ],
)
def test_what_six_local_steps_weigh(weigh, samples, usual, expected):
    weights = Weights(weigh)
    weights.samples = None if samples is None else 100.0 + samples
    weigh_now = partial(weights.weight_of_time, step=16, since=10, samples=100.0, usual=usual)
    assert weigh_now() == pytest.approx(expected)
    weights.left_at = 10
    assert weigh_now() == 0


@pytest.mark.parametrize(("began", "ends"), [(0.6, 2.0), (1.4, 2.0), (1.6, 2.6)])
def test_what_a_round_took_longer_is_made_up_for_but_for_more_than_half_a_round(began, ends):
    clock = Clock(EqualTime(1.0), 0)
    clock.begin_time(0, 0.0)
    clock.begin_time(5, began, anew=False)
    # The step after which half a step more would be the end, or not.
    assert not clock.time_is_up(6, began + (ends - began) * 0.66)
    assert clock.time_is_up(6, began + (ends - began) * 0.67)


@pytest.mark.parametrize("make", [LocalSGD, OverlapLocalSGD, CoCoDSGD])
@pytest.mark.parametrize(("weigh", "power"), [("steps", 2), ("workers", 0)])
def test_training_ends_where_the_weighted_objective_is_least(make, weigh, power):
    speeds = (1, 3)
    workers = cluster(make, EqualTime(2 * STEP_S, weigh=weigh), speeds=speeds)
    # Small, so that a round goes as far as its steps say.
    for optimizer in workers.optimizers:
        optimizer.param_groups[0]["lr"] = 0.01
    rounds(workers, 150)
    weight = torch.tensor(speeds) ** float(power)
    least = (weight * OPTIMUM[:2, 0]).sum() / weight.sum()
    assert workers.mean_model().weight.item() == pytest.approx(least.item(), abs=0.1)


class Slowing:
    """Worker 0 becomes ten times slower after 55 steps."""

    def seconds(self, rank, step):
        return STEP_S * (10 if rank == 0 and step >= 55 else 1)


@pytest.mark.parametrize("delay", [0, None])
def test_a_worker_that_becomes_slower_holds_up_the_others_for_less_than_a_round(delay):
    workers = cluster(LocalSGD, EqualTime(1.0), compute=Slowing(), delay=delay)
    rounds(workers, 20)
    assert steps(workers)[0] < 75
    assert max(o.stats()["exposed_s"] for o in workers.optimizers) < 1.0
    assert workers.seconds() < 21.5


def test_it_goes_on_bit_equal_from_a_checkpoint():
    make = partial(cluster, OverlapLocalSGD, EqualTime(0.7), speeds=(1, 2, 3.1, 4))
    whole = make()
    for _ in range(33):
        whole.step(parabola)
    saved = copy.deepcopy(whole.state_dict())
    again = make()
    again.load_state_dict(saved)
    for _ in range(40):
        whole.step(parabola)
        again.step(parabola)
    assert steps(again) == steps(whole)
    assert torch.equal(x(again), x(whole))


def test_a_flush_begins_a_new_round():
    workers = cluster(LocalSGD, EqualTime(1.0), speeds=(1,))
    for _ in range(4):
        workers.step(parabola)
    workers.optimizers[0].flush()
    rounds(workers, workers.optimizers[0].rounds + 1)
    assert steps(workers) == [4 + 10]


def test_it_begins_after_a_synchronous_phase():
    workers = cluster(LocalSGD, PostLocal(start=3, tau=EqualTime(1.0)), speeds=(1, 2, 3, 4))
    rounds(workers, 8)
    # Three means of single steps, then five rounds.
    assert steps(workers) == [3 + 50, 3 + 100, 3 + 150, 3 + 200]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EqualTime(0), "round_s=0"),
        (lambda: EqualTime(1, weigh="size"), "weigh='size': allowed is one of steps, workers"),
        (lambda: cluster(LocalSGD, EqualTime(1), delay=1), "delay=1 with tau=EqualTime"),
        (lambda: cluster(LocalSGD, EqualTime(1), fragments=2), "fragments=2 with tau=EqualTime"),
    ],
)
def test_what_it_refuses(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def unequal_machines(rank):
    """A quick and a slow worker: rounds, an evaluation, a checkpoint, and the end of the data."""
    model_ = model()
    optimizer = OverlapLocalSGD(
        model_.parameters(), lr=0.01, tau=EqualTime(0.08), timeout_s=30.0, module=model_
    )

    def step():
        time.sleep((0.01, 0.04)[rank])
        optimizer.zero_grad()
        parabola(model_, rank).backward()
        optimizer.step()
        optimizer.average()

    while optimizer.rounds < 6:
        step()
    first = optimizer.stats()
    with optimizer.averaged(model_):
        evaluated = model_.weight.item()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.flush()
    with optimizer.join():
        for _ in range((31, 5)[rank]):
            step()
    optimizer.close()
    return first, evaluated, model_.weight.item()


def slowed_down(rank):
    """Seconds of the rounds before and after worker 1 becomes ten times slower, and its own steps."""
    model_ = model()
    optimizer = OverlapLocalSGD(
        model_.parameters(), lr=0.01, tau=EqualTime(0.1), timeout_s=30.0, module=model_
    )
    out = []
    for step_s in (0.01, 0.1 if rank else 0.01):
        # The round in which it happens, and those in which what was sent before arrives, do not count.
        begin = optimizer.rounds + 2
        while optimizer.rounds < begin + 4:
            if optimizer.rounds < begin:
                start = time.perf_counter()
                steps = optimizer.local_step
            time.sleep(step_s)
            optimizer.average()
        out += [time.perf_counter() - start, optimizer.local_step - steps]
    with optimizer.join():
        pass
    optimizer.close()
    return out


def real_workers(rank):
    return unequal_machines(rank), slowed_down(rank)


def test_real_workers_of_unequal_speed():
    (quick, its), (slow, others) = processes.run(real_workers, 2)
    assert quick[0]["steps"] > 1.5 * slow[0]["steps"]
    assert quick[1:] == slow[1:]
    before, steps_before, after, steps_after = its
    # With one tau for both, the quick one's rounds would last ten times as long.
    assert after < 4 * before
    assert steps_after > 0.4 * steps_before
    assert others[3] < 0.5 * others[1]
