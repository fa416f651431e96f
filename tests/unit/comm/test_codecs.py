"""Codecs: what a code loses and weighs, and what the algorithms make of coded means."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import distoptim
from distoptim.comm import Communicator, FinishedHandle, Handle
from distoptim.comm.codecs import BLOCK, CODECS, STEP, Codec, ErrorFeedback, TopK, find
from distoptim.engine.identity import SIZE
from distoptim.testing import lockstep
from distoptim.testing import processes as workers
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy
from tests.helpers.coded import ALGORITHMS, MINIMA, START, cluster, gradient, numbers
from tests.helpers.share import share

SIZES = (1, 255, 256, 257, 65536, 70001)
# Of the root mean square error over that of the numbers, for numbers of a normal law.
ERRORS = {"bf16": 0.0018, "int8": 0.008, "e3m0": 0.21, "2bit": 0.48, "1bit": 0.61, "top64": 0.95}
# These know no zero but that of a whole block.
COARSE = ("2bit", "1bit")
NAMES = [*CODECS, *(f"{name}+ef" for name in CODECS)]


def through(codec: Codec, x: Tensor) -> Tensor:
    code = torch.zeros(codec.nbytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, code)
    out = torch.zeros_like(x)
    codec.add_decoded(code, out)
    return out


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("numel", SIZES)
def test_errors_are_bounded_at_every_size(name: str, numel: int) -> None:
    x = numbers(numel)
    y = through(CODECS[name], x)
    assert torch.isfinite(y).all()
    if name == "bf16":
        assert torch.equal(y, x.bfloat16().float())
    if name == "int8":
        whole = torch.zeros(-(-numel // 256) * 256)
        whole[:numel] = x
        limit = (
            whole.view(-1, 256).abs().amax(1, keepdim=True).expand(-1, 256).reshape(-1)[:numel]
            / 254
        )
        assert (y - x).abs().le(limit * 1.001).all()
    if name == "e3m0":
        assert torch.equal(torch.frexp(y[y != 0])[0].abs(), torch.full_like(y[y != 0], 0.5))
        assert ((y - x).abs() <= x.abs() / 3 + 1e-6)[y != 0].all()
    if numel > 60000:
        assert ((y - x).norm() / x.norm()).item() < ERRORS[name]


@pytest.mark.parametrize("name", CODECS)
def test_zero_denormals_and_infinities(name: str) -> None:
    codec = CODECS[name]
    assert not through(codec, torch.zeros(300)).any()
    assert torch.isfinite(through(codec, torch.full((300,), 1e-42))).all()
    assert through(codec, torch.full((300,), 1e-42)).abs().max() < 1e-37
    extreme = through(codec, torch.tensor([math.inf, -math.inf, 1.0]))
    assert torch.isfinite(extreme[:2]).all() or name == "2bit"
    assert extreme[0] > 1e35 or name == "2bit"
    mixed = torch.zeros(256)
    mixed[3] = -5.0
    if name not in COARSE:
        assert (through(codec, mixed) != 0).sum() == 1


@pytest.mark.parametrize("name", ["bf16", "int8", "e3m0"])
def test_what_was_coded_once_is_coded_without_loss(name: str) -> None:
    once = through(CODECS[name], numbers(1000))
    torch.testing.assert_close(through(CODECS[name], once), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", CODECS)
def test_a_block_is_coded_alike_wherever_it_stands(name: str) -> None:
    """In every chunk, the last one and its tail too; nothing and its code are empty."""
    codec = CODECS[name]
    size = 4096 if codec.gathered else BLOCK
    chunk = STEP * BLOCK
    x = numbers(2 * chunk + size + 44)
    y = through(codec, x)
    for first in (0, chunk - size, chunk, 2 * chunk - size, 2 * chunk, 2 * chunk + size):
        block = slice(first, first + size)
        assert torch.equal(y[block], through(codec, x[block]))
    assert codec.nbytes(0) == 0
    assert not len(through(codec, x[:0]))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("weight", [-1.0, 0.3])
def test_codes_are_added_with_their_weight(name: str, weight: float) -> None:
    x = numbers(700)
    y = through(CODECS[name], x)
    code = torch.zeros(CODECS[name].nbytes(700), dtype=torch.uint8)
    CODECS[name].encode(x, code)
    out = numbers(700, 1)
    CODECS[name].add_decoded(code, out, weight=weight)
    torch.testing.assert_close(out, numbers(700, 1) + weight * y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_signs_are_alike(name: str) -> None:
    """The code of -x is that of x, turned."""
    x = numbers(1000)
    torch.testing.assert_close(through(CODECS[name], -x), -through(CODECS[name], x))


@pytest.mark.parametrize("name", [name for name in CODECS if name != "e3m0"])
def test_a_number_that_is_none_is_not_hidden(name: str) -> None:
    """E3M0 has no bits for it; what is not finite never comes to a codec (`mark_finite`)."""
    x = numbers(600)
    x[300] = math.nan
    assert not torch.isfinite(through(CODECS[name], x)[300])


def test_one_bit_is_the_sign_times_the_scale_that_loses_least() -> None:
    x = numbers(600) ** 3
    x[256:512] = 0
    y = through(CODECS["1bit"], x)
    assert not y[256:512].any()
    for block in (slice(0, 256), slice(512, 600)):
        scale = x[block].abs().mean()
        torch.testing.assert_close(y[block], x[block].sign() * scale, rtol=1e-6, atol=0)
        lost = (x[block] - y[block]).square().sum()
        torch.testing.assert_close(lost, x[block].square().sum() - scale**2 * len(x[block]))
        for other in (0.98, 1.02):
            assert (x[block] - other * y[block]).square().sum() > lost


def test_one_bit_takes_zero_for_positive_where_others_are_not() -> None:
    x = torch.zeros(256)
    x[5] = -2.0
    assert torch.equal(through(CODECS["1bit"], x), torch.where(x < 0, -1.0, 1.0) * (2 / 256))


@pytest.mark.parametrize("k", [4, 64, 1024, 4096])
def test_sparse_codes_have_the_largest_numbers_in_two_sizes(k: int) -> None:
    x = numbers(4096 + 700)
    y = through(TopK(k), x)
    for chunk in (slice(0, 4096), slice(4096, 4796)):
        size = x[chunk].abs()
        chosen = y[chunk] != 0
        found = size[chosen].sort(descending=True)[0]
        assert torch.equal(found, size.topk(min(k, len(size)))[0])
        assert torch.equal(y[chunk][chosen].sign(), x[chunk][chosen].sign())
        large = found > found.sum() / k
        # A chunk of fewer numbers than k ends in zeros, which count.
        means = (found[~large].sum() / (k - large.sum()), found[large].mean())
        expected = torch.where(size > found.sum() / k, means[1], means[0]) * x[chunk].sign()
        torch.testing.assert_close(y[chunk], expected * chosen)


@pytest.mark.parametrize("k", [0, 6, 4100, 64.0, "64"])
def test_a_sparse_code_of_another_size_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match=r"k=.*allowed is a multiple of 4 in \[4, 4096\]"):
        TopK(k)


def test_bytes_of_a_code() -> None:
    assert {name: codec.nbytes(257) for name, codec in CODECS.items()} == {
        "bf16": 1024,
        "int8": 520,
        "e3m0": 258,
        "2bit": 136,
        "1bit": 72,
        "top64": 120,
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("algorithm", ["local", "overlap"])
def test_stats_count_the_code(name: str, algorithm: str) -> None:
    run = cluster(ALGORITHMS[algorithm], codec=name)
    run.run(3, gradient)
    codec = find(name)
    codec = codec.codec if isinstance(codec, ErrorFeedback) else codec
    assert codec is not None
    launched = [f.numel for f in inspect(run.optimizers[0]).fragments if f.launched > 0]
    assert len(launched) == 1 + (algorithm == "overlap")
    expected = 0
    for numel in launched:
        whole, part = (-(-codec.nbytes(math.ceil(numel / 256 / n) * 256) // 4) * 4 for n in (1, 4))
        # One stage, or two of a fourth each; the weight before what the first sends.
        least = whole if codec.gathered else min(whole, 2 * part)
        expected += 4 * (4 * (1 + SIZE) + least) // 2
    assert run.optimizers[0].stats()["bytes"] == expected


@functools.cache
def end_of_the_uncoded(algorithm: str) -> Tensor:
    return cluster(ALGORITHMS[algorithm]).run(60, gradient)[-15:].mean((0, 1))


@pytest.mark.parametrize(
    ("algorithm", "name"),
    share(itertools.product(ALGORITHMS, ["bf16", "int8", "e3m0+ef", "2bit+ef"]), of=3),
)
def test_anchors_stay_equal_and_runs_end_near_the_uncoded(algorithm: str, name: str) -> None:
    coded = cluster(ALGORITHMS[algorithm], codec=name)
    limit = {"bf16": 0.01, "int8": 0.02, "e3m0+ef": 0.25, "2bit+ef": 0.35}[name]
    x = coded.run(60, gradient)[-15:].mean((0, 1))
    y = end_of_the_uncoded(algorithm)
    assert 0 < (x - y).norm() < limit * y.norm()
    for first, *others in zip(*(view.fragments for view in coded.views()), strict=True):
        for other in others:
            assert torch.equal(other.coded.reference, first.coded.reference)


def distance(run: Lockstep, steps: int) -> float:
    """Of the workers' mean from the minimum of all, after so many steps, in norms of that."""
    minimum = torch.stack([torch.cat([c.reshape(-1) for c in own]) for own in MINIMA[:4]]).mean(0)
    return float((run.run(steps, gradient)[-15:].mean((0, 1)) - minimum).norm() / minimum.norm())


