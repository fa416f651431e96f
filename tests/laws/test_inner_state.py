"""State of the inner optimizer that is declared a copy of the parameters is merged as they are."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import distoptim
from distoptim import ALGORITHMS, CoCoDSGD, DiLoCo, LocalSGD, OverlapBMUF, OverlapLocalSGD
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.copies import COPIES
from tests.helpers.schedule_free import ScheduleFreeSGD

TAU = 3
BETA = 0.9
FORMS = [{}, {"fragments": 3}, {"codec": "bf16"}]
BLOCKING = {"local-sgd", "bmuf", "slowmo", "diloco"}


class Twin(torch.optim.Optimizer):
    """SGD that makes every step on the parameters and on a copy of them."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["twin"] = p.detach().clone()
            for x in (p, state["twin"]):
                x.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def declared(inner, names):
    distoptim.copies(inner, names)
    return inner


def workers(make, inner, names="z", *, dtype=torch.float64, start=toy.start, **options):
    return Lockstep(
        lambda params, communicator: make(
            declared(inner(params), names),
            communicator=communicator,
            **{"tau": TAU, **options},
        ),
        [start(dtype)] * toy.WORKERS,
    )


def held(run, name):
    """[workers, dimension]: that state of all."""
    return torch.stack(
        [
            torch.cat([optimizer.state[p][name].reshape(-1) for p in params])
            for optimizer, params in zip(run.optimizers, run.params, strict=True)
        ]
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def alike(rank, params):
    return toy.gradient(0, params)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_twin_of_the_parameters_stays_one_through_every_merge(name, options):
    run = workers(ALGORITHMS[name], Twin, "twin", dtype=torch.float32, **options)
    for _ in range(3 * TAU + 2):
        run.step(toy.gradient)
        # Kernels round the end of a tensor otherwise, and a code may magnify that.
        atol = 1e-3 if "codec" in options else 1e-6
        torch.testing.assert_close(held(run, "twin"), run.x(), rtol=0, atol=atol)
    assert not torch.equal(run.x()[0], run.x()[1])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("fragments", [1, 3])
def test_y_z_and_x_of_a_schedule_free_optimizer_go_on_belonging_together(name, fragments):
    """So x, which the optimizer makes of y and z, is merged by the rule by which they are."""
    inner = partial(ScheduleFreeSGD, beta=BETA)
    run = workers(ALGORITHMS[name], inner, fragments=fragments)
    other = workers(
        ALGORITHMS[name], partial(inner, explicit=True), ("z", "x"), fragments=fragments
    )
    for _ in range(3 * TAU + 2):
        run.step(toy.gradient)
        other.step(toy.gradient)
        close(other.x(), (1 - BETA) * held(other, "z") + BETA * held(other, "x"))
        if name != "co2":
            # Its gap is of all that a fragment holds.
            close(run.x(), other.x())
            close(held(run, "z"), held(other, "z"))
    if name in BLOCKING and fragments == 1:
        assert not (held(run, "z") == held(run, "z")[0]).all()
        run.step(toy.gradient)
        for value in (run.x(), held(run, "z")):
            assert (value == value[0]).all()


@pytest.mark.parametrize(
    "make",
    [
        LocalSGD,
        CoCoDSGD,
        partial(LocalSGD, delay=1),
        partial(OverlapBMUF, block_momentum=0),
        partial(LocalSGD, fragments=3),
    ],
    ids=str,
)
def test_equal_workers_are_one_that_nobody_averages(make):
    for inner, name in (
        (ScheduleFreeSGD, "z"),
        (partial(torch.optim.ASGD, lr=0.1, t0=2), "ax"),
    ):
        run = workers(make, inner, name)
        found = run.run(3 * TAU, alike)
        params = [torch.nn.Parameter(p) for p in toy.start()]
        alone = inner(params)
        for x in found:
            for p, g in zip(params, toy.gradient(0, [p.detach() for p in params]), strict=True):
                p.grad = g
            alone.step()
            close(x, torch.cat([p.detach().reshape(-1) for p in params]).expand_as(x))
        wanted = torch.cat([alone.state[p][name].reshape(-1) for p in params])
        close(held(run, name), wanted.expand(toy.WORKERS, -1))


def test_averaged_every_step_it_is_schedule_free_on_the_mean_gradient():
    found = workers(LocalSGD, ScheduleFreeSGD, tau=1).run(8, toy.gradient)
    params = [torch.nn.Parameter(p) for p in toy.start()]
    alone = ScheduleFreeSGD(params)
    for x in found:
        values = [p.detach() for p in params]
        each = [toy.gradient(rank, values) for rank in range(toy.WORKERS)]
        for p, *grads in zip(params, *each, strict=True):
            p.grad = torch.stack(grads).mean(0)
        alone.step()
        close(x, torch.cat([p.detach().reshape(-1) for p in params]).expand_as(x))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["local-sgd", "overlap-local-sgd"])
def test_a_copy_of_the_run_goes_on_bit_equally(how, name):
    make = partial(_made, name)
    steps = 2 * TAU + 1
    run = Lockstep(make, [toy.start()] * toy.WORKERS)
    run.run(steps, toy.gradient)
    going_on = COPIES[how](make, run)
    assert torch.equal(going_on.run(TAU, toy.gradient), run.run(TAU, toy.gradient))
    assert torch.equal(held(going_on, "z"), held(run, "z"))


def _made(name, params, communicator):
    inner = declared(ScheduleFreeSGD(params), "z")
    return ALGORITHMS[name](inner, tau=TAU, communicator=communicator)


