"""The optimizer in a training script.

Mixed precision, schedulers, odd parameters, checkpoints, evaluation.
"""

from __future__ import annotations

import copy
import io
import linecache
import subprocess
import sys
import warnings
from functools import partial
from typing import final

import pytest
import torch
from torch.utils._pytree import tree_leaves

import distoptim
from distoptim import (
    ALGORITHMS,
    EASGD,
    AveragingOptimizer,
    CoCoDSGD,
    LocalSGD,
    OverlapLocalSGD,
    SlowMo,
)
from distoptim.comm import SingleWorker
from distoptim.periods import PostLocal
from distoptim.rule import Average
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.script import parameters, set_gradients, train
from tests.helpers.toy import alone

TAU = 3


# Mixed precision, accumulation, schedulers


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_steps_but_not_the_phase(fused):
    """Two workers, one of which overflows: unfused, the scaler does not even call its step()."""
    workers = Lockstep(
        lambda params, **o: LocalSGD(torch.optim.SGD(params, lr=0.1, fused=fused), tau=TAU, **o),
        [parameters(2) for _ in range(2)],
    )
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in workers.optimizers]
    for step in range(2 * TAU):
        for rank, (optimizer, params, scaler) in enumerate(
            zip(workers.optimizers, workers.params, scalers, strict=True)
        ):
            overflow = rank == 1 and step in (1, 3)
            before = params[0].detach().clone()
            scaler.scale(params[0].sum() * (float("inf") if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            expected = before if overflow else before - 0.1
            torch.testing.assert_close(params[0].detach(), expected)
        workers.average()
        assert torch.equal(*workers.x()) == (step in (0, TAU - 1, 2 * TAU - 1))
    assert [o.stats()["syncs"] for o in workers.optimizers] == [2, 2]


def test_gradient_accumulation_counts_averages_not_micro_batches():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2, lr=0.1)
    for _ in range(4):
        for _ in range(3):
            (params[0].sum() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
    assert (optimizer.stats()["steps"], optimizer.stats()["syncs"]) == (4, 2)
    torch.testing.assert_close(params[0].detach(), torch.full((2,), 0.6))


@pytest.mark.parametrize("made", ["before", "after"])
def test_a_scheduler_acts_before_and_after_load_state_dict(made):
    params = parameters(2)
    optimizer = alone(OverlapLocalSGD, params, tau=TAU, lr=0.4)
    saved = copy.deepcopy(optimizer.state_dict())
    make = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    if made == "before":
        scheduler = make(optimizer)
        optimizer.load_state_dict(saved)
    else:
        optimizer.load_state_dict(saved)
        scheduler = make(optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    set_gradients(params)
    optimizer.step()
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.2
    before = params[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - params[0].detach(), torch.full((2,), 0.2))


def test_one_cycle_lr():
    params = parameters(2)
    optimizer = alone(SlowMo, params, tau=TAU, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    rates, momenta = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            train(optimizer, params, 1)
            rates.append(optimizer.inner.param_groups[0]["lr"])
            momenta.append(optimizer.inner.param_groups[0]["momentum"])
            if len(rates) < 10:
                scheduler.step()
    assert max(rates) > 0.9
    assert min(momenta) < 0.9


# Parameters of all kinds


class Odd(torch.nn.Module):
    """Tied, frozen, unused, 0-dim, empty, transposed, strided, channels_last, half and complex parameters."""

    def __init__(self):
        super().__init__()
        base = torch.arange(24.0)
        self.weight = torch.nn.Parameter(base[:6].reshape(2, 3).clone())
        self.tied = self.weight
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.scalar = torch.nn.Parameter(torch.tensor(1.0))
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.transposed = torch.nn.Parameter(base[:6].reshape(2, 3).clone().t())
        self.strided = torch.nn.Parameter(base.clone()[::2])
        self.channels_last = torch.nn.Parameter(
            base.reshape(2, 3, 2, 2).clone().to(memory_format=torch.channels_last)
        )
        self.p_bfloat16 = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.p_float64 = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.p_complex64 = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def set_gradients(self, rank):
        for name, p in self.named_parameters():
            if p.requires_grad and name != "unused":
                p.grad = torch.ones_like(p) * (rank + 1)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("fragments", [1, 3])
def test_parameters_of_all_kinds(name, fragments):
    modules = [Odd() for _ in range(2)]
    cluster = Lockstep(
        partial(ALGORITHMS[name], tau=TAU, lr=0.01, fragments=fragments),
        [list(module.parameters()) for module in modules],
    )
    layout = {n: (p.data_ptr(), p.stride(), p.dtype) for n, p in modules[0].named_parameters()}
    start = {n: p.detach().clone() for n, p in modules[0].named_parameters()}
    for _ in range(3 * TAU):
        for rank, (module, optimizer) in enumerate(zip(modules, cluster.optimizers, strict=True)):
            module.set_gradients(rank)
            optimizer.step()
            optimizer.zero_grad()
        cluster.average()
    for optimizer in cluster.optimizers:
        # Tied once, frozen not at all, unused all the same.
        assert sum(len(view.params) for view in inspect(optimizer).fragments) == 10
    # All elements got the same gradients, so all of one fragment moved by the same amount.
    moved = {n: start[n] - p.detach() for n, p in modules[0].named_parameters()}
    expected = moved["scalar"]
    assert expected > 0
    for n, p in modules[0].named_parameters():
        assert (p.data_ptr(), p.stride(), p.dtype) == layout[n], n
        if fragments > 1:
            continue
        want = torch.zeros(()) if n in ("frozen", "unused") else expected
        loose = n == "p_bfloat16"
        torch.testing.assert_close(
            moved[n],
            want.to(p.dtype).expand(p.shape),
            rtol=0.1 if loose else 1e-4,
            atol=0.01 if loose else 1e-4,
        )


def test_bfloat16_parameters_have_float32_anchors():
    """The anchor remembers steps that are too small for the parameters' own dtype."""
    params = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    optimizer = alone(OverlapLocalSGD, params, tau=1, lr=0.001)
    train(optimizer, params, 3)
    (view,) = inspect(optimizer).fragments
    assert view.anchor.dtype == view.buffer.dtype == torch.float32
    assert params[0].dtype == torch.bfloat16


@pytest.mark.parametrize("change", [1.0, 0.5, 0.0])
def test_momentum_is_rescaled_per_param_group(change):
    """Two groups, of which one's learning rate changes, are two optimizers."""

    def make(params, **o):
        return OverlapLocalSGD(
            [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}], tau=TAU, **o
        )

    def split(keep, lr, params, **o):
        return OverlapLocalSGD(params[keep], lr=lr, tau=TAU, **o)

    both = Lockstep(make, [toy.start()] * 2)
    first, second = (
        Lockstep(partial(split, keep, lr), [toy.start()] * 2)
        for keep, lr in ((slice(0, 1), 0.1), (slice(1, 3), 0.2))
    )
    for step in range(4 * TAU):
        if step == 2 * TAU - 1:
            for optimizer in both.optimizers:
                optimizer.param_groups[1]["lr"] *= change
            for optimizer in second.optimizers:
                optimizer.param_groups[0]["lr"] *= change
        both.step(toy.gradient)
        for cluster, keep in ((first, slice(0, 1)), (second, slice(1, 3))):
            # Parameters outside `keep` stay, without a gradient.
            cluster.step(
                lambda rank, params, keep=keep: [
                    g if keep.start <= i < keep.stop else None
                    for i, g in enumerate(toy.gradient(rank, params))
                ]
            )
        x = both.x()
        assert torch.equal(x[:, :6], first.x()[:, :6])
        assert torch.equal(x[:, 6:], second.x()[:, 6:])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learning_rate_0(name):
    params = parameters(2)
    optimizer = alone(ALGORITHMS[name], params, tau=2, lr=0.0)
    train(optimizer, params, 4)
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, params, 6)
    assert torch.isfinite(params[0]).all()
    assert (params[0] < 1).all()


# The inner optimizer, closures and hooks


def test_lbfgs_with_a_closure():
    params = parameters(2)
    optimizer = alone(LocalSGD, torch.optim.LBFGS(params, lr=0.5), tau=2)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        optimizer.average()
    assert losses[-1] < 1e-3 < losses[0]
    assert optimizer.stats()["syncs"] == 3


def test_closure_of_sgd_returns_its_loss():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2)
    assert optimizer.step(lambda: 3.0) == 3.0


def test_adamw_inside():
    params, plain = parameters(2), parameters(2)
    optimizer = alone(LocalSGD, torch.optim.AdamW(params, lr=0.1), tau=2)
    reference = torch.optim.AdamW(plain, lr=0.1)
    for _ in range(4):
        set_gradients(plain)
        reference.step()
    train(optimizer, params, 4)
    torch.testing.assert_close(params[0], plain[0])
    assert optimizer.state is optimizer.inner.state


def test_step_hooks():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2)
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o is optimizer)))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: calls.append(("post", o is optimizer))
    )
    optimizer.inner.register_step_post_hook(
        lambda o, args, kwargs: calls.append(("inner", o is optimizer.inner))
    )
    train(optimizer, params, 1)
    assert calls == [("pre", True), ("inner", True), ("post", True)]


