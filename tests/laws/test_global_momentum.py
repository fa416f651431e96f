"""The momentum that a user's optimizer has acts in the workers' mean, at every step, whatever the codec."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import math
import warnings
from functools import partial

import pytest
import torch

from distoptim import GlobalMomentum, OverlapBMUF
from distoptim.comm import Link
from distoptim.simulator import Cluster, Constant, Ring
from distoptim.testing.lockstep import Lockstep
from distoptim.testing.processes import run
from tests.helpers import coded, toy
from tests.helpers.copies import resumed

STEPS = 12


def run_of(inner, *, start=toy.start, workers=toy.WORKERS, **options):
    return Lockstep(
        lambda params, communicator: GlobalMomentum(
            inner(params), communicator=communicator, **options
        ),
        [start()] * workers,
    )


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def mean_gradient(params, workers=toy.WORKERS, gradient=toy.gradient):
    values = [p.detach() for p in params]
    each = [gradient(rank, values) for rank in range(workers)]
    return [torch.stack(grads).mean(0) for grads in zip(*each, strict=True)]


def alone(inner, steps=STEPS):
    """[steps, dimension]: one optimizer on the mean gradient."""
    params = [torch.nn.Parameter(p) for p in toy.start()]
    optimizer = inner(params)
    out = []
    for _ in range(steps):
        for p, g in zip(params, mean_gradient(params), strict=True):
            p.grad = g
        optimizer.step()
        out.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return torch.stack(out)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_delay_and_codec_it_is_nesterovs_sgd_on_the_mean_gradient(nesterov):
    found = run_of(partial(SGD, nesterov=nesterov), delay=0, gain=1).run(STEPS, toy.gradient)
    close(found, alone(partial(SGD, nesterov=True))[:, None].expand_as(found))


@pytest.mark.parametrize("options", [{}, {"gain": 0.3}], ids=str)
@pytest.mark.parametrize("inner", [SGD, partial(SGD, weight_decay=0.1)])
def test_the_workers_mean_is_on_the_heavy_balls_trajectory_one_step_late(inner, options):
    """On quadratics of one curvature, where the mean of gradients is the gradient at the mean."""
    found = run_of(inner, **options).run(STEPS, toy.gradient)
    close(found.mean(1), alone(inner))
    assert not torch.allclose(found[:, 0], found[:, 1])


GROUPS = [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.5}]


def in_groups(inner, groups):
    return lambda params: inner(
        [
            {"params": params[:2], **groups[0]},
            {"params": params[2:], **groups[1]},
        ]
    )


def test_the_recursion_with_groups_schedules_and_cycled_momentum():
    """X' = X + mean local step + beta (lr at the launch / that of the launch before) (X - X before)."""
    cluster = run_of(in_groups(torch.optim.SGD, GROUPS))
    xs: list = []
    lrs: list = []
    for step in range(4 * STEPS):
        for optimizer in cluster.optimizers:
            for group, start in zip(optimizer.param_groups, GROUPS, strict=True):
                # Through 0, as a restart does.
                group["lr"] = start["lr"] * ((step + 1) % 5) / 4
                group["momentum"] = start["momentum"] - 0.1 * (step % 3)
        xs.append(means(cluster))
        lrs.append([group["lr"] for group in cluster.optimizers[0].param_groups])
        beta = [group["momentum"] for group in cluster.optimizers[0].param_groups]
        grads = [
            toy.gradient(rank, [p.detach() for p in mine])
            for rank, mine in enumerate(cluster.params)
        ]
        cluster.step(toy.gradient)
        for i, group in enumerate((0, 0, 1)):
            wanted = xs[-1][i] - lrs[-1][group] * torch.stack([g[i] for g in grads]).mean(0)
            if step > 1:
                last = lrs[-2][group]
                older = lrs[-3][group]
                ratio = last / older if older else 0.0
                wanted = wanted + beta[group] * ratio * (xs[-1][i] - xs[-2][i])
            elif step == 1:
                # The start counts as launched at the learning rate of then.
                ratio = lrs[0][group] / GROUPS[group]["lr"]
                wanted = wanted + beta[group] * ratio * (xs[-1][i] - xs[-2][i])
            close(means(cluster)[i], wanted)


