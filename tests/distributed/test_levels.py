"""Groups of workers that average more often than all do.

Over real gloo processes, and what is refused.
"""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distoptim import BMUF, CoCoDSGD, LocalSGD, OverlapLocalSGD, QuarantineWarning
from distoptim.comm import ProcessGroupCommunicator, SingleWorker
from distoptim.periods import AdaComm, HideCommunication, PostLocal, Schedule
from distoptim.simulator import Fabric, VirtualCommunicator
from distoptim.testing.processes import run
from tests.helpers.share import ALL

STEPS, WORKERS = 15, 4
BY_SAMPLES = ("samples", "post-local")
EVERY_4, LATER_4, POST = {4, 8, 12}, {8, 12}, {1, 2, 3, 7, 11, 15}
# name -> optimizer, local steps of the launches over all, and of the means of pairs.
CASES: dict[str, tuple[Any, set[int], set[int]]] = {
    "local-sgd": (partial(LocalSGD, tau=4), EVERY_4, set(range(2, 16, 2))),
    "cocod-sgd": (partial(CoCoDSGD, tau=4), EVERY_4, set(range(2, 16, 2))),
    "overlap": (partial(OverlapLocalSGD, tau=4), EVERY_4, set(range(2, 16, 2))),
    "carry": (
        partial(BMUF, tau=4, delay=1, block_momentum=0.5, carry=True),
        EVERY_4,
        set(range(2, 16, 2)),
    ),
    "samples": (partial(LocalSGD, tau=4), EVERY_4, set(range(2, 16, 2))),
    "schedule": (partial(LocalSGD, tau=Schedule({0: 8, 5: 4})), LATER_4, set(range(2, 16, 2))),
    "post-local": (partial(LocalSGD, tau=PostLocal(start=3, tau=4)), POST, {5, 7, 9, 11, 13, 15}),
    "reset": (
        partial(LocalSGD, tau=4, reset_inner=True, momentum=0.9),
        EVERY_4,
        set(range(2, 16, 2)),
    ),
    # No plain loop for these: which parts meet when, and that resuming changes nothing.
    "fragments": (partial(LocalSGD, tau=4, fragments=2), set(), set()),
    "fragments-schedule": (
        partial(LocalSGD, tau=Schedule({0: 4, 5: 6}), fragments=2),
        set(),
        set(),
    ),
    "codec": (partial(LocalSGD, tau=4, codec="int8+ef"), set(), set()),
}

# At which local steps a case is stopped and goes on from a file: with DISTOPTIM_ALL=1 all of them, else
# those that have something more to keep than `overlap`.
STOPS = dict.fromkeys(CASES, (9,)) if ALL else dict.fromkeys(("fragments-schedule", "codec"), (9,))
STOPS |= {"cocod-sgd": (9, STEPS), "overlap": (9, STEPS)}


def pairs():
    return [dist.new_group([0, 1]), dist.new_group([2, 3])]


def _parameters(rank, dtype):
    return [torch.nn.Parameter(torch.full((2,), float(rank), dtype=dtype)) for _ in range(2)]


def _samples(rank, step):
    return 1.0 + rank * (step % 3)


def _train(optimizer, params, rank, steps, samples=False):
    """Local steps on (x - c)^2 / 2, with another c on every worker and for every element.

    X after each.
    """
    xs = []
    for step in steps:
        for i, p in enumerate(params):
            p.grad = (
                p.detach() - rank - 10 * i - torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
            )
        optimizer.step()
        optimizer.average(samples=_samples(rank, step) if samples else None)
        xs.append(torch.cat([p.detach() for p in params]))
    return xs