def test_zero_grad():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2)
    set_gradients(params)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(params[0].grad, torch.zeros(2))
    optimizer.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize(
    "new", [torch.nn.Parameter(torch.ones(2)), [torch.nn.Parameter(torch.ones(2))]]
)
def test_add_param_group_is_refused(new):
    optimizer = alone(LocalSGD, parameters(2), tau=2)
    with pytest.raises(ValueError, match="fixed at construction"):
        optimizer.add_param_group({"params": new})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("given", [{"lr": 0.1}, {"momentum": 0.9}, {"lr": 0.1, "nesterov": True}])
def test_arguments_of_the_inner_optimizer_beside_one_are_refused(given):
    with pytest.raises(
        ValueError, match=f"{', '.join(given)}: belongs to the optimizer that was given"
    ):
        alone(LocalSGD, torch.optim.SGD(parameters(2)), tau=2, **given)


def test_an_averaging_optimizer_cannot_be_inner():
    inner = alone(LocalSGD, parameters(2), tau=2)
    with pytest.raises(ValueError, match="cannot be the inner optimizer"):
        alone(LocalSGD, inner, tau=2)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to average"):
        alone(LocalSGD, [torch.nn.Parameter(torch.ones(2), requires_grad=False)], tau=2)


def test_arguments_of_the_original_code():
    optimizer = alone(
        OverlapLocalSGD,
        parameters(2),
        lr=0.1,
        tau=2,
        gmf=0.3,
        size=1,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
    )
    assert inspect(optimizer).rule.facts()["outer_momentum"] == 0.3


