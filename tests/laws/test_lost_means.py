"""What a rule says of workers that come and go: what is shared, and what a mean that never comes leaves."""

from __future__ import annotations

import json

import pytest
import torch

from distoptim import LocalSGD
from distoptim import rule as rules
from distoptim.algorithms.anchor import Pull
from distoptim.algorithms.easgd import Spring
from distoptim.comm import CatchUp, Handle, MeanLost
from distoptim.rule import Mean
from distoptim.simulator.fabric import VirtualCommunicator
from distoptim.testing.inspection import copied, inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy

MAKERS = toy.variants(fragments=(1,))
ROUNDS = 6


class Lost(Handle):
    """A mean that never comes; nobody knows what is in its buffer."""

    def wait(self, timeout_s):
        self.buffer.fill_(float("nan"))
        raise MeanLost("a worker was lost")


class Losing(VirtualCommunicator):
    """Loses the mean that is launched after `lost` others; None: none."""

    elastic = True
    lost: int | None = None

    def __init__(self, fabric, rank):
        super().__init__(fabric, rank)
        self._launched = 0

    def all_reduce(self, buffer):
        self._launched += 1
        if self._launched - 1 == self.lost:
            return Lost(buffer)
        return super().all_reduce(buffer)


def losing(number):
    return type("Losing", (Losing,), {"lost": number})


def cluster(name, lost, dtype=torch.float64):
    # Momentum of inner optimizers goes on by itself; of GlobalMomentum it is the mean's.
    inner = {} if name.startswith("global-momentum") else {"momentum": 0.0, "nesterov": False}

    def make(params, **options):
        return MAKERS[name](params, **inner, **options)

    return Lockstep(make, [toy.start(dtype)] * toy.WORKERS, communicator=losing(lost))


def push(weight):
    """A gradient that does not depend on where x is, another one on each worker."""
    return lambda rank, params: [torch.full_like(p, weight * (1.0 + rank)) for p in params]


def walk(workers, rounds, pushes):
    """x after so many rounds, of workers that move at these local steps alone."""
    for step in range(1, rounds * toy.TAU + 1):
        workers.step(push(pushes[step]) if step in pushes else toy.zero)
    return workers.x()


@pytest.mark.filterwarnings("ignore:all workers have sent equal parameters")
@pytest.mark.parametrize("name", MAKERS)
def test_a_round_without_a_mean_is_none(name):
    """All steps before and after a launch whose mean is lost are in x, and in the next payload."""
    second = toy.TAU + 1
    workers = cluster(name, 1)
    # A pull takes its part of all that is local at a merge: no other round has the same in it.
    later = 0.0 if isinstance(inspect(workers.optimizers[0]).rule, Pull) else 0.25
    lost = walk(workers, ROUNDS + 1, {1: 1.0, second: 0.5, second + toy.TAU: later})
    expected = walk(cluster(name, None), ROUNDS, {1: 1.0, second: 0.5 + later})
    torch.testing.assert_close(lost, expected, rtol=0, atol=1e-9)


def test_the_mean_after_a_lost_one_weighs_the_samples_of_both():
    sent = []

    class Weighed(losing(1)):
        def all_reduce(self, buffer):
            sent.append(float(buffer[-1]))
            return super().all_reduce(buffer)

    workers = Lockstep(
        lambda params, **options: LocalSGD(params, lr=0.1, tau=2, **options),
        [toy.start()] * 2,
        communicator=Weighed,
    )
    for _ in range(8):
        workers.step(toy.gradient, samples=[1, 3])
    # Rounds of two steps, of which the second is lost.
    assert sent == [2, 6, 2, 6, 4, 12, 2, 6]


def shared(sync, rule):
    return {name: rules.save(sync.state)[name] for name in rule.shared(sync.state)}


@torch.no_grad()
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_shared_is_enough_to_go_on(name):
    """Who takes it over at a launch has, from the merge of that launch on, what all have.

    x begins at the anchor, and moves with it: what others have of their own does not throw it.
    """
    workers = cluster(name, None)
    workers.run(3 * toy.TAU, toy.gradient)
    engine = workers.optimizers[0].engine
    rule = engine.rule
    donor = engine.syncs[0]
    start = donor.fragment.flat()
    start.tensor.copy_(
        shared(donor, rule).get("anchor", donor.buffer.tensor)[: start.tensor.numel()]
    )

    newcomer = cluster(name, None).optimizers[0].engine.syncs[0]
    newcomer.fragment.write(start)
    newcomer.state = rule.start(newcomer.fragment)
    rules.load(newcomer.state, shared(donor, rule))
    for merge in range(3):
        for sync in (donor, newcomer):
            sync.buffer.tensor[: start.tensor.numel()] = start.tensor * 1.1 ** (merge + 1)
            rule.merge(sync.fragment, sync.state, Mean(sync.buffer, toy.WORKERS, [0.1]))
        ours = copied(shared(donor, rule))
        theirs = copied(shared(newcomer, rule))
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if merge == 0:
            anchor = shared(donor, rule).get("anchor", start.tensor * 1.1)
            x = torch.cat([p.reshape(-1) for p in newcomer.fragment.params])
            moved = torch.dist(anchor, start.tensor)
            assert torch.dist(x, start.tensor) <= 2 * max(
                moved, torch.dist(start.tensor, 1.1 * start.tensor)
            )


