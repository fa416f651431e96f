"""What a rule says of workers that come and go: what is shared, and what a mean that never comes leaves."""

from __future__ import annotations

import pytest
import torch

from distoptim import rule as rules
from distoptim.algorithms.anchor import Pull
from distoptim.algorithms.easgd import Spring
from distoptim.comm import Handle, MeanLost
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
