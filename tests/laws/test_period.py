"""Periods: tau by a table, by the measured link, by the loss, and a synchronous phase first."""

from __future__ import annotations

import copy
import logging
import math
from functools import partial

import pytest
import torch

import distoptim
from distoptim import CoCoDSGD, LocalSGD, OverlapLocalSGD
from distoptim.comm import SingleWorker
from distoptim.periods import AdaComm, HideCommunication, PostLocal, Schedule
from distoptim.simulator import Cluster as Virtual
from distoptim.simulator import Constant
from distoptim.testing import processes as workers_
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.copies import COPIES
from tests.helpers.share import share

TABLE = Schedule({0: 2, 5: 4, 12: 3})
PERIODS = {
    "schedule": TABLE,
    "post-local": PostLocal(start=4, tau=3),
    "post-local-schedule": PostLocal(start=3, tau=TABLE),
}
# The algorithms as they are, the overlapped ones also in three messages.
MAKERS = {
    f"{name}-{count}": partial(algorithm, fragments=count, **toy.OPTIONS)
    for name, algorithm in distoptim.ALGORITHMS.items()
    for count in (1, 2)
}


def cluster(make, tau, **options):
    return Lockstep(partial(make, tau=tau, **options), [toy.start()] * toy.WORKERS)


def taus(workers, steps, gradient=toy.gradient):
    """The tau after each step, equal on all workers."""
    out = []
    for _ in range(steps):
        workers.step(gradient)
        (tau,) = {o.stats()["tau"] for o in workers.optimizers}
        out.append(tau)
    return out


@pytest.mark.parametrize("algorithm", [LocalSGD, CoCoDSGD])
def test_a_schedule_changes_where_a_round_ends(algorithm, caplog):
    workers = cluster(algorithm, TABLE, lr=0.1)
    with caplog.at_level(logging.INFO, "distoptim"):
        # Rounds end at 2, 4, 6 (now 4), 10, 14 (now 3), 17.
        assert taus(workers, 18) == [2] * 5 + [4] * 8 + [3] * 5
    assert "local step 6: tau 2 -> 4: schedule" in caplog.text
    assert workers.optimizers[0].stats()["syncs"] == {LocalSGD: 6, CoCoDSGD: 6}[algorithm]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_rounds_before_a_change_are_those_of_the_first_tau(make):
    fixed, changing = (
        cluster(make, 3).run(6, toy.gradient),
        cluster(make, Schedule({0: 3, 6: 4})).run(6, toy.gradient),
    )
    assert torch.equal(fixed[:5], changing[:5])


@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_post_local_is_synchronous_and_then_begins_from_the_shared_parameters(make, start):
    workers = cluster(make, PostLocal(start=start, tau=3))
    x = workers.run(start, toy.gradient)
    synchronous = cluster(LocalSGD, 1, **toy.OPTIONS).run(start, toy.gradient)
    torch.testing.assert_close(x, synchronous, rtol=0, atol=1e-12)
    assert all(torch.equal(x[-1, 0], other) for other in x[-1])
    # From here on: the algorithm started at these parameters, with the inner momentum there is.
    fresh = Lockstep(partial(make, tau=3), [[p.detach() for p in workers.params[0]]] * toy.WORKERS)
    for new, old in zip(fresh.optimizers, workers.optimizers, strict=True):
        new.inner.load_state_dict(copy.deepcopy(old.inner.state_dict()))
    assert torch.equal(workers.run(7, toy.gradient), fresh.run(7, toy.gradient))