def test_average_in_step():
    def run(**options):
        params = parameters(2)
        optimizer = alone(LocalSGD, params, tau=2, lr=0.1, **options)
        for _ in range(4):
            set_gradients(params)
            optimizer.step()
            if not options:
                optimizer.average()
        return optimizer, params[0].detach()

    ours, in_step = run(average_in_step=True)
    theirs, by_hand = run()
    assert torch.equal(in_step, by_hand)
    assert ours.stats()["syncs"] == theirs.stats()["syncs"] == 2
    with pytest.raises(RuntimeError, match="average_in_step"):
        ours.average()


def test_reset_inner_forgets_the_momentum_at_every_merge():
    def momenta(reset, tau=2, steps=4):
        params = parameters(2)
        optimizer = alone(LocalSGD, params, tau=tau, lr=0.1, momentum=0.9, reset_inner=reset)
        out = []
        for _ in range(steps):
            train(optimizer, params, 1)
            out.append("momentum_buffer" in optimizer.state.get(params[0], {}))
        return out

    assert momenta(False) == [True, True, True, True]
    assert momenta(True) == [True, False, True, False]
    # Synchronous steps are those of one optimizer, which forgets nothing.
    assert momenta(True, PostLocal(start=3, tau=2), 5) == [True, True, True, True, False]


# Flush and evaluation. In lockstep, collective calls of all workers need real processes, unless one
# is alone.


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("at", [1, TAU, TAU + 2])
def test_flush_begins_a_new_round(name, at):
    params = parameters(2)
    optimizer = alone(ALGORITHMS[name], params, tau=TAU, lr=0.1)
    train(optimizer, params, at)
    optimizer.flush()
    (view,) = inspect(optimizer).fragments
    assert not view.in_flight
    assert view.next_launch == at + TAU
    merged = optimizer.stats()["syncs"]
    optimizer.flush()
    assert optimizer.stats()["syncs"] == merged, "nothing is left to average"
    train(optimizer, params, TAU)
    assert inspect(optimizer).fragments[0].launched == at + TAU


def test_averaged_puts_everything_back_after_an_exception():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = alone(CoCoDSGD, module.parameters(), tau=TAU, lr=0.1)
    for _ in range(TAU + 1):
        module(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        optimizer.average()
    (view,) = inspect(optimizer).fragments
    assert view.due == 2 * TAU
    mean = view.buffer.clone()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError), optimizer.averaged(module):  # noqa: PT012  # the block is what is tested
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(7.0)
            module[1].running_mean.fill_(7.0)
        raise KeyError
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    (view,) = inspect(optimizer).fragments
    assert view.due == 2 * TAU
    assert torch.equal(view.buffer, mean)


def test_nothing_is_trained_inside_averaged():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2, lr=0.1)
    set_gradients(params)
    with optimizer.averaged():
        with optimizer.averaged():
            pass
        for call in (optimizer.step, optimizer.average, optimizer.flush):
            with pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
                call()
    train(optimizer, params, 2)
    assert optimizer.stats()["steps"] == 2