def test_means_at_every_step_bear_one_bit() -> None:
    """Where momentum is in the mean alone; over whole rounds of an outer momentum runs drift apart."""
    make = partial(distoptim.GlobalMomentum, lr=0.05, momentum=0.9, gain=0.5, codec="1bit")
    assert 0 < distance(Lockstep(make, [START] * 4), 60) < 0.35


@pytest.mark.parametrize("name", ["e3m0", "2bit", "1bit"])
def test_error_feedback_loses_nothing_in_the_sum(name: str) -> None:
    run = cluster(distoptim.LocalSGD, size=1, tau=1, codec=f"{name}+ef")
    coded_mean = inspect(run.optimizers[0]).fragments[0].coded
    given, got = torch.zeros(coded_mean.numel), torch.zeros(coded_mean.numel)
    buffer = torch.zeros(coded_mean.numel + coded_mean.extra)
    for i in range(20):
        d = numbers(coded_mean.numel, i)
        buffer[: coded_mean.numel] = coded_mean.reference + d
        buffer[-1] = 1.0
        coded_mean.start(buffer).wait(1.0)
        given += d
        got += buffer[: coded_mean.numel] - coded_mean.reference
    torch.testing.assert_close(got + coded_mean.residual, given, rtol=0, atol=2e-5)
    assert coded_mean.residual.abs().max() > 0.01


