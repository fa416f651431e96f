"""The DiLoCo family, CO2 and the carry rule.

The papers' loops in float64, and what all of them promise.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distoptim import BMUF, CO2, DiLoCo, EagerDiLoCo, LocalSGD, SlowMo, StreamingDiLoCo
from distoptim.simulator import VirtualCommunicator
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy

TAU, ROUNDS, LR = 3, 6, 0.1


def cluster(make, *, size=toy.WORKERS, **options):
    return Lockstep(partial(make, tau=TAU, lr=LR, **options), [toy.start()] * size)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def flat(params):
    return torch.cat([p.reshape(-1) for p in params])


class Loop:
    """Workers that do plain SGD, as flat vectors: `run` makes local steps and records x after each.

    Recorded before a merge that follows: a test that writes `x` after `run` replaces the last
        record.
    """

    def __init__(self, size=toy.WORKERS):
        self.x = flat(toy.start()).repeat(size, 1)
        self.z = self.x[0].clone()
        self.history = []

    def run(self, steps=TAU):
        sizes = [p.numel() for p in toy.start()]
        for _ in range(steps):
            for rank, x in enumerate(self.x):
                params = [
                    part.reshape(shape)
                    for part, shape in zip(x.split(sizes), toy.SHAPES, strict=True)
                ]
                self.x[rank] = x - LR * flat(toy.gradient(rank, params))
            self.history.append(self.x.clone())
        return self.x

    def restart(self, x):
        self.x = x.clone()
        self.history[-1] = self.x.clone()

    def trajectory(self):
        return torch.stack(self.history)


class Nesterov:
    """The outer optimizer, written out."""

    def __init__(self, lr, beta):
        self.lr, self.beta, self.v = lr, beta, 0.0

    def __call__(self, z, g):
        self.v = self.beta * self.v + g
        return z - self.lr * (g + self.beta * self.v)


# Without momentum the step is another line, which needs no memory.
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_diloco_is_the_papers_loop(momentum):
    loop, outer = Loop(), Nesterov(0.7, momentum)
    for _ in range(ROUNDS):
        loop.z = outer(loop.z, (loop.z - loop.run()).mean(0))
        loop.restart(loop.z.expand_as(loop.x))
    workers = cluster(DiLoCo, outer_momentum=momentum)
    close(workers.run(ROUNDS * TAU, toy.gradient), loop.trajectory())


def test_diloco_with_an_outer_adam_is_adam_on_the_pseudo_gradient():
    loop = Loop()
    z = torch.nn.Parameter(loop.z)
    adam = torch.optim.Adam([z], lr=0.1)
    for _ in range(ROUNDS):
        z.grad = (z.detach() - loop.run()).mean(0)
        adam.step()
        loop.restart(z.detach().expand_as(loop.x))
    close(
        cluster(DiLoCo, outer=lambda anchors: torch.optim.Adam(anchors, lr=0.1)).run(
            ROUNDS * TAU, toy.gradient
        ),
        loop.trajectory(),
    )


@pytest.mark.parametrize(("delay", "mine"), [(1, 0.5), (2, 0.2)])
def test_streaming_diloco_is_the_papers_loop(delay, mine):
    """Two fragments by hand.

    Parameters 0 and 2 at steps 3, 6, ..., parameter 1 at steps 1, 4, ...
    """
    workers = Lockstep(
        lambda params, **o: StreamingDiLoCo(
            params,
            tau=TAU,
            delay=delay,
            local_weight=mine,
            lr=LR,
            fragments=[[params[0], params[2]], [params[1]]],
            **o,
        ),
        [toy.start()] * toy.WORKERS,
    )
    x = workers.run(ROUNDS * TAU, toy.gradient)
    loop = Loop()
    parts = [(torch.tensor([*range(6), 10]), TAU), (torch.arange(6, 10), 1)]
    outer, sent = [Nesterov(0.4, 0.9) for _ in parts], [None for _ in parts]
    for step in range(1, ROUNDS * TAU + 1):
        loop.run(1)
        merged = loop.x.clone()
        for i, (part, first) in enumerate(parts):
            if step - delay >= first and (step - delay - first) % TAU == 0:
                loop.z[part] = outer[i](loop.z[part], loop.z[part] - sent[i])
                merged[:, part] = mine * loop.x[:, part] + (1 - mine) * loop.z[part]
        loop.restart(merged)
        for i, (part, first) in enumerate(parts):
            if step >= first and (step - first) % TAU == 0:
                sent[i] = loop.x[:, part].mean(0)
    close(x, loop.trajectory())


@pytest.mark.parametrize("nesterov", [True, False])
def test_eager_diloco_is_the_papers_loop(nesterov):
    """Every worker with an outer optimizer of its own, as in the paper.

    Ours keeps one shared state.
    """
    beta, m = 0.9, toy.WORKERS
    loop = Loop()
    z, v = loop.x.clone(), torch.zeros_like(loop.x)
    stale = torch.zeros_like(loop.x)
    for _ in range(ROUNDS):
        fresh = z - loop.run()
        g = stale.mean(0) + (fresh - stale) / m
        v = beta * v + g
        z = z - 0.4 * (g + beta * v if nesterov else v)
        stale = fresh
        loop.restart(z)
    x = cluster(EagerDiLoCo, outer_nesterov=nesterov).run(ROUNDS * TAU, toy.gradient)
    close(x, loop.trajectory())


def test_eager_without_its_own_part_is_delayed_diloco():
    loop, outer = Loop(), Nesterov(0.4, 0.9)
    stale = torch.zeros_like(loop.z)
    for _ in range(ROUNDS):
        fresh = (loop.z - loop.run()).mean(0)
        loop.z, stale = outer(loop.z, stale), fresh
        loop.restart(loop.z.expand_as(loop.x))
    close(cluster(EagerDiLoCo, eager=False).run(ROUNDS * TAU, toy.gradient), loop.trajectory())


@pytest.mark.parametrize("delay", [0, 1, TAU])
@pytest.mark.parametrize("fragments", [1, 3])
def test_eager_with_one_worker_is_diloco(delay, fragments):
    close(
        cluster(EagerDiLoCo, size=1, delay=delay, fragments=fragments, outer_lr=0.7).run(
            ROUNDS * TAU, toy.gradient
        ),
        cluster(DiLoCo, size=1, fragments=fragments).run(ROUNDS * TAU, toy.gradient),
    )


@pytest.mark.parametrize(("beta", "clip"), [(0.5, 1.0), (0.5, 0.05), (0.0, 0.1)])
def test_co2_is_its_equations(beta, clip):
    loop = Loop()
    stale, m, moves = torch.zeros_like(loop.z), torch.zeros_like(loop.z), [0.0]
    for _ in range(ROUNDS):
        fresh = (loop.z - loop.run()).mean(0)
        gap = 1 + moves[-1] / max(moves) if max(moves) else 1
        m = (beta * m + stale / gap).clamp(-clip, clip)
        moves.append(float((0.8 * m).norm()))
        loop.z, stale = loop.z - 0.8 * m, fresh
        loop.restart(loop.z.expand_as(loop.x))
    x = cluster(CO2, outer_lr=0.8, outer_momentum=beta, clip=clip).run(ROUNDS * TAU, toy.gradient)
    close(x, loop.trajectory())


@pytest.mark.parametrize("delay", [1, 2, TAU])
@pytest.mark.parametrize("make", [BMUF, SlowMo, DiLoCo, partial(LocalSGD, outer_momentum=0.5)])
def test_the_carry_rule_adds_the_steps_made_meanwhile(make, delay):
    """Whatever the outer step.

    Each worker holds the anchor and its own steps since it sent, exactly.
    """
    workers = cluster(make, delay=delay, carry=True)
    sent = [workers.x()]
    for step in range(1, ROUNDS * TAU + 1):
        workers.step(toy.gradient, before_launch=lambda: sent.append(workers.x()))
        if step % TAU == delay % TAU and step >= TAU:
            # At delay tau, what was sent at the launch before.
            launch = step - delay
            base = sent[launch] if launch else sent[0]
            steps = workers.x() - workers.anchors()[0]
            assert steps.std(0).max() > 1e-3
            before = sent[step - 1] - LR * torch.stack(
                [flat(toy.gradient(rank, split(x))) for rank, x in enumerate(sent[step - 1])]
            )
            close(steps, before - base)


def split(x):
    parts = x.split([p.numel() for p in toy.start()])
    return [part.reshape(shape) for part, shape in zip(parts, toy.SHAPES, strict=True)]


@pytest.mark.parametrize(
    "make",
    [
        partial(BMUF, block_momentum=0.0),
        partial(SlowMo, slow_momentum=0.0),
        partial(DiLoCo, outer_lr=1.0, outer_momentum=0.0),
    ],
)
@pytest.mark.parametrize("delay", [1, TAU])
def test_the_carry_rule_keeps_the_workers_mean(make, delay):
    """With an outer step onto the mean, a merge moves workers but not their mean."""
    workers = cluster(make, delay=delay, carry=True)
    moved = []
    for _ in range(ROUNDS * TAU):
        x = workers.x()
        local = torch.stack(
            [mine - LR * flat(toy.gradient(rank, split(mine))) for rank, mine in enumerate(x)]
        )
        workers.step(toy.gradient)
        close(workers.x().mean(0), local.mean(0))
        moved.append((workers.x() - local).abs().max())
    assert max(moved) > 0.01


@pytest.mark.parametrize(
    "name", [name for name in toy.variants() if "diloco" in name or "co2" in name]
)
def test_the_outer_state_is_bit_equal_on_all_ranks(name):
    workers = Lockstep(toy.variants()[name], [toy.start(torch.float32)] * toy.WORKERS)
    for _ in range(3 * toy.TAU):
        workers.step(toy.gradient)
        first, *others = [view.shared() for view in workers.views()]
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    momentum = ("momentum", "moved", "farthest") if name.startswith("co2") else ()
    shared = inspect(workers.optimizers[0]).fragments[0].shared
    assert shared.keys() == {"anchor", "outer", "lr", *momentum}


def test_fragments_are_launched_and_merged_in_one_order_on_all_ranks():
    """Three fragments, four steps in a round, two steps to travel: up to two in flight."""
    workers = Lockstep(
        partial(StreamingDiLoCo, tau=4, delay=2, lr=LR, fragments=3), [toy.start()] * toy.WORKERS
    )
    orders, most = [], 0
    for _ in range(12):
        workers.step(toy.gradient)
        orders.append([view.in_flight for view in workers.views()])
        most = max(most, len(orders[-1][0]))
    assert most == 2
    assert all(order == ranks[0] for ranks in orders for order in ranks)
    launched = [[part.launched for part in view.fragments] for view in workers.views()]
    assert launched == [[12, 9, 10]] * toy.WORKERS


def test_messages_of_one_step_leave_in_one_order_on_all_ranks():
    """Parameters of two dtypes are one fragment in two messages, launched at the same step."""
    mixed = [p.float() if i == 1 else p for i, p in enumerate(toy.start())]
    left = [[] for _ in range(toy.WORKERS)]

    class Recorder(VirtualCommunicator):
        def all_reduce(self, buffer):
            left[self.rank].append(buffer.dtype)
            return super().all_reduce(buffer)

    make = partial(StreamingDiLoCo, tau=2, delay=1, lr=LR)
    workers = Lockstep(make, [mixed] * toy.WORKERS, communicator=Recorder)
    workers.run(4, toy.gradient)
    assert left == [[torch.float64, torch.float32] * 2] * toy.WORKERS


def test_a_tau_that_the_fragments_do_not_divide_keeps_every_period_exact():
    workers = Lockstep(
        partial(StreamingDiLoCo, tau=4, lr=LR, fragments=3), [toy.start()] * toy.WORKERS
    )
    launches = [[], [], []]
    for step in range(1, 13):
        workers.step(toy.gradient)
        for i, view in enumerate(inspect(workers.optimizers[0]).fragments):
            if view.launched == step:
                launches[i].append(step)
    assert launches == [[4, 8, 12], [1, 5, 9], [2, 6, 10]]


def test_workers_with_other_outer_optimizers_are_refused():
    """The functions differ in every process; what they make is compared."""
    facts = [
        inspect(
            toy.alone(DiLoCo, [torch.nn.Parameter(torch.zeros(2))], tau=TAU, outer=factory)
        ).rule.facts()["outer_settings"]
        for factory in (
            lambda a: torch.optim.Adam(a, lr=0.1),
            partial(torch.optim.Adam, lr=0.1),
            lambda a: torch.optim.Adam(a, lr=0.2),
        )
    ]
    assert facts[0] == facts[1] != facts[2]
    assert isinstance(facts[0], str)