def test_averaged_refuses_a_module_that_is_not_trained():
    mine, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = alone(LocalSGD, mine.parameters(), tau=2, lr=0.1)
    with (
        pytest.raises(ValueError, match=r"averaged\(Linear\): none of its parameters"),
        optimizer.averaged(other),
    ):
        pass
    with optimizer.averaged(torch.nn.Sequential(mine, torch.nn.BatchNorm1d(2, affine=False))):
        pass


# One worker


@final
class FromOutside(AveragingOptimizer):
    def __init__(self, params, *, tau, **options):
        super().__init__(params, rule=Average(carry=False), tau=tau, **options)  # warned of


DOORS = {
    **ALGORITHMS,
    "around an optimizer": lambda params, lr, **options: EASGD(
        torch.optim.SGD(params, lr), **options
    ),
    "from outside": FromOutside,
}


@pytest.mark.parametrize("name", DOORS)
def test_the_warning_of_a_lone_worker_names_the_users_line(name):
    """The last line outside the package, however many constructors there are inside."""
    with pytest.warns(RuntimeWarning, match="one worker") as caught:
        DOORS[name](parameters(2), tau=2, lr=0.1)
    assert [warning.filename for warning in caught] == [__file__]
    line = linecache.getline(__file__, caught[0].lineno)
    assert any(call in line for call in ("DOORS[", "EASGD(", "# warned of"))


def test_one_worker_works_and_warns_once():
    params = parameters(2)
    with pytest.warns(RuntimeWarning, match="one worker") as caught:
        optimizer = LocalSGD(params, tau=2, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 5)
        with optimizer.averaged():
            pass
        optimizer.flush()
        assert optimizer.consensus_distance() == 0
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.close()
    assert len(caught) == 1
    torch.testing.assert_close(params[0].detach(), torch.full((2,), 0.5))


class TwoSets(torch.optim.SGD):
    """Keeps other weights for evaluation than for training, as schedule-free optimizers do."""

    def train(self):
        self.param_groups[0]["params"][0].data.sub_(10)

    def eval(self):
        self.param_groups[0]["params"][0].data.add_(10)


def test_the_inner_optimizer_hears_of_training_and_evaluation():
    params = parameters(2)
    optimizer = alone(LocalSGD, TwoSets(params, lr=0.1), tau=2)
    train(optimizer, params, 3)
    before = params[0].detach().clone()
    optimizer.eval()
    with optimizer.averaged():
        torch.testing.assert_close(params[0].detach(), before + 10)
    optimizer.train()
    torch.testing.assert_close(params[0].detach(), before)
    plain = alone(LocalSGD, parameters(2), tau=2)
    plain.eval()
    plain.train()


def test_closed():
    params = parameters(2)
    optimizer = alone(LocalSGD, params, tau=2)
    optimizer.close()
    optimizer.close()
    with pytest.raises(distoptim.CommunicationError, match="closed"):
        optimizer.average()


# Checkpoints


def save_and_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_plain_optimizers_state_starts_a_new_run(name):
    params = parameters(2)
    plain = torch.optim.SGD(params, lr=0.3, momentum=0.9)
    set_gradients(params)
    plain.step()
    optimizer = alone(ALGORITHMS[name], params, tau=2, lr=0.1, momentum=0.9)
    saved = save_and_load(plain.state_dict())
    if name == "global-momentum":
        with pytest.raises(ValueError, match="'momentum_buffer' holds momentum"):
            optimizer.load_state_dict(saved)
        plain.state[params[0]]["momentum_buffer"].zero_()
        saved = save_and_load(plain.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.3
    if name == "global-momentum":
        return
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], torch.ones(2))
    train(optimizer, params, 4)
    assert optimizer.stats()["steps"] == 4


def trained(make, steps=TAU + 1, shapes=((2,), (3,)), **options):
    params = parameters(*shapes)
    optimizer = alone(make, params, **{"tau": TAU, "lr": 0.1, "momentum": 0.9, **options})
    train(optimizer, params, steps)
    return optimizer, params


def same(a, b):
    """Bit-equal trees of tensors and plain data."""
    leaves, others = tree_leaves(a), tree_leaves(b)
    return len(leaves) == len(others) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(leaves, others, strict=True)
    )