def test_another_number_of_workers_starts_from_the_anchors_of_both():
    run = workers(OverlapLocalSGD, ScheduleFreeSGD)
    run.run(2 * TAU, toy.gradient)
    saved = copy.deepcopy(run.optimizers[0].state_dict())
    params = [torch.nn.Parameter(p) for p in toy.start()]
    optimizer = toy.alone(OverlapLocalSGD, declared(ScheduleFreeSGD(params), "z"), tau=TAU)
    optimizer.load_state_dict(copy.deepcopy(saved))
    anchor = run.anchors()[0]
    y = torch.cat([p.detach().reshape(-1) for p in params])
    z = torch.cat([optimizer.state[p]["z"].reshape(-1) for p in params])
    assert torch.equal(torch.cat([y, z]), anchor)
    with pytest.raises(ValueError, match="checkpoint has fragments"):
        toy.alone(OverlapLocalSGD, ScheduleFreeSGD(params), tau=TAU).load_state_dict(saved)


def test_they_are_sent_and_begin_at_the_value_of_rank_0():
    """Of an optimizer that has made steps before."""
    params = [torch.nn.Parameter(torch.ones(5))]
    inner = declared(Twin(params), "twin")
    params[0].grad = torch.ones(5)
    inner.step()
    optimizer = toy.alone(LocalSGD, inner, tau=1)
    for name, numel in (("copies", 10), ("params", 5)):
        found = inspect(optimizer).fragments[0]
        assert {"copies": found.numel, "params": sum(p.numel() for p in found.params)}[
            name
        ] == numel
    optimizer.step()
    optimizer.average()
    assert optimizer.stats()["bytes"] == inspect(optimizer).fragments[0].buffer.nbytes
    assert optimizer.consensus_distance() == 0


def test_master_weights_that_are_declared_are_averaged_unrounded():
    class Master(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("master", p.detach().float())
                self.state[p]["master"].sub_(p.grad.float())
                p.copy_(self.state[p]["master"])

    run = workers(LocalSGD, Master, "master", start=lambda _: [torch.ones(4).bfloat16()], tau=1)
    run.step(lambda rank, params: [torch.full_like(p, 2.0**-9 * (1 + rank)) for p in params])
    mean = 1 - 2.0**-9 * (1 + (toy.WORKERS - 1) / 2)
    assert (held(run, "master") == mean).all()
    assert (run.x() == torch.tensor(mean).bfloat16()).all()
    run.step(toy.zero)
    assert (held(run, "master") == mean).all()


def test_declarations_that_cannot_be_kept():
    def made(**options):
        params = [torch.nn.Parameter(torch.ones(2))]
        params[0].grad = torch.ones(2)
        return declared(Twin(params), options.pop("names", "twin")), options

    with pytest.raises(ValueError, match=r"copies\(LocalSGD\): allowed is the inner optimizer"):
        distoptim.copies(toy.alone(LocalSGD, made()[0], tau=2), "twin")
    with pytest.raises(ValueError, match="names=3: allowed are names of state"):
        distoptim.copies(made()[0], 3)
    with pytest.raises(ValueError, match=r"names=\[''\]: allowed are names of state"):
        distoptim.copies(made()[0], [""])
    with pytest.raises(ValueError, match=r"reset_inner=True: \['twin'\].*allowed is False"):
        toy.alone(LocalSGD, made()[0], tau=2, reset_inner=True)
    optimizer = toy.alone(LocalSGD, made(names="master")[0], tau=2)
    with pytest.raises(ValueError, match=r"copies 'master': Twin has no such state; .* twin"):
        optimizer.step()
    for value, message in (
        (torch.ones(1), r"\[1\] beside a parameter of shape \[2\]; allowed are whole"),
        (3, "int beside a parameter"),
        (torch.ones(2, dtype=torch.int64), "torch.int64; allowed is the kind of torch.float32"),
        (torch.ones(2, dtype=torch.float64), "torch.float64 beside torch.float32"),
    ):
        inner = made(names="odd")[0]
        inner.state[inner.param_groups[0]["params"][0]].update(odd=value, twin=torch.ones(2))
        with pytest.raises(ValueError, match=f"copies 'odd': {message}"):
            toy.alone(LocalSGD, inner, tau=2)


def test_a_copy_that_nobody_has_declared_is_warned_of_once():
    def steps(inner, say=None):
        params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.zeros(2))]
        made = inner(params)
        if say is not None:
            distoptim.copies(made, say)
        optimizer = toy.alone(DiLoCo, made, tau=2)
        for _ in range(4):
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            optimizer.step()
            optimizer.average()

    with pytest.warns(RuntimeWarning, match=r"keeps 'z', which looks like a copy") as found:
        steps(partial(ScheduleFreeSGD, lr=0.1))
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(ScheduleFreeSGD, say=())
        steps(ScheduleFreeSGD, say="z")
        steps(partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def test_hooks_run_once_and_the_state_is_the_inner_one():
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = toy.alone(LocalSGD, params, lr=1.0, momentum=0.9, tau=2)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("post", o))),
    ]
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("saving", o)))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o)))
    try:
        params[0].grad = torch.ones(2)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    inner = optimizer.inner
    assert calls == [("pre", inner), ("post", inner)]
    assert optimizer.state is inner.state
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.state = type(inner.state)(dict)
    assert inner.state is optimizer.state
    assert not inner.state
    optimizer.load_state_dict(saved)
    assert calls[2:] == [("saving", optimizer), ("loaded", optimizer)]
    assert torch.equal(inner.state[params[0]]["momentum_buffer"], torch.ones(2))