def means(cluster):
    """Of each parameter, over the workers."""
    return [torch.stack(each).mean(0).detach() for each in zip(*cluster.params, strict=True)]


@pytest.mark.filterwarnings("ignore:all workers have sent equal")
@pytest.mark.parametrize("gain", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("curvature", [0.0, 0.5, 1.0])
def test_differences_shrink_by_what_a_local_step_leaves_less_the_gain(gain, curvature):
    def gradient(rank, params):
        return [p * curvature for p in params]

    cluster = run_of(partial(torch.optim.SGD, lr=1.0, momentum=0.5), gain=gain)
    cluster.step(lambda rank, params: [torch.full_like(p, 1.0 + rank) for p in params])
    cluster.step(gradient)
    apart = [cluster.x() - cluster.x().mean(0)]
    for _ in range(4):
        cluster.step(gradient)
        apart.append(cluster.x() - cluster.x().mean(0))
    for before, after in itertools.pairwise(apart):
        close(after, (1 - curvature - gain) * before)
    assert abs(1 - curvature - gain) <= 1


@pytest.mark.parametrize(
    ("momentum", "gain", "bound"),
    [(0.0, 0.7, 1.3), (0.0, 0.4, 1.6), (0.9, 0.7, 2.47), (0.9, 0.4, 3.04)],
)
def test_workers_bear_less_than_their_mean_and_more_with_momentum_of_their_own(
    momentum, gain, bound
):
    """In lr times curvature, as docs/every-step.md says; the mean alone bears 2 (1 + 0.9)."""

    def apart(lr):
        def make(params, communicator):
            if not momentum:
                inner = torch.optim.SGD(params, lr=lr, momentum=0.9)
                return GlobalMomentum(inner, gain=gain, communicator=communicator)
            inner = torch.optim.SGD(params, lr=lr, momentum=momentum)
            return OverlapBMUF(inner, tau=1, block_momentum=0, gain=gain, communicator=communicator)

        x = Lockstep(make, [toy.start()] * 2).run(
            200, lambda rank, params: [p - rank for p in params]
        )
        differences = x[:, 0] - x[:, 1]
        return float(differences[-50:].norm() / differences[50:100].norm())

    assert apart(0.95 * bound) < 1.1
    assert apart(1.05 * bound) > 10


def test_consensus_is_a_fixed_point_and_permuted_workers_permute_it():
    cluster = run_of(SGD)
    start = cluster.x()
    close(cluster.run(STEPS, toy.zero), start.expand(STEPS, -1, -1))
    order = [2, 0, 3, 1]
    found = run_of(SGD).run(STEPS, toy.gradient)
    permuted = run_of(SGD).run(STEPS, lambda rank, params: toy.gradient(order[rank], params))
    close(permuted, found[:, order])


def owed(cluster):
    """What the codes of means have lost and not sent yet, of all parts; 0 where there are none."""
    coded_means = [view.fragments[0].coded for view in cluster.views()]
    assert all(coded_mean.residual is None for coded_mean in coded_means)
    parts = [
        coded_mean.mean_residual
        for coded_mean in coded_means
        if coded_mean.mean_residual is not None
    ]
    return torch.cat(parts).double() if parts else 0.0


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("codec", ["int8", "e3m0", "2bit+ef"])
def test_what_codes_lose_is_in_the_parameters_or_in_the_means_residual(codec, workers):
    """X - X(0) = all mean local steps + beta (z - z(0)) - gain (what the means' codes still owe)."""
    beta, gain, lr = 0.8, 0.6, 0.01
    inner = partial(torch.optim.SGD, lr=lr, momentum=beta)
    cluster = run_of(inner, start=lambda: coded.START, workers=workers, codec=codec, gain=gain)
    start = cluster.x().double().mean(0)
    steps = torch.zeros_like(start)
    for _ in range(20):
        grads = [
            torch.cat([g.reshape(-1) for g in coded.gradient(rank, [p.detach() for p in mine])])
            for rank, mine in enumerate(cluster.params)
        ]
        steps -= lr * torch.stack(grads).double().mean(0)
        # Of the mean in flight, the last that will have been merged.
        left = owed(cluster)
        cluster.step(coded.gradient)
    first, *others = cluster.anchors()
    assert all(torch.equal(first, other) for other in others)
    expected = start + steps + beta * (first.double() - start) - gain * left
    close(cluster.x().double().mean(0), expected, 2e-5)


@pytest.mark.parametrize("codec", ["e3m0", "2bit"])
def test_few_bits_train_as_float32_does(codec):
    """To within a hundredth of the way that a quadratic's mean has to go."""
    inner = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    cluster = run_of(inner, start=lambda: coded.START, codec=codec)
    cluster.run(120, coded.gradient)
    minimum = torch.stack(
        [torch.cat([c.reshape(-1) for c in coded.MINIMA[r]]) for r in range(toy.WORKERS)]
    ).mean(0)
    start = torch.cat([p.reshape(-1) for p in coded.START])
    way = float((start - minimum).norm())
    assert float((cluster.x().mean(0) - minimum).norm()) < (0.01 if codec != "2bit" else 0.05) * way


@pytest.mark.parametrize("workers", [2, 4])
def test_codes_weigh_as_samples_do(workers):
    found = []
    for codec in (None, "bf16"):
        cluster = run_of(SGD, start=lambda: coded.START, workers=workers, codec=codec)
        for step in range(6):
            cluster.step(coded.gradient, samples=[1.0 + rank + step % 2 for rank in range(workers)])
        found.append(cluster.x())
    close(*found, 0.02)
    assert not torch.equal(*found)


@pytest.mark.parametrize("workers", [2, 3])
def test_resuming_in_flight_is_bit_equal_also_with_codes_in_two_stages(workers):
    def make(params, communicator):
        return GlobalMomentum(SGD(params), communicator=communicator)

    cluster = Lockstep(make, [coded.START] * workers)
    cluster.run(3, coded.gradient)
    going_on = resumed(make, cluster)
    assert torch.equal(going_on.run(4, coded.gradient), cluster.run(4, coded.gradient))
    # Codes are a worker's own.
    saved = copy.deepcopy([o.state_dict() for o in cluster.optimizers])
    del saved[0]["distoptim"]["fragments"][0]["compressed"]["sent"]
    with pytest.raises(ValueError, match="damaged"):
        cluster.optimizers[0].load_state_dict(saved[0])


def test_it_is_overlap_bmuf_but_for_the_learning_rate_and_what_codes_lose():
    left = run_of(SGD, gain=0.5).run(STEPS, toy.gradient)
    right = Lockstep(
        lambda params, communicator: OverlapBMUF(
            params, lr=0.1, tau=1, block_momentum=0.9, gain=0.5, communicator=communicator
        ),
        [toy.start()] * toy.WORKERS,
    ).run(STEPS, toy.gradient)
    close(left, right)


# What is handed over


def seen_inside(inner, **options):
    """Hyperparameters of the first group within a step and after it, and the optimizer."""
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = toy.alone(GlobalMomentum, inner(params), **options)
    seen = []
    optimizer.inner.register_step_pre_hook(lambda o, *_: seen.append(dict(o.param_groups[0])))
    params[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.average()
    return seen[0], dict(optimizer.param_groups[0]), optimizer


@pytest.mark.parametrize(
    ("inner", "key", "inside", "factor"),
    [
        (SGD, "momentum", 0, 1),
        (partial(SGD, nesterov=True), "momentum", 0, 1),
        (partial(SGD, nesterov=True, fused=True), "momentum", 0, 1),
        (partial(SGD, dampening=0.2), "momentum", 0, 0.8),
        (partial(torch.optim.RMSprop, lr=0.1, momentum=0.5), "momentum", 0, 1),
        (partial(torch.optim.Adam, lr=0.1), "betas", (0, 0.999), 0.1),
        (partial(torch.optim.AdamW, lr=torch.tensor(0.1)), "betas", (0, 0.999), 0.1),
        (partial(torch.optim.RAdam, lr=0.1, betas=(0.8, 0.9)), "betas", (0, 0.9), 0.2),
        (partial(torch.optim.Adamax, lr=0.1, betas=[0.8, 0.9]), "betas", [0, 0.9], 0.2),
    ],
)
def test_momentum_is_moved_and_param_groups_are_the_users(inner, key, inside, factor):
    given = inner([torch.nn.Parameter(torch.ones(3))]).param_groups[0]
    within, after, optimizer = seen_inside(inner)
    assert within[key] == inside
    assert float(within["lr"]) == pytest.approx(0.1 * factor)
    assert after[key] == given[key]
    assert after["lr"] is given["lr"] or after["lr"] == given["lr"]
    beta = given[key] if key == "momentum" else given[key][0]
    for word in (f"{beta:g}", f"{factor:g} times the learning rate", "E3M0", "gain 0.7"):
        assert word in optimizer.moved
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state.get("momentum_buffer") is None


def test_what_was_done_is_said_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "distoptim"):
        _, _, optimizer = seen_inside(SGD)
    assert optimizer.moved in caplog.text


def test_a_step_that_fails_leaves_the_param_groups_as_they_were():
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = toy.alone(GlobalMomentum, torch.optim.AdamW(params, lr=0.1))

    def closure():
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("inner", [SGD, partial(torch.optim.AdamW, lr=0.1)])
def test_a_schedule_that_cycles_momentum_drives_the_means(inner):
    cluster = run_of(inner)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
        for optimizer in cluster.optimizers
    ]
    for _ in range(4):
        cluster.step(toy.gradient)
        for schedule in schedules:
            schedule.step()
    before = cluster.x()
    z = cluster.anchors()[0]
    group = cluster.optimizers[0].param_groups[0]
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    assert 0.85 < momentum < 0.95
    if inner is SGD:
        ratio = cluster.optimizers[0].engine.syncs[0].pending.lr[0]
        ratio /= cluster.views()[0].fragments[0].shared["lr"][0]
        cluster.step(toy.zero)
        moved = cluster.anchors()[0] - z
        close(cluster.x().mean(0), before.mean(0) + momentum * ratio * moved)