WRONG = {
    "algorithm": (EASGD, {}),
    "shapes": (OverlapLocalSGD, {"shapes": ((2,), (4,))}),
    "number of fragments": (OverlapLocalSGD, {"fragments": 2}),
    "no outer momentum": (OverlapLocalSGD, {"outer_momentum": 0}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(wrong):
    make, options = WRONG[wrong]
    saved = save_and_load(trained(OverlapLocalSGD)[0].state_dict())
    optimizer, params = trained(make, steps=1, **options)
    before = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    with pytest.raises(ValueError, match="checkpoint"):
        optimizer.load_state_dict(saved)
    after = (optimizer.state_dict(), [p.detach() for p in params])
    assert same(after, before)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_broken_checkpoint_is_refused():
    optimizer, _ = trained(OverlapLocalSGD)
    state = optimizer.state_dict()
    for broken in ({}, {"format": 99}, "x"):
        with pytest.raises(ValueError, match="checkpoint"):
            optimizer.load_state_dict({**state, "distoptim": broken})


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("tau", [2, 5])
def test_resume_at_another_tau(name, fragments, tau):
    """What was in flight is dropped, anchor and momentum stay, and a round of the new length begins."""
    if fragments > tau:
        fragments = tau
    old, old_params = trained(ALGORITHMS[name], shapes=((2,), (3,), ()), fragments=fragments)
    saved = save_and_load(old.state_dict())
    params = [torch.nn.Parameter(p.detach().clone()) for p in old_params]
    new = alone(ALGORITHMS[name], params, tau=tau, lr=0.1, momentum=0.9, fragments=fragments)
    new.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(params, old_params, strict=True))
    for mine, theirs in zip(inspect(new).fragments, inspect(old).fragments, strict=True):
        assert not mine.in_flight
        assert mine.next_launch == TAU + 1 + (mine.offset or tau)
        if theirs.anchor is not None:
            assert torch.equal(mine.anchor, theirs.anchor)
    train(new, params, 2 * tau)
    assert new.stats()["syncs"] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resume_at_another_number_of_workers(name):
    """Everybody starts from the anchor, where there is one, also those who were not there before."""
    make = partial(ALGORITHMS[name], tau=TAU, lr=0.1)
    four = Lockstep(make, [toy.start()] * 4)
    four.run(TAU + 1, toy.gradient)
    saved = save_and_load(four.optimizers[1].state_dict())
    six = Lockstep(make, [toy.start()] * 6)
    for optimizer in six.optimizers:
        optimizer.load_state_dict(saved)
    if four.has_anchor():
        anchor = torch.cat(four.anchors()[:1])
        assert torch.equal(six.x(), anchor.expand(6, -1))
        assert all(torch.equal(anchor, other) for other in six.anchors())
    x = six.run(2 * TAU, toy.gradient)
    assert torch.isfinite(x).all()
    if four.has_anchor():
        assert all(torch.equal(six.anchors()[0], other) for other in six.anchors()), (
            "they share nothing"
        )
    assert inspect(six.optimizers[0]).fragments[0].launched == TAU + 1 + 2 * TAU


def test_the_outer_hyperparameters_are_the_constructors():
    """As alpha is: a checkpoint brings memory, not configuration."""
    saved = save_and_load(trained(OverlapLocalSGD, outer_momentum=0.7)[0].state_dict())
    optimizer, params = trained(OverlapLocalSGD, outer_momentum=0.2)
    optimizer.load_state_dict(saved)
    assert inspect(optimizer).fragments[0].outer.param_groups[0]["momentum"] == 0.2
    train(optimizer, params, 2 * TAU)


# Observability and imports


def test_profiler_labels():
    params = parameters(2)
    optimizer = alone(OverlapLocalSGD, params, tau=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, 4)
    labels = {event.key for event in profile.key_averages()}
    assert {"distoptim::launch", "distoptim::wait", "distoptim::merge"} <= labels


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )


def test_importing_is_cheap_and_silent():
    code = """
import sys, torch, torch.distributed
from torch.profiler import record_function
before = set(sys.modules)
import distoptim
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"matplotlib", "sklearn", "cyclopts", "pydantic", "rich", "tensorboard", "pandas", "scipy"}))
print(len([n for n in set(sys.modules) - before if not n.startswith("distoptim")]) < 20)
import logging
logging.getLogger("distoptim").error("nobody asked for this")
"""
    result = python(code)
    assert (result.stdout.split("\n")[:2], result.stderr) == (["[]", "True"], "")


def test_every_public_name_is_there():
    for name in distoptim.__all__:
        assert getattr(distoptim, name) is not None
    assert 15 <= len(distoptim.__all__) <= 30
    assert isinstance(alone(LocalSGD, parameters(2), tau=1), AveragingOptimizer)
    assert SingleWorker().size == 1
