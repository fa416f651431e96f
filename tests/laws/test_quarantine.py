"""A worker whose parameters are not finite is left out of the mean, told so, and brought back.

Nobody else notices.
"""

from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
import torch

from distoptim import EASGD, GlobalMomentum, QuarantineWarning
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.script import parameters, set_gradients, train
from tests.helpers.share import share

MAKERS = toy.variants(fragments=(1,))
SICK, HEALTHY = 1, [0, 2, 3]
AT = (
    2 * toy.TAU
)  # the local step, one that ends a round, at which the sick worker's gradient is not finite


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def cluster(make):
    """One local step before it happens."""
    workers = Lockstep(make, [toy.start()] * toy.WORKERS)
    workers.run(AT - 1, toy.gradient)
    return workers


def sick(value):
    return lambda rank, params: [
        torch.full_like(p, value) if rank == SICK else g
        for p, g in zip(params, toy.gradient(rank, params), strict=True)
    ]


def fall_ill(workers, value=math.nan):
    """The step at which it happens; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers.step(sick(value))
    return [w for w in caught if issubclass(w.category, QuarantineWarning)]


@pytest.mark.parametrize(("name", "value"), share(product(MAKERS, [math.nan, math.inf]), of=5))
def test_the_sick_worker_is_told_and_comes_back(name, value):
    make = MAKERS[name]
    workers = cluster(make)
    told = fall_ill(workers, value)
    assert [str(w.message).partition(":")[0] for w in told] == [f"rank {SICK}"]
    assert [o.stats()["quarantined"] for o in workers.optimizers] == [0, 1, 0, 0]
    # Its momentum is of the same illness.
    if make.func is not GlobalMomentum:
        assert [bool(o.state) for o in workers.optimizers] == [True, False, True, True]
    assert torch.isfinite(workers.x()).all()
    if workers.has_anchor():
        first, *others = workers.anchors()
        assert all(torch.equal(first, other) for other in others)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuarantineWarning)
        x = workers.run(4 * toy.TAU, toy.gradient)
    assert torch.isfinite(x).all()


def test_it_goes_back_to_the_anchor(make):
    workers = cluster(make)
    if not workers.has_anchor():
        pytest.skip("an algorithm without an anchor")
    before = []
    with pytest.warns(QuarantineWarning):
        workers.step(
            sick(math.nan), before_launch=lambda: before.append(workers.anchors()[SICK].clone())
        )
    view = inspect(workers.optimizers[SICK])
    expected = before[0]
    if view.delay == 0 and make.func is not EASGD:
        # Where the mean of the others has pulled it meanwhile.
        weight = getattr(view.rule, "alpha", 1.0)  # CO2 adopts the anchor
        if make.func is GlobalMomentum:
            weight = view.rule.gain + toy.OPTIONS["momentum"]
        expected = expected.lerp(workers.anchors()[SICK], weight)
    own = view.fragments[0].own.get("own")
    if view.delay and own is not None:
        # Eager DiLoCo: less its share of what its own momentum does without it.
        expected = expected - (own * view.rule.outer.lr * view.rule.outer.momentum / toy.WORKERS)
    torch.testing.assert_close(workers.x()[SICK], expected, rtol=0, atol=1e-12)


def test_the_others_go_on_as_if_it_had_sent_their_mean(make):
    """That is a mean over three.

    Until a mean arrives in which the sick worker's new parameters are.
    """
    workers = cluster(make)
    if make.func is EASGD:
        pytest.skip("the anchor moves by the sum, see below")
    expected = cluster(make)

    def substitute():
        mean = expected.x()[HEALTHY].mean(0)
        with torch.no_grad():
            for p, value in zip(
                expected.params[SICK], mean.split([p.numel() for p in toy.start()]), strict=True
            ):
                p.copy_(value.reshape(p.shape))

    fall_ill(workers)
    expected.step(toy.gradient, before_launch=substitute)
    torch.testing.assert_close(workers.x()[HEALTHY], expected.x()[HEALTHY], rtol=0, atol=1e-12)
    steps = toy.TAU + inspect(workers.optimizers[0]).delay - 1
    torch.testing.assert_close(
        workers.run(steps, toy.gradient)[:, HEALTHY],
        expected.run(steps, toy.gradient)[:, HEALTHY],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.filterwarnings("ignore:all workers have sent equal")
def test_where_nobody_moves_nobody_moves_after_it(make):
    """What was not finite is no distance from which a worker has moved since."""

    def still(rank, params):
        return [torch.zeros_like(p) for p in params]

    def once(rank, params):
        return [torch.full_like(p, math.nan if rank == SICK else 0) for p in params]

    workers = Lockstep(make, [toy.start()] * toy.WORKERS)
    before = workers.run(AT - 1, still)[-1]
    with pytest.warns(QuarantineWarning):
        workers.step(once)
    for x in workers.run(3 * toy.TAU, still):
        # Adam makes 1e-9 of the rounding of a mean of three.
        torch.testing.assert_close(x, before, rtol=0, atol=1e-8)


@pytest.mark.parametrize("delay", [0, 1, toy.TAU])
def test_easgd_sums_over_the_healthy(delay):
    workers = cluster(MAKERS[f"easgd-delay{delay}-fragments1"])
    before = {}

    def note():
        before["x"], before["z"] = workers.x()[HEALTHY], workers.anchors()[0].clone()

    with pytest.warns(QuarantineWarning):
        workers.step(sick(math.nan), before_launch=note)
    alpha = 1 / (toy.WORKERS + 1)
    x, z = before["x"], before["z"]
    torch.testing.assert_close(workers.x()[HEALTHY], x - alpha * (x - z), rtol=0, atol=1e-12)
    for _ in range(delay):
        workers.step(toy.gradient)
    torch.testing.assert_close(workers.anchors()[0], z + alpha * (x - z).sum(0), rtol=0, atol=1e-12)


def test_only_the_sick_fragment_is_replaced():
    workers = Lockstep(
        toy.variants(fragments=(3,))["overlap-local-sgd-delay3-fragments3"],
        [toy.start()] * toy.WORKERS,
    )
    workers.run(toy.TAU, toy.gradient)
    with torch.no_grad():
        workers.params[SICK][0].fill_(math.nan)
    with pytest.warns(QuarantineWarning, match="fragment 0"):
        workers.run(
            toy.TAU, lambda rank, params: [torch.nan_to_num(g) for g in toy.gradient(rank, params)]
        )
    assert workers.optimizers[SICK].stats()["quarantined"] == 1
    assert torch.isfinite(workers.x()).all()


PARTED = toy.variants(fragments=(2, 3))


@pytest.mark.parametrize(
    ("name", "at"), share(product(PARTED, [1, toy.TAU - 1, 2 * toy.TAU]), of=7)
)
def test_one_bad_batch_is_one_quarantine_with_fragments_too(name, at):
    """All of them are replaced at once, or NaN would go round and round from one to the next."""
    workers = Lockstep(PARTED[name], [toy.start()] * toy.WORKERS)
    workers.run(at, toy.gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers.step(sick(math.nan))
        workers.run(4 * toy.TAU, toy.gradient)
    told = [str(w.message) for w in caught if issubclass(w.category, QuarantineWarning)]
    assert len(told) == 1
    assert [o.stats()["quarantined"] for o in workers.optimizers] == [0, 1, 0, 0]
    assert torch.isfinite(workers.x()).all()
    if workers.has_anchor():
        assert all(torch.equal(workers.anchors()[0], other) for other in workers.anchors())


@pytest.mark.parametrize(
    ("name", "huge"), [*((name, False) for name in MAKERS), *((name, True) for name in MAKERS)]
)
def test_when_nobody_is_finite(name, huge):
    """An error on all; the anchor, and so what can be saved, is as it was.

    So also of finite values whose sum over the workers is not.
    """
    make = MAKERS[name]
    params = parameters(2)
    optimizer = toy.alone(make, params)
    train(optimizer, params, AT - 1)
    delay = inspect(optimizer).delay
    anchored = inspect(optimizer).anchors() is not None
    set_gradients(params, 0.0 if huge else math.nan)
    optimizer.step()
    if huge:
        with torch.no_grad():
            for p in params:
                p.zero_().view(-1)[0] = 0.9 * torch.finfo(p.dtype).max
    # At a delay the merge of the round before comes first: it is the last that moves the anchor.
    with pytest.warns(QuarantineWarning):  # noqa: PT031  # only one of the two raises at once
        if delay == 0:
            before = inspect(optimizer).anchors()
            with pytest.raises(FloatingPointError, match="no worker has finite values"):
                optimizer.average()
        else:
            optimizer.average()
            before = inspect(optimizer).anchors()
            with pytest.raises(FloatingPointError, match="no worker has finite values"):
                train(optimizer, params, delay)
    if anchored:
        assert torch.equal(inspect(optimizer).anchors(), before)
        assert torch.isfinite(before).all()
    optimizer.state_dict()
    if anchored or delay:
        # Somewhere to go back to, and so to go on from.
        train(optimizer, params, 3 * toy.TAU)
        assert torch.isfinite(params[0]).all()