def _two_levels(rank):
    """Of each case x after each step and after a flush.

    Resumed in flight, in the middle of a pair's round, too.
    """
    pair, workers, out, made = pairs()[rank // 2], ProcessGroupCommunicator(), {}, []
    for name, (make, *_) in CASES.items():
        dtype, samples = torch.float32 if name == "codec" else torch.float64, name in BY_SAMPLES

        def start(value, make=make, dtype=dtype):
            params = _parameters(value, dtype)
            made.append(make(params, lr=0.1, levels={2: pair}, communicator=workers))
            return params, made[-1]

        for stop in [None, *STOPS.get(name, ())]:
            params, optimizer = start(rank)
            xs = _train(optimizer, params, rank, range(1, 1 + (stop or STEPS)), samples)
            if stop:
                file = io.BytesIO()
                torch.save(
                    {"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()},
                    file,
                )
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                params, optimizer = start(7)
                with torch.no_grad():
                    torch._foreach_copy_(params, saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                xs += _train(optimizer, params, rank, range(stop + 1, STEPS + 1), samples)
            optimizer.flush()
            out[name, stop] = torch.stack([*xs, torch.cat([p.detach() for p in params])])
    for optimizer in made:
        optimizer.close()
    return out


class _Samples:
    """What the workers of the plain loop weigh."""

    def __init__(self, name):
        self._counted = name in BY_SAMPLES
        self._made = torch.zeros(4, dtype=torch.float64)
        self._at = {"pair": 0.0, "all": 0.0}

    def take(self, step):
        self._made += torch.tensor([_samples(rank, step) for rank in range(4)])

    def weights(self, who):
        """Samples since the last mean; equal ones where workers do not say how many."""
        since = self._made - self._at[who]
        self._at[who] = self._made.clone()
        return (since if self._counted else torch.ones_like(since))[:, None]


def _pairs_mean(x, weight):
    total = (weight * x).view(2, 2, 4).sum(1) / weight.view(2, 2, 1).sum(1)
    return total[:, None].expand(2, 2, 4).reshape(4, 4)


def _reference(name, launches, means):
    """[steps, workers, dimension] of the same, by a plain loop.

    Z, v, sent are those of the algorithms' equations.
    """
    x = torch.zeros(4, 4, dtype=torch.float64)
    c = torch.tensor([0.0, 1, 10, 11], dtype=torch.float64)
    c = c + torch.arange(4, dtype=torch.float64)[:, None]
    samples = _Samples(name)
    sent = x.clone()
    z = x[0].clone()
    v = torch.zeros(4, dtype=torch.float64)
    out = []
    momentum = torch.zeros_like(x)
    for step in range(1, STEPS + 1):
        samples.take(step)
        momentum = 0.9 * momentum + (x - c) if name == "reset" else x - c
        x = x - 0.1 * momentum
        if step in means:
            x = _pairs_mean(x, samples.weights("pair"))
        if name == "carry" and step - 1 in launches:
            v = 0.5 * v + sent.mean(0) - z
            z = z + v
            x = z + x - sent
        if step in launches:
            match name:
                case "cocod-sgd":
                    x = x + sent.mean(0) - sent
                case "overlap":
                    v = 0.7 * v + z - sent.mean(0)
                    z = z - v
                    x = 0.4 * x + 0.6 * z
                case other if other != "carry":
                    weight = samples.weights("all")
                    x = ((weight * x).sum(0) / weight.sum()).expand(4, 4)
                    momentum = torch.zeros_like(x)
                    if name == "post-local" and step <= 3:
                        samples.weights("pair")
            sent = x.clone()
        out.append(x)
    return torch.stack(out)


@pytest.fixture(scope="module")
def results():
    found = run(_two_levels, WORKERS)
    return {key: torch.stack([result[key] for result in found], 1) for key in found[0]}


@pytest.mark.parametrize("name", [name for name, (_, launches, _) in CASES.items() if launches])
def test_two_levels_equal_a_plain_loop(results, name):
    torch.testing.assert_close(
        results[name, None][:-1], _reference(name, *CASES[name][1:]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", STOPS)
def test_resumed_in_flight_and_flushed_they_are_bit_equal(results, name):
    """After steps 9 and 15 a mean over all may be on its way, and the pairs are in the middle of a round."""
    for stop in STOPS[name]:
        assert torch.equal(results[name, stop], results[name, None]), stop


def test_a_flush_ends_with_the_mean_of_all(results):
    for name in ("local-sgd", "fragments", "fragments-schedule"):
        *_, last, flushed = results[name, None]
        torch.testing.assert_close(flushed, last.mean(0).expand(4, 4), rtol=0, atol=1e-12, msg=name)
    assert all(torch.equal(x, results["codec", None][-1, 0]) for x in results["codec", None][-1])


def test_a_flush_averages_in_the_groups_too(results):
    """An algorithm that pulls leaves the groups apart, but not the members of one."""
    *_, last, flushed = results["overlap", None]
    assert not torch.equal(last[0], last[1])
    assert torch.equal(flushed[::2], flushed[1::2])
    assert not torch.equal(flushed[0], flushed[2])


def _meet(x):
    """Where all are equal, and where pairs are: for each step of [steps, workers, dimension]."""
    together = [step for step, at in enumerate(x, 1) if torch.equal(at, at[:1].expand_as(at))]
    paired = [step for step, at in enumerate(x, 1) if torch.equal(at[::2], at[1::2])]
    return together, paired


def test_each_fragment_meets_its_group_before_all(results):
    x = results["fragments", None][:-1]
    # The second fragment's rounds end at steps 2, 6, ...: at those it meets all, between them its
    # pair.
    assert _meet(x[..., :2]) == ([4, 8, 12], [2, 4, 6, 8, 10, 12, 14])
    assert _meet(x[..., 2:]) == ([2, 6, 10, 14], [2, 4, 6, 8, 10, 12, 14])
    # At step 8 tau becomes 6: the first fragment goes on from there, the second begins 3 steps
    # later.
    x = results["fragments-schedule", None][:-1]
    assert _meet(x[..., :2]) == ([4, 8, 14], [2, 4, 6, 8, 10, 12, 14])
    assert _meet(x[..., 2:]) == ([2, 6, 11], [2, 4, 6, 8, 9, 11, 13, 15])


def test_groups_send_float32_whatever_the_codec(results):
    x = results["codec", None][:-1]
    assert _meet(x) == ([4, 8, 12], [2, 4, 6, 8, 10, 12, 14])
    # The exact mean of a pair; among all that of the codes, which is near.
    before = x[4] - 0.1 * (x[4] - _centres())
    torch.testing.assert_close(x[5, 0], before[:2].mean(0))
    before = x[6] - 0.1 * (x[6] - _centres())
    torch.testing.assert_close(x[7, 0], before.mean(0), rtol=0, atol=0.02)
    assert not torch.allclose(x[7, 0], before.mean(0), rtol=0, atol=1e-6)


def _centres():
    return torch.tensor([0.0, 1, 10, 11]) + torch.arange(4.0)[:, None]


LOADERS = (3, 5, 9, 6)


def _uneven(rank):
    pair, out = pairs()[rank // 2], {}
    for name, make in {
        "local-sgd": partial(LocalSGD, tau=4),
        "overlap": partial(OverlapLocalSGD, tau=4),
        "late": partial(LocalSGD, tau=4, delay=3),
    }.items():
        params = _parameters(rank, torch.float64)
        optimizer = make(params, lr=0.1, levels={2: pair}, timeout_s=30.0)
        with optimizer.join():
            _train(optimizer, params, rank, range(LOADERS[rank]))
        joined = torch.cat([p.detach() for p in params])
        xs = _train(optimizer, params, rank, range(4))
        _train(optimizer, params, rank, range(1))
        optimizer.consolidate()
        consolidated = _train(optimizer, params, rank, range(4))
        out[name] = joined, torch.stack(xs), torch.stack(consolidated)
        optimizer.close()
    return out


@pytest.fixture(scope="module")
def uneven():
    return run(_uneven, WORKERS)


def test_loaders_of_different_lengths(uneven):
    """Who has run out weighs in its pair as among all.

    By the local steps it still made, then not at all.
    """
    for name in uneven[0]:
        joined = torch.stack([result[name][0] for result in uneven])
        assert torch.equal(joined, joined[:1].expand_as(joined)), name
    torch.testing.assert_close(uneven[0]["local-sgd"][0], _uneven_by_hand(), rtol=0, atol=1e-12)


def test_where_all_take_the_mean_over_rounds_begin_at_all_levels(uneven):
    """After `join` and `consolidate`, so that pairs meet when all do, and in the middle."""
    for name in uneven[0]:
        for when in (1, 2):
            x = torch.stack([result[name][when] for result in uneven], 1)
            assert _meet(x)[1] == [2, 4], (name, when)


def _uneven_by_hand():
    steps, x, c = torch.tensor(LOADERS), torch.zeros(4, 4, dtype=torch.float64), _centres().double()
    for step in range(1, 13):
        x = torch.where((steps >= step)[:, None], x - 0.1 * (x - c), x)
        for period, groups in ((2, ([0, 1], [2, 3])), (4, ([0, 1, 2, 3],))):
            for group in groups if step % period == 0 else ():
                weight = (steps[group] - (step - period)).clamp(0, period).double()[:, None]
                if weight.sum():
                    x[group] = (weight * x[group]).sum(0) / weight.sum()
    return x[0]


def test_alone_levels_average_nothing_and_are_checked_all_the_same():
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = LocalSGD(params, lr=0.1, tau=4, levels={2: None}, communicator=SingleWorker())
    for _ in range(4):
        optimizer.average()
    assert params[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tau", "levels", "message"),
    [
        (4, {3: None}, "4 is no multiple of 3; allowed are periods of which each divides the next"),
        (12, {2: None, 3: None}, "3 is no multiple of 2"),
        (4, {4: None}, "period of levels=4: allowed is an integer, from 1 to 3"),
        (4, {0: None}, "period of levels=0: allowed is an integer, from 1 to 3"),
        (4, [2], r"levels=\[2\]: allowed is a mapping of periods to process groups"),
        (1, {1: None}, "levels= beside tau=1: all average after every local step"),
        (Schedule({0: 4, 9: 6}), {4: None}, "period of levels=4|6 is no multiple of 4"),
        (Schedule({0: 8, 9: 6}), {4: None}, "6 is no multiple of 4"),
        (PostLocal(start=3, tau=Schedule({0: 8, 9: 6})), {4: None}, "6 is no multiple of 4"),
        (
            AdaComm(8),
            {2: None},
            "levels= beside tau=AdaComm.*may choose a tau that the periods of levels do not divide",
        ),
        (PostLocal(start=3, tau=HideCommunication()), {2: None}, "levels= beside tau=PostLocal"),
    ],
)
def test_periods_that_do_not_fit_are_refused(tau, levels, message):
    with pytest.raises(ValueError, match=message):
        OverlapLocalSGD(
            [torch.nn.Parameter(torch.ones(2))],
            lr=0.1,
            tau=tau,
            levels=levels,
            communicator=SingleWorker(),
        )


def _level_of_nan(rank):
    groups, out = pairs(), {}
    for how in ("average", "flush"):
        params = [torch.nn.Parameter(torch.full((2,), float(rank))) for _ in range(2)]
        optimizer = LocalSGD(params, lr=0.1, tau=4, fragments=2, levels={2: groups[rank // 2]})
        with torch.no_grad():
            params[0].fill_(rank if rank > 1 else torch.nan)
            params[1].fill_(rank)
        xs = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuarantineWarning)
            for _ in range(3):
                optimizer.average()
                with torch.no_grad():
                    params[1].add_(10)
                xs.append([p[0].item() for p in params])
            optimizer.average() if how == "average" else optimizer.flush()
        out[how] = [*xs, [p[0].item() for p in params]]
        optimizer.close()
    with pytest.raises(ValueError, match="a process group that this worker is a member of"):
        LocalSGD(params, lr=0.1, tau=4, levels={2: groups[1 - rank // 2]})
    with pytest.raises(ValueError, match="are not among the workers"):
        LocalSGD(params, lr=0.1, tau=4, levels={2: dist.group.WORLD}, group=groups[rank // 2])
    with pytest.raises(ValueError, match="levels= beside"):
        LocalSGD(
            params,
            lr=0.1,
            tau=4,
            levels={2: groups[rank // 2]},
            communicator=VirtualCommunicator(Fabric(1), 0),
        )
    return out


def test_a_group_without_a_finite_worker_comes_back_at_the_next_level():
    results = run(_level_of_nan, 4)
    for how in ("average", "flush"):
        x = torch.tensor([result[how] for result in results])
        # The pair that has none stays as it is at step 2; the other one takes its mean.
        assert x[:, 1, 0].nan_to_num(-1).tolist() == [-1, -1, 2.5, 2.5]
        assert x[:, 3, 0].tolist() == [2.5] * 4, how
        # The other fragment meets all at step 2, and keeps the steps made after it.
        assert x[:, 1, 1].tolist() == [1.5 + 20] * 4
        assert x[:, 2, 1].tolist() == [1.5 + 30] * 4