@pytest.mark.parametrize(
    ("name", "period", "how", "steps"),
    [
        # Every algorithm with every period in one or two fragments by turns, and in every way.
        (
            f"{name}-{1 + (i + j) % 2}",
            period,
            list(COPIES)[(i // 2 + j) % len(COPIES)],
            share((1, 4, 5, 7), of=2, turn=i),
        )
        for i, name in enumerate(distoptim.ALGORITHMS)
        for j, period in enumerate(PERIODS)
    ],
)
def test_a_copy_goes_on_bit_equally(name, period, how, steps):
    make = partial(MAKERS[name], tau=PERIODS[period])
    expected = Lockstep(make, [toy.start()] * toy.WORKERS).run(16, toy.gradient)
    workers = Lockstep(make, [toy.start()] * toy.WORKERS)
    for step in steps:
        workers.run(step - inspect(workers.optimizers[0]).step, toy.gradient)
        rest = COPIES[how](make, workers).run(16 - step, toy.gradient)
        assert torch.equal(rest, expected[step:]), f"saved after step {step}"


class Switch:
    """A network of one link whose rate changes at given syncs."""

    def __init__(self, *seconds):
        self.seconds, self.count = list(seconds), 0

    def all_reduce_s(self, nbytes, workers):
        self.count += 1
        return self.seconds[min(self.count - 1, len(self.seconds) - 1)]


def virtual(network, tau, **options):
    return Virtual(
        workers=3,
        model=lambda: torch.nn.Linear(4, 4),
        compute=Constant(1.0),
        network=network,
        threads=1,
        optimizer=partial(OverlapLocalSGD, tau=tau, lr=0.1, **options),
    )


@pytest.mark.parametrize(("seconds", "tau"), [(0.5, 1), (1.5, 2), (7.0, 8)])
def test_the_smallest_tau_that_hides(seconds, tau):
    run = virtual(Switch(seconds), HideCommunication())
    for _ in range(60):
        run.advance(1)
    assert run.stats()["tau"] == tau
    before = run.stats()["exposed_s"]
    for _ in range(5 * tau):
        run.advance(1)
    assert run.stats()["exposed_s"] == before


def test_a_link_that_becomes_ten_times_slower_and_recovers():
    class Slow:
        slow = False

        def all_reduce_s(self, nbytes, workers):
            return 15.0 if self.slow else 1.5

    network = Slow()
    run = virtual(network, HideCommunication())
    for slow, tau in ((False, 2), (True, 17), (False, 2)):
        network.slow = slow
        syncs, exposed = run.stats()["syncs"], []
        while run.stats()["syncs"] < syncs + 6:
            before = run.stats()
            while run.stats()["syncs"] == before["syncs"]:
                run.advance(1)
            after = run.stats()
            exposed.append(
                (after["exposed_s"] - before["exposed_s"]) / (after["steps"] - before["steps"])
            )
        # Two rounds wait: the one that is surprised, and the one launched while the news travels.
        assert max(exposed[3:]) < 0.02, exposed
        assert (max(exposed) > 0.5) == slow
        assert run.stats()["tau"] == tau


@pytest.mark.parametrize(("tau", "then"), [(11, 12), (12, 12), (13, 13), (20, 13)])
def test_tau_grows_to_the_margin_and_comes_down_to_twice_the_margin(tau, then):
    """Ten local steps: 11.25 with the margin, 12.5 with twice the margin."""
    means = {"step_s": 0.5, "communication_s": 5.0}
    assert HideCommunication(margin=0.125).choose(100, tau, means, {})[0] == then


def test_what_is_in_flight_is_merged_before_a_new_tau_begins():
    # Launches at 2, 4, 6, 8, merges three steps later; that of step 6 not at 9, but at the change.
    for tau, syncs in ((4, 2), (Schedule({0: 4, 8: 6}), 3)):
        workers = cluster(LocalSGD, tau, lr=0.1, fragments=2, delay=3)
        workers.run(8, toy.gradient)
        assert [o.stats()["syncs"] for o in workers.optimizers] == [syncs] * toy.WORKERS


def test_a_link_in_three_messages_is_measured_as_a_whole():
    run = virtual(Switch(1.0), HideCommunication(smallest=2), fragments=2)
    for _ in range(40):
        run.advance(1)
    assert run.stats()["tau"] == 3
    before = run.stats()["exposed_s"]
    for _ in range(12):
        run.advance(1)
    assert run.stats()["exposed_s"] == before


def with_loss(losses, tau, steps, **options):
    """The taus of a worker that reports these losses."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = LocalSGD([p], tau=tau, lr=1.0, communicator=SingleWorker(), **options)
    out = []
    for step in range(steps):
        optimizer.average(loss=losses(step))
        out.append(int(optimizer.stats()["tau"]))
    return out, optimizer


def test_adacomm_follows_the_root_of_the_loss():
    """Loss 4 until step 8, then 1: tau = ceil(8 sqrt(1/4)) = 4.

    Where it stays, half of that, and half again.
    """
    out, _ = with_loss(
        lambda step: torch.tensor(4.0 if step < 8 else 1.0), AdaComm(8, interval=8), 40
    )
    # A mean is decided on at the end of the next round, and the first only says what the others are
    # compared with.
    assert out == [8] * 23 + [4] * 8 + [2] * 8 + [1]


def test_adacomm_rounds_up():
    """8 sqrt(2/4) = 5.66."""
    rule, memory = AdaComm(8, interval=1), {}
    rule.choose(0, 8, {"loss": 4.0, "lr": 1.0}, memory)
    assert rule.choose(8, 8, {"loss": 2.0, "lr": 1.0}, memory)[0] == 6


def test_adacomm_with_the_ratio_of_learning_rates():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = LocalSGD(
        [p], tau=AdaComm(2, interval=2, follow_lr=True), lr=1.0, communicator=SingleWorker()
    )
    taus = []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1.0 if step < 4 else 1 / 4
        optimizer.average(loss=3.0)
        taus.append(optimizer.stats()["tau"])
    # The loss is stuck; then the learning rate falls to a quarter: ceil(2 sqrt(4)); then the loss
    # is stuck.
    assert taus == [2] * 5 + [1] * 2 + [4] * 4 + [2]


def test_adacomm_takes_the_end_of_a_warm_up_for_the_first_learning_rate():
    """lr rises from 0 to 1 and falls to a quarter.

    Tau stays while it rises, then it is ceil(4 sqrt(4)).
    """
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = LocalSGD(
        [p], tau=AdaComm(4, interval=4, follow_lr=True), lr=0.0, communicator=SingleWorker()
    )
    taus = []
    for step in range(28):
        optimizer.param_groups[0]["lr"] = step // 4 / 4 if step < 20 else 1 / 4
        optimizer.average(loss=3.0)
        taus.append(optimizer.stats()["tau"])
    assert taus == [4] * 27 + [8]


def test_adacomm_wants_the_loss():
    with pytest.raises(ValueError, match="average\\(loss=loss\\)"):
        with_loss(lambda step: None, AdaComm(2), 3)


def test_a_loss_that_is_not_finite_changes_nothing():
    out, optimizer = with_loss(lambda step: math.nan, AdaComm(2, interval=1), 20)
    assert set(out) == {2}
    assert optimizer.stats()["quarantined"] == 0


def test_the_mean_loss_of_the_workers_counts():
    workers = cluster(LocalSGD, AdaComm(4, interval=4), lr=0.1)
    for step in range(12):
        assert {o.stats()["tau"] for o in workers.optimizers} == {4}
        loss = 4.0 if step < 4 else 1.0
        workers.average(losses=[(rank + 1) * loss for rank in range(toy.WORKERS)])
    clocks = [o.state_dict()["distoptim"]["clock"] for o in workers.optimizers]
    assert {clock["memory"]["loss0"] for clock in clocks} == {10.0}
    assert {o.stats()["tau"] for o in workers.optimizers} == {2}


def test_the_mean_loss_is_weighted_as_the_payloads_are():
    """Losses 4, 8, 12, 16 of 1, 2, 3, 4 samples: 12 on the mean."""
    workers = cluster(LocalSGD, AdaComm(4, interval=4), lr=0.1)
    samples = [rank + 1 for rank in range(toy.WORKERS)]
    for _ in range(12):
        workers.average(losses=[4.0 * n for n in samples], samples=samples)
    clocks = [o.state_dict()["distoptim"]["clock"] for o in workers.optimizers]
    assert {clock["memory"]["loss0"] for clock in clocks} == {12.0}


BAD = {
    "schedule without a start": (lambda: Schedule({3: 2}), "taus="),
    "schedule of zero": (lambda: Schedule({0: 0}), "tau=0"),
    "adacomm gamma": (lambda: AdaComm(2, gamma=1.0), "gamma=1.0"),
    "hide bounds": (lambda: HideCommunication(smallest=5, largest=4), "largest=4"),
    "post in post": (lambda: PostLocal(start=1, tau=PostLocal(start=2, tau=2)), "PostLocal"),
    "hide blocking": (
        lambda: toy.alone(LocalSGD, [torch.nn.Parameter(torch.zeros(1))], tau=HideCommunication()),
        "delay=0",
    ),
    "delay over the smallest": (
        lambda: toy.alone(CoCoDSGD, [torch.nn.Parameter(torch.zeros(1))], tau=TABLE, delay=3),
        "delay=3",
    ),
    "no period": (
        lambda: toy.alone(LocalSGD, [torch.nn.Parameter(torch.zeros(1))], tau="4"),
        "tau='4'",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_periods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def disagree(rank):
    try:
        LocalSGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, tau=Schedule({0: 2, 5: rank + 1}))
    except ValueError as error:
        return str(error)


def test_workers_agree_on_the_period():
    for message in workers_.run(disagree, 2):
        assert message.startswith(
            "workers disagree on tau: rank 0 has Schedule(taus={0: 2, 5: 1})"
        ), message


def test_a_mapping_is_a_schedule():
    taus = {0: 2, 3: 4}
    for make in (OverlapLocalSGD, LocalSGD):
        plain, short = (
            toy.alone(make, [torch.nn.Parameter(torch.zeros(2))], tau=tau, lr=0.1)
            for tau in (Schedule(taus), taus)
        )
        for optimizer in (plain, short):
            seen = []
            for _ in range(12):
                optimizer.average()
                seen.append(optimizer.stats()["tau"])
            assert seen[0] == 2
            assert seen[-1] == 4
        periods = [o.state_dict()["distoptim"]["clock"]["period"] for o in (plain, short)]
        assert periods == [repr(Schedule(taus))] * 2
        short.load_state_dict(plain.state_dict())