@pytest.mark.parametrize("name", ["int8", "2bit+ef"])
@pytest.mark.parametrize("algorithm", ["local", "cocod", "overlap", "overlap1"])
def test_resume_in_flight_is_bit_exact(algorithm: str, name: str) -> None:
    run = cluster(ALGORITHMS[algorithm], codec=name)
    run.run(7, gradient)
    saved = copy.deepcopy([o.state_dict() for o in run.optimizers])
    again = Lockstep(partial(ALGORITHMS[algorithm], lr=0.05, momentum=0.5, codec=name), [START] * 4)
    with torch.no_grad():
        for mine, theirs in zip(again.params, run.params, strict=True):
            torch._foreach_copy_(mine, theirs)
    for optimizer, state in zip(again.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    assert torch.equal(again.run(8, gradient), run.run(8, gradient))


def test_a_checkpoint_of_another_coding_is_refused() -> None:
    states = {
        name: cluster(ALGORITHMS["local"], codec=name).optimizers[0].state_dict()
        for name in (None, "int8", "int8+ef")
    }
    for a, b in itertools.permutations(states, 2):
        with pytest.raises(ValueError, match="codec"):
            cluster(ALGORITHMS["local"], codec=a).optimizers[0].load_state_dict(states[b])


@pytest.mark.parametrize("algorithm", ["local", "overlap1"])
def test_a_worker_in_quarantine_weighs_nothing_and_loses_its_residual(algorithm: str) -> None:
    run = cluster(ALGORITHMS[algorithm], codec="2bit+ef")
    run.run(5, gradient)
    with torch.no_grad():
        run.params[1][0].fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.run(1, gradient)
    residuals = [view.fragments[0].coded.residual for view in run.views()]
    assert not residuals[1].any()
    assert residuals[0].any()
    run.run(3, gradient)
    assert torch.isfinite(run.x()).all()
    assert run.optimizers[1].stats()["quarantined"] == 1


@pytest.mark.parametrize(
    "bad", ["int4", "int8+", "+ef", "int8+ef+ef", "int8+ef0", "int8+ef2", 8, ErrorFeedback]
)
def test_what_is_no_codec_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="codec="):
        cluster(ALGORITHMS["local"], codec=bad)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1, math.nan, "1"])
def test_what_is_no_decay_is_refused(decay: Any) -> None:
    with pytest.raises(ValueError, match=r"decay=.*allowed is a number in \(0, 1\]"):
        ErrorFeedback(CODECS["int8"], decay=decay)


