"""An inner optimizer that steps on copies of its half-precision parameters goes where the workers' means go."""

from __future__ import annotations

import copy

import pytest
import torch

from distoptim import ALGORITHMS, LocalSGD
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy

TAU = 3


class Plain(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.5 * p.grad)


class Master(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p]["master"] = p.detach().float().clone()
                self.state[p]["momentum"] = p.detach().float() + 1
            self.state[p]["master"].sub_(0.5 * p.grad.float())
            p.copy_(self.state[p]["master"])


def gradient(rank, params):
    """Of multiples of 1/2, exact in bfloat16."""
    return [torch.full_like(p, 2.0 * rank - 1) for p in params]


def workers(name, inner, **options):
    starts = [torch.zeros(2, 3), torch.ones(4), torch.zeros(())]
    return Lockstep(
        lambda params, communicator: ALGORITHMS[name](
            inner(params), communicator=communicator, tau=TAU, **options
        ),
        [[p.bfloat16() for p in starts]] * 2,
    )


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("options", [{}, {"fragments": 3}, {"codec": "bf16"}], ids=str)
def test_copies_follow_the_means(name, options):
    plain = workers(name, Plain, **options).run(4 * TAU + 1, gradient)
    run = workers(name, Master, **options)
    torch.testing.assert_close(run.run(4 * TAU + 1, gradient), plain, rtol=0.02, atol=0.02)
    state = run.optimizers[0].inner.state[run.params[0][0]]
    assert torch.equal(state["momentum"], torch.ones(2, 3))


def test_looking_at_the_mean_and_resuming_lose_no_bits_of_a_copy():
    def third(rank, params):
        return [torch.full_like(p, (2 * rank - 1) / 3) for p in params]

    expected = workers("local-sgd", Master)
    expected.run(TAU + 1, third)
    run = workers("local-sgd", Master)
    run.run(TAU + 1, third)
    saved = copy.deepcopy([o.state_dict() for o in run.optimizers])
    again = workers("local-sgd", Master)
    for mine, theirs in zip(again.params, run.params, strict=True):
        with torch.no_grad():
            torch._foreach_copy_(list(mine), list(theirs))
    for optimizer, state in zip(again.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    alone = toy.alone(LocalSGD, Master([torch.nn.Parameter(torch.zeros(3).bfloat16())]), tau=TAU)
    p = alone.param_groups[0]["params"][0]
    p.grad = torch.full_like(p, 1 / 3)
    alone.step()
    alone.state[p]["master"].add_(1e-6)
    before = alone.state[p]["master"].clone()
    with alone.averaged():
        pass
    p.grad.zero_()
    alone.step()
    assert torch.equal(alone.state[p]["master"], before)
    wanted = expected.run(2 * TAU, third)
    for other in (again, copy.deepcopy(run)):
        assert torch.equal(other.run(2 * TAU, third), wanted)