class Own(torch.optim.Optimizer):
    """A sum of gradients with a name of its own."""

    def __init__(self, params, lr=0.1, memory=0.9, momentum=0.5):
        super().__init__(params, {"lr": lr, "memory": memory, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                p.sub_(v.mul_(group["memory"]).add_(p.grad), alpha=group["lr"])


def test_momentum_that_is_not_known_is_kept_with_one_warning():
    message = r"Own keeps its momentum.*momentum_key=.*global_momentum="
    with pytest.warns(RuntimeWarning, match=message) as told:
        within, after, optimizer = seen_inside(Own)
    assert len(told) == 1
    assert told[0].filename == toy.__file__
    assert within == after
    assert "momentum 0 of the workers' mean beside Own's own, which is kept" in optimizer.moved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within, _, _ = seen_inside(Own, momentum_key="memory")
        assert within["memory"] == 0
        _, _, optimizer = seen_inside(partial(torch.optim.Adagrad, lr=0.1))
        assert "momentum 0 of" in optimizer.moved
        seen_inside(partial(torch.optim.Adagrad, lr=0.1), global_momentum=0.8)
    found = run_of(Own, momentum_key="memory").run(STEPS, toy.gradient)
    close(found, run_of(SGD).run(STEPS, toy.gradient))
    found = run_of(partial(torch.optim.SGD, lr=0.1), gmf=0.9).run(STEPS, toy.gradient)
    close(found, run_of(SGD).run(STEPS, toy.gradient))


def test_what_cannot_be_moved_is_refused():
    params = [torch.nn.Parameter(torch.ones(3))]
    for inner, name in ((SGD(params), "momentum_buffer"), (torch.optim.Adam(params), "exp_avg")):
        params[0].grad = torch.ones(3)
        inner.step()
        with pytest.raises(
            ValueError, match=rf"has made steps: its '{name}' holds momentum.*allowed"
        ):
            toy.alone(GlobalMomentum, inner)
        inner.state[params[0]][name].zero_()
        toy.alone(GlobalMomentum, inner)
    for options, message in (
        ({"momentum_key": "beta"}, r"momentum_key='beta': param group 0 has none; allowed are lr"),
        ({"momentum_key": "nesterov"}, r"nesterov of param group 0=False: allowed is a number"),
        ({"global_momentum": 0.5}, r"global_momentum=0.5 beside momentum=0.9.*two momenta"),
        ({"gmf": 1}, r"gmf=1: allowed is a number in \[0, 1\)"),
        ({"gain": 0}, r"gain=0: allowed is a number in \(0, 1\]"),
        ({"codec": "3bit"}, r"codec='3bit': allowed is"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.alone(GlobalMomentum, SGD(params), **options)
    double = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    with pytest.raises(ValueError, match=r"codec=.*E3M0.*averaged in torch.float64"):
        toy.alone(GlobalMomentum, SGD(double), codec="e3m0")
    with pytest.raises(ValueError, match=r"momentum of param group 0=1\.5: allowed is"):
        toy.alone(GlobalMomentum, torch.optim.SGD(params, lr=0.1, momentum=1.5))


# What it costs


@pytest.mark.parametrize(("workers", "codec"), [(2, "e3m0"), (3, "e3m0"), (8, "int8"), (3, None)])
def test_three_copies_of_the_model_are_enough(workers, codec):
    """Counted while a mean is in flight: all storages that a worker holds beyond its optimizer's."""
    numel = 3 * 2**16

    def storages():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in tensors
            if x.layout is torch.strided and x.device.type == "cpu"
        }

    before = sum(storages().values())
    cluster = run_of(SGD, start=lambda: [torch.zeros(numel)], workers=workers, codec=codec)
    for _ in range(3):
        cluster.step(lambda rank, params: [torch.full_like(p, float(rank)) for p in params])
    assert all(not optimizer.state for optimizer in cluster.optimizers)
    # Less the parameters, and what stands for the network; and 4096 numbers are always noted.
    held = sum(storages().values()) - before - 4 * numel
    copies = (held / workers - 4 * 4096) / (4 * numel) - 1
    assert copies <= {None: 3, "e3m0": 2.8, "int8": 3}[codec] + 0.001
    nbytes = cluster.optimizers[0].stats()["bytes"] / 3 / numel
    assert nbytes == pytest.approx({"e3m0": 0.504, "int8": 1.02, None: 4}[codec], rel=0.03)


def test_means_that_take_longer_than_a_step_are_warned_of_once():
    def steps(latency_s, count):
        virtual = Cluster(
            workers=2,
            model=lambda: torch.nn.Linear(8, 1),
            optimizer=lambda params, communicator: GlobalMomentum(
                params, lr=0.01, momentum=0.9, communicator=communicator
            ),
            compute=Constant(0.01),
            network=Ring([Link(latency_s, math.inf)]),
            threads=1,
        )
        for _ in range(count):
            virtual.step(lambda model, rank: model(torch.ones(1, 8) * rank).square().mean())

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        steps(0.001, 70)
    with pytest.warns(
        RuntimeWarning, match=r"means take .* ms and local steps 10 ms.*tau=\d+ hides"
    ):
        steps(0.02, 70)


# Real workers


def _over_gloo(rank):
    params = [torch.nn.Parameter(p.clone()) for p in coded.START]
    optimizer = GlobalMomentum(torch.optim.SGD(params, lr=0.02, momentum=0.9))
    out = []
    for _ in range(STEPS):
        for p, g in zip(params, coded.gradient(rank, [p.detach() for p in params]), strict=True):
            p.grad = g
        optimizer.step()
        optimizer.average()
        out.append(torch.cat([p.detach().reshape(-1) for p in params]))
    sent = optimizer.stats()["bytes"]
    optimizer.close()
    return torch.stack(out), sent


def test_real_workers_compute_what_virtual_ones_do():
    found = run(_over_gloo, 3)
    workers = run_of(
        partial(torch.optim.SGD, lr=0.02, momentum=0.9), start=lambda: coded.START, workers=3
    )
    x = workers.run(STEPS, coded.gradient)
    for rank, (mine, sent) in enumerate(found):
        assert torch.equal(mine, x[:, rank])
        assert sent == workers.optimizers[rank].stats()["bytes"]