def test_an_anchor_is_pulled_no_harder_by_more_workers_than_began():
    """Two began, six more have come: with all of their pulls z would swing ever further."""
    fragment = cluster("easgd-delay0-fragments1", None).optimizers[0].engine.syncs[0].fragment
    rule = Spring(1 / 3, 2)
    state = rule.start(fragment)
    z = state.anchor.tensor.clone()
    mean = fragment.flat(extra=1)
    mean.tensor.fill_(1.0)
    rule.merge(fragment, state, Mean(mean, 8, [0.1]))
    torch.testing.assert_close(state.anchor.tensor, z.lerp(torch.ones_like(z), 2 / 3))


BEHIND = toy.WORKERS - 1


class Behind(VirtualCommunicator):
    """The last worker loses one mean that the others get, and is found to be behind at its next launch."""

    elastic = True

    def __init__(self, fabric, rank, lost, launches, heard):
        super().__init__(fabric, rank)
        self._lost = lost
        self._heard = heard
        # Of the first worker, which gives: what its launches were, by number.
        self._launches = launches
        self._launched = 0
        self._given = None

    def attach(self, member):
        self._member = member

    def all_reduce(self, buffer):
        if self._given is not None and self._given.caught_up is not None:
            # What it launches before it has caught up is nothing to the others.
            return Lost(buffer)
        number = self._launched
        self._launched += 1
        if self.rank == 0:
            self._launches.append((self._member, self._member.position(buffer)))
        if self.rank != BEHIND or number not in (self._lost, self._lost + 1):
            return super().all_reduce(buffer)
        if number == self._lost:
            super().all_reduce(buffer.clone())
            return Lost(buffer)
        member, position = self._launches[number]
        given = CatchUp(json.loads(json.dumps(position)), member.give(), self._heard)
        handle = super().all_reduce(self._member.empty(given))
        handle.caught_up = given
        self._given = handle
        return handle


def behind(name, push, heard=frozenset(), push_at=None):
    """Workers of which one falls behind; its x and all anchors after every local step."""
    launches = []
    fragments = MAKERS_OF_ANY[name].keywords["fragments"]
    lost = 3 * fragments
    if push_at is None:
        # After the launch that is lost, and before the next.
        push_at = 4 * toy.TAU + 1 if fragments == 1 else lost + 2
    # Momentum of inner optimizers goes on by itself; of GlobalMomentum it is the mean's.
    inner = {} if name.startswith("global-momentum") else {"momentum": 0.0, "nesterov": False}
    workers = Lockstep(
        lambda params, **options: MAKERS_OF_ANY[name](params, **inner, **options),
        [toy.start()] * toy.WORKERS,
        communicator=lambda fabric, rank: Behind(fabric, rank, lost, launches, heard),
    )
    held = []
    for step in range(1, 7 * toy.TAU + 1):
        now = push if step == push_at else 0.0
        workers.local_step(lambda rank, params, now=now: pushed(rank, params, now))
        x = []
        # Before a launch, which may move x.
        workers.average(before_launch=lambda x=x: x.append(workers.x()[BEHIND]))
        anchors = workers.anchors() if workers.has_anchor() else []
        optimizer = workers.optimizers[BEHIND]
        if optimizer.engine.clock.delay == 0:
            x.append(workers.x()[BEHIND])
        held.append((x[-1], anchors, optimizer.stats()["catch_ups"]))
    return held


def pushed(rank, params, push):
    if rank == BEHIND:
        return [torch.full_like(p, push) for p in params]
    return toy.gradient(rank, params)


MAKERS_OF_ANY = {
    name: make
    for name, make in toy.spread().items()
    if not name.endswith("fragments3") or not name.startswith(("local-sgd", "cocod"))
}


@pytest.mark.filterwarnings("ignore:all workers have sent equal parameters")
@pytest.mark.parametrize("name", MAKERS_OF_ANY)
def test_who_was_behind_has_what_all_have_and_its_own_steps(name):
    """Anchors are equal again from that merge on, and no local step is lost."""
    held = behind(name, 0.0)
    caught_up = next(i for i, (*_, catch_ups) in enumerate(held) if catch_ups)
    for _, anchors, catch_ups in held[caught_up:]:
        assert catch_ups == 1
        assert all(torch.equal(anchor, anchors[0]) for anchor in anchors)
    # Of several fragments some have merged, or are launched, at the same local step.
    if held[0][1] and name.endswith("fragments1") and not name.startswith("global-momentum"):
        moved = behind(name, 0.5)[caught_up][0] - held[caught_up][0]
        torch.testing.assert_close(moved, torch.full_like(moved, -0.5 * toy.OPTIONS["lr"]))


# Of these a merge moves x with the anchor, whatever the distance: what is own can be told apart.
TOLD_APART = [
    name
    for name in MAKERS_OF_ANY
    if name.endswith("fragments1") and name.startswith(("bmuf", "diloco", "slowmo", "co2", "eager"))
]


@pytest.mark.filterwarnings("ignore:all workers have sent equal parameters")
@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("name", TOLD_APART)
def test_steps_that_the_others_have_heard_of_do_not_count_twice(name, heard):
    """A step before the launch whose mean was lost here alone is in the others' anchor, and no more in x."""
    fragments = frozenset([0] if heard else [])
    still = behind(name, 0.0, fragments)
    moved = behind(name, 0.5, fragments, push_at=4 * toy.TAU)
    caught_up = next(i for i, (*_, catch_ups) in enumerate(still) if catch_ups)
    moved_x, still_x = (held[caught_up][0] - held[caught_up][1][0] for held in (moved, still))
    own = moved_x - still_x
    expected = 0.0 if heard else -0.5 * toy.OPTIONS["lr"]
    torch.testing.assert_close(own, torch.full_like(own, expected))