def test_a_decay_is_named_where_there_is_one() -> None:
    """Workers compare it; without one the name is as in older checkpoints."""
    assert repr(ErrorFeedback(CODECS["int8"])) == "ErrorFeedback(codec=Int8())"
    named = find("top64+ef0.95")
    assert named == ErrorFeedback(TopK(64), decay=0.95)
    assert repr(named) == "ErrorFeedback(codec=TopK(k=64), decay=0.95)"
    assert find("int8+ef.5") == ErrorFeedback(CODECS["int8"], decay=0.5)
    assert find("int8+ef1") == find("int8+ef") == ErrorFeedback(CODECS["int8"])


def test_residuals_that_decay_bear_an_outer_momentum() -> None:
    """Where those that do not leave the minimum."""
    assert 0 < distance(cluster(ALGORITHMS["diloco"], codec="2bit+ef0.7"), 120) < 0.25


@dataclass(frozen=True)
class Share(Codec):
    """Half of each number: as a code of 1 bit does with what is twice its block's mean size."""

    def nbytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, x: Tensor, code: Tensor) -> None:
        code.view(torch.float32).copy_(x / 2)

    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        out.add_(code.view(torch.float32), alpha=weight)


@pytest.mark.parametrize(("decay", "bound"), [(1.0, 0.059), (0.7, 0.179)])
def test_residuals_of_two_stages_and_a_momentum_swing_above_a_bound(decay, bound) -> None:
    """The bound is that of docs/compression.md: where the recursion's largest root is 1."""

    def swing(lr: float) -> float:
        make = partial(distoptim.SlowMo, tau=1, slow_momentum=0.9, lr=lr)
        run = Lockstep(partial(make, codec=ErrorFeedback(Share(), decay)), [[numbers(600)]] * 3)
        # Minima whose mean is 0; the code is linear, so the mean knows nothing of them.
        x = run.run(200, lambda rank, params: [params[0] + (rank - 1)]).mean(1)
        return float(x[-40:].norm() / x[60:100].norm())

    assert swing(0.85 * bound) < 0.7
    assert swing(1.15 * bound) > 1.4


def test_few_bits_under_an_outer_momentum_are_warned_of() -> None:
    for codec, said in (("2bit+ef", 1), ("top64+ef0.95", 1), ("2bit+ef0.7", 0), ("e3m0+ef", 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            cluster(ALGORITHMS["diloco"], size=1, codec=codec)
        assert [str(w.message).count("outer momentum of 0.9") for w in seen] == [1] * said
        assert all(w.filename == lockstep.__file__ for w in seen)


def test_where_a_codec_cannot_run_it_says_so() -> None:
    with pytest.raises(ValueError, match="float64"):
        Lockstep(partial(distoptim.LocalSGD, lr=0.1, tau=2, codec="int8"), [toy.start()] * 2)

    class Plain(Communicator):
        rank = 0
        size = 1

        def all_reduce(self, buffer: Tensor) -> Handle:
            return FinishedHandle(buffer)

        def broadcast(self, buffer: Tensor, source: int = 0) -> None:
            pass

        def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
            return [message]

    with pytest.raises(ValueError, match="Plain has no all_gather"):
        distoptim.LocalSGD(
            [torch.nn.Parameter(torch.zeros(3))], lr=0.1, tau=2, codec="int8", communicator=Plain()
        )


# Two codecs in turn.
CODED = {
    f"{label} {name}": partial(make, codec=name)
    for (label, make), name in zip(
        ALGORITHMS.items(), itertools.cycle(["int8", "2bit+ef"]), strict=False
    )
}


def train(rank: int) -> dict[str, tuple[Tensor, float]]:
    """Every algorithm with a codec on real workers."""
    out = {}
    for label, make in CODED.items():
        params = [torch.nn.Parameter(p.clone()) for p in START]
        optimizer = make(params, lr=0.05, momentum=0.5)
        for _ in range(8):
            for p, g in zip(params, gradient(rank, [p.detach() for p in params]), strict=True):
                p.grad = g
            optimizer.step()
            optimizer.average()
        out[label] = (
            torch.cat([p.detach().reshape(-1) for p in params]),
            optimizer.stats()["bytes"],
        )
        optimizer.close()
    return out


@pytest.mark.parametrize("backend", ["gloo", pytest.param("emulated", marks=pytest.mark.soak)])
def test_real_workers_equal_virtual_ones_bit_for_bit(backend: str) -> None:
    results = workers.run(train, 3, backend=backend)
    for label, make in CODED.items():
        run = cluster(make, size=3)
        x = run.run(8, gradient)[-1]
        for rank, result in enumerate(results):
            values, nbytes = result[label]
            assert torch.equal(values, x[rank]), label
            assert nbytes == run.optimizers[rank].stats()["bytes"]
