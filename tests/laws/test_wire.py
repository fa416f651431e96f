"""How coded means travel.

Bytes, order of the second stages, what is lost and added again, failures, real workers.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distoptim
from distoptim import simulator
from distoptim.comm import CommunicationError, Handle, Link, ProcessGroupCommunicator
from distoptim.comm.codecs import BLOCK, CODECS, ErrorFeedback, TopK
from distoptim.comm.handles import Stages, TwoStageHandle
from distoptim.engine.identity import SIZE
from distoptim.periods import HideCommunication, PostLocal
from distoptim.simulator import VirtualCommunicator
from distoptim.testing import processes as workers
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from tests.helpers.coded import ALGORITHMS, START, cluster, gradient, numbers

NUMEL = sum(p.numel() for p in START)


def sent_per_mean(name: str | None, m: int, numel: int = NUMEL) -> float:
    """What each worker sends, by the formula."""
    if name is None:
        return 2 * (m - 1) / m * 4 * (numel + SIZE + 1)
    codec, blocks = CODECS[name.removesuffix("+ef")], -(-numel // BLOCK)
    part = -(-blocks // m)
    whole, share = (-(-codec.nbytes(n * BLOCK) // 4) * 4 for n in (blocks, part))
    return (m - 1) * (4 * (SIZE + 1) + (whole if codec.gathered else min(whole, 2 * share)))


def coded_means_of(run: Lockstep) -> list[Any]:
    """Rank -> the coded mean of its first fragment."""
    return [view.fragments[0].coded for view in run.views()]


class Counting(VirtualCommunicator):
    """Counts what worker 0 hands over for others."""

    sent = 0

    def count(self, *rows: Tensor) -> None:
        if self.rank == 0:
            Counting.sent += (self.size - 1) * sum(row.nbytes for row in rows)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        self.count(input)
        assert output.shape == (self.size, *input.shape)
        return super().all_gather(output, input, after=after)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        self.count(input[0])
        assert output.shape == input.shape
        return super().all_to_all(output, input)


@pytest.mark.parametrize("m", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["bf16", "int8", "e3m0+ef", "2bit+ef", "1bit+ef", "top64+ef"])
def test_bytes_on_the_wire(monkeypatch: pytest.MonkeyPatch, name: str, m: int) -> None:
    monkeypatch.setattr(Counting, "sent", 0)
    make = partial(distoptim.LocalSGD, lr=0.05, tau=1, codec=name)
    run = Lockstep(make, [START] * m, communicator=Counting)
    run.run(3, gradient)
    assert Counting.sent == 3 * sent_per_mean(name, m)
    assert Counting.sent < 3 * sent_per_mean(None, m)
    # `bytes` is the payload whose all-reduce sends as much.
    assert run.optimizers[0].stats()["bytes"] * 2 * (m - 1) / m == Counting.sent


def test_a_lone_worker_counts_its_messages_as_one_of_two() -> None:
    make = partial(distoptim.LocalSGD, lr=0.05, tau=1, codec="int8")
    alone, both = (coded_means_of(Lockstep(make, [START] * m))[0].nbytes for m in (1, 2))
    assert alone == both


@pytest.mark.parametrize("name", CODECS)
def test_large_models_send_as_many_bytes_as_their_all_reduce_would_with_so_many_bits(
    name: str,
) -> None:
    scale = 32 / BLOCK
    bits = {
        "bf16": 16,
        "int8": 8 + scale,
        "e3m0": 4 + scale / 4,
        "2bit": 2 + scale,
        "1bit": 1 + scale,
        "top64": 8 * 120 / 4096,
    }[name]
    numel = 10**6
    for m in (2, 3, 4, 8):
        run = Lockstep(
            partial(distoptim.LocalSGD, lr=0.1, tau=1, codec=name), [[torch.zeros(numel)]] * m
        )
        coded_mean = coded_means_of(run)[0]
        # What all gather from all grows with their number.
        times = m / 2 if coded_mean.codec.gathered else 1
        assert coded_mean.nbytes == pytest.approx(times * bits / 8 * numel, rel=1e-2)
        assert coded_mean.nbytes * 2 * (m - 1) / m == pytest.approx(sent_per_mean(name, m, numel))


@pytest.mark.parametrize("numel", [300, 9 * BLOCK - 100])
def test_parts_may_be_empty(numel: int) -> None:
    """8 workers and 2 blocks: one stage; 9 blocks.

    Two stages in parts of 2, of which the last three are empty.
    """
    run = Lockstep(
        partial(distoptim.LocalSGD, lr=0.1, tau=1, codec="int8"), [[torch.zeros(numel)]] * 8
    )
    assert coded_means_of(run)[0].two_stages == (numel > 300)
    target = numbers(numel)
    x = run.run(40, lambda rank, params: [params[0] - target - (rank - 3.5)])[-1]
    assert all(torch.equal(x[0], other) for other in x)
    torch.testing.assert_close(x[0], target, atol=0.15, rtol=0)


@pytest.mark.parametrize("weight", [1.0, 32.0, 0.3])
@pytest.mark.parametrize("name", ["e3m0", "2bit", "1bit"])
def test_two_stages_lose_nothing_in_the_sum(name: str, weight: float) -> None:
    """Sum of means + what the parts' owners keep + mean of what the workers keep = sum of the payloads' means."""
    run = cluster(distoptim.LocalSGD, tau=1, codec=f"{name}+ef")
    coded_means = coded_means_of(run)
    given, got = torch.zeros(NUMEL), torch.zeros(NUMEL)
    for i in range(20):
        buffers = [torch.zeros(NUMEL + coded_means[0].extra) for _ in coded_means]
        for j, (coded_mean, buffer) in enumerate(zip(coded_means, buffers, strict=True)):
            d = numbers(NUMEL, 10 * i + j)
            buffer[:NUMEL] = (coded_mean.reference + d) * weight
            buffer[-1] = weight
            given += d / len(coded_means)
        handles = [c.start(b) for c, b in zip(coded_means, buffers, strict=True)]
        for handle in handles:
            handle.poll()
        for handle in handles:
            handle.wait(1.0)
        assert all(torch.equal(buffers[0], b) for b in buffers)
        assert buffers[0][-1] == weight
        got += buffers[0][:NUMEL] / weight - coded_means[0].reference
    kept = torch.cat([c.mean_residual for c in coded_means]) + sum(
        c.residual for c in coded_means
    ) / len(coded_means)
    torch.testing.assert_close(got + kept, given, rtol=0, atol=1e-4)
    assert all(c.mean_residual.abs().max() > 0.01 for c in coded_means)


@pytest.mark.parametrize("decay", [1.0, 0.95, 0.5])
def test_residuals_of_sparse_codes_decay(decay: float) -> None:
    """SparseLoCo's loop: a = decay e + d, q = code(a), e = a - q, and the mean of everybody's q."""
    codec = TopK(4)
    run = cluster(distoptim.LocalSGD, size=3, tau=1, codec=ErrorFeedback(codec, decay=decay))
    coded_means = coded_means_of(run)
    assert not coded_means[0].two_stages
    kept = [torch.zeros(NUMEL) for _ in coded_means]
    for i in range(5):
        expected = coded_means[0].reference.clone()
        buffers = []
        for j, coded_mean in enumerate(coded_means):
            d = numbers(NUMEL, 10 * i + j)
            whole = decay * kept[j] + d
            code = torch.zeros(codec.nbytes(NUMEL), dtype=torch.uint8)
            codec.encode(whole, code)
            codec.add_decoded(code, expected, weight=1 / 3)
            kept[j] = whole
            codec.add_decoded(code, kept[j], weight=-1.0)
            buffers.append(torch.ones(NUMEL + coded_mean.extra))
            buffers[-1][:NUMEL] = coded_mean.reference + d
        for handle in [c.start(b) for c, b in zip(coded_means, buffers, strict=True)]:
            handle.wait(1.0)
        for coded_mean, buffer, e in zip(coded_means, buffers, kept, strict=True):
            torch.testing.assert_close(buffer[:NUMEL], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(coded_mean.residual, e, rtol=1e-4, atol=1e-4)
            coded_mean.merging(buffer)


def test_samples_as_weights_scale_out() -> None:
    """A power of two as everybody's weight changes no bit, with what is kept of earlier means too."""
    plain, weighted = (cluster(ALGORITHMS["local"], codec="2bit+ef") for _ in range(2))
    for _ in range(12):
        plain.step(gradient)
        weighted.step(gradient, samples=[16.0 / 3] * 4)
    torch.testing.assert_close(plain.x(), weighted.x(), rtol=1e-5, atol=1e-5)


# The order of second stages, with collectives that end when the test says so.


class Leg(Handle):
    """A collective that ends at `end`."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(torch.zeros(1), now=1.0)
        self.name, self.log, self.error = name, log, None
        log.append(f"start {name}")

    def end(self, at: float = 3.0, error: RuntimeError | None = None) -> None:
        self.finished_at, self.error = at, error

    def wait(self, timeout_s: float) -> None:
        assert 0 < timeout_s <= 60
        self.log.append(f"wait {self.name}")
        self.waited_s = (self.waited_s or 0.0) + 0.25
        self.finished_at = self.finished_at or 4.0
        if self.error is not None:
            raise self.error

    @property
    def seconds(self) -> float:
        return 2.0


class Wire:
    """Means of two legs, and what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.first: list[Leg] = []
        self.second: list[Leg] = []
        self.stages = Stages()

    def leg(self, legs: list[Leg], name: str) -> Leg:
        legs.append(Leg(f"{name}{len(legs)}", self.log))
        return legs[-1]

    def launch(self) -> TwoStageHandle:
        i = len(self.first)

        def go_on(first: Handle) -> Handle:
            assert first is self.first[i]
            self.log.append(f"between {i}")
            return self.leg(self.second, "b")

        return TwoStageHandle(self.leg(self.first, "a"), go_on, self.stages)


def test_second_stages_start_in_the_order_of_the_first() -> None:
    wire = Wire()
    handles = [wire.launch() for _ in range(3)]
    wire.first[1].end()
    for handle in handles:
        handle.poll()
    assert wire.log == ["start a0", "start a1", "start a2"], "the one before has not ended"
    wire.first[0].end()
    handles[2].poll()
    assert wire.log[3:] == [
        "wait a0",
        "between 0",
        "start b0",
        "wait a1",
        "between 1",
        "start b1",
    ], "any poll will do"
    handles[2].wait(60.0)
    assert wire.log[9:] == ["wait a2", "between 2", "start b2", "wait b2"]
    assert handles[2].waited_s == 0.5
    assert handles[2].finished_at == 4.0


def test_a_wait_starts_what_was_launched_before() -> None:
    wire = Wire()
    handles = [wire.launch() for _ in range(2)]
    handles[1].wait(60.0)
    assert [line for line in wire.log if line.startswith("start b")] == ["start b0", "start b1"]
    handles[0].wait(60.0)
    assert wire.log.count("between 0") == 1


def test_seconds_are_those_of_both_stages_and_what_is_between() -> None:
    wire = Wire()
    handle = wire.launch()
    assert handle.seconds == 0
    wire.first[0].end()
    handle.poll()
    wire.second[0].launched_at = 6.5
    assert handle.seconds == 0
    wire.second[0].end(8.0)
    handle.poll()
    assert handle.seconds == 6.5 - 1.0 + 2.0


def test_a_failed_first_stage_is_told_to_who_waits() -> None:
    wire = Wire()
    done, failed, behind = (wire.launch() for _ in range(3))
    wire.first[0].end()
    done.poll()
    wire.first[1].end(error=RuntimeError("connection closed"))
    wire.first[2].end()
    behind.poll()
    done.wait(60.0)
    for handle in (failed, behind, failed):
        with pytest.raises(RuntimeError, match="connection closed"):
            handle.wait(60.0)
    assert "between 1" not in wire.log
    assert len(wire.second) == 1


# The virtual cluster.


def clocked(
    workers: int = 4, network: Any = None, make: Any = distoptim.LocalSGD, **options: Any
) -> simulator.Cluster:
    """One second a step; models that start at zero, each to be drawn to another point."""
    return simulator.Cluster(
        workers=workers,
        compute=simulator.Constant(1.0),
        network=network,
        threads=1,
        model=lambda: torch.nn.Linear(60, 60),
        optimizer=partial(make, lr=0.1, **options),
    )


def loss(model: torch.nn.Module, rank: int) -> Tensor:
    return sum(((p - rank) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]  # sum's type allows 0


@pytest.mark.parametrize("m", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["int8", "2bit+ef"])
def test_virtual_time_is_that_of_the_bytes_of_both_stages(name: str, m: int) -> None:
    link = Link(latency_s=0.01, bandwidth_gbit_s=1e-4)
    run = clocked(m, simulator.Ring([link]), tau=2, codec=name)
    for _ in range(6):
        run.step(loss)
    expected = sent_per_mean(name, m, 3660) * 8 / 1e5 + 2 * (m - 1) * 0.01
    assert run.seconds() == pytest.approx(6 + 3 * expected)
    assert run.stats()["exposed_s"] == pytest.approx(3 * expected)


def test_hide_communication_sees_both_stages() -> None:
    name, link = "e3m0+ef", Link(latency_s=0.0, bandwidth_gbit_s=1e-5)
    needed = sent_per_mean(name, 4, 3660) * 8 / 1e4
    run = clocked(
        4, simulator.Ring([link]), distoptim.OverlapLocalSGD, tau=HideCommunication(), codec=name
    )
    for _ in range(40):
        run.step(loss)
    assert run.stats()["tau"] == math.ceil(needed)


def test_virtual_runs_resume_in_flight_with_codes_at_the_same_time() -> None:
    """Fragments in flight, on a link that makes workers wait.

    Parameters and clocks of a run that never stopped.
    """
    link = Link(latency_s=0.01, bandwidth_gbit_s=2e-6)
    make = partial(
        clocked,
        4,
        simulator.Ring([link]),
        distoptim.StreamingDiLoCo,
        tau=4,
        delay=3,
        fragments=2,
        codec="2bit+ef",
    )
    torch.manual_seed(0)
    expected = make()
    for _ in range(8):
        expected.step(loss)
    assert len(inspect(expected.optimizers[0]).in_flight) == 2
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(expected.state_dict()))
    for _ in range(9):
        expected.step(loss)
        resumed.step(loss)
    for a, b in zip(expected.models, resumed.models, strict=True):
        assert torch.equal(a.weight, b.weight)
    assert expected.fabric.clocks == resumed.fabric.clocks
    assert expected.stats()["exposed_s"] == resumed.stats()["exposed_s"] > 0


# Real workers. Every worker does its steps at times of its own, so that second stages start at
# other moments.


def pace(rank: int, step: int) -> None:
    time.sleep(0.002 * ((3 * rank + step) % 4))


def steps(optimizer: Any, params: list[Any], rank: int, count: int, **average: Any) -> None:
    for step in range(count):
        for p, g in zip(params, gradient(rank, [p.detach() for p in params]), strict=True):
            p.grad = g
        optimizer.step()
        pace(rank, step)
        optimizer.average(**average)


def fresh() -> list[Any]:
    return [torch.nn.Parameter(p.clone()) for p in START]


def flat(params: list[Any]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params])


STREAMING: dict[str, Any] = {"tau": 6, "delay": 3, "fragments": 3, "codec": "2bit+ef", "lr": 0.05}
FULL: dict[str, Any] = {"tau": 3, "delay": 2, "carry": True, "lr": 0.05, "codec": "e3m0+ef"}
PHASES: dict[str, Any] = {
    "tau": PostLocal(start=3, tau=4),
    "lr": 0.05,
    "codec": "int8",
    "fragments": 2,
}


def counted_bytes(rank: int) -> int:
    """Of three rounds."""
    handed = count_what_gloo_gets()
    params = fresh()
    optimizer: Any = distoptim.LocalSGD(params, tau=1, lr=0.05, codec="int8")
    handed.clear()
    steps(optimizer, params, rank, 3)
    total = sum(handed)
    optimizer.close()
    return total


def resumed(rank: int) -> dict[str, Any]:
    """In flight, in another optimizer."""
    out: dict[str, Any] = {}
    params = fresh()
    optimizer: Any = distoptim.StreamingDiLoCo(params, **STREAMING)
    steps(optimizer, params, rank, 16)
    out["in flight"] = len(inspect(optimizer).in_flight)
    saved, at = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    steps(optimizer, params, rank, 8)
    with optimizer.averaged():
        out["mean"] = flat(params)
    out["streaming"] = flat(params)
    optimizer.close()
    params = fresh()
    optimizer = distoptim.StreamingDiLoCo(params, **STREAMING)
    with torch.no_grad():
        torch._foreach_copy_(params, at)
    optimizer.load_state_dict(saved)
    steps(optimizer, params, rank, 8)
    out["resumed"] = flat(params)
    optimizer.close()
    return out


def whole_path(rank: int) -> dict[str, Any]:
    """Everything that codes meet, on one process group."""
    out: dict[str, Any] = {"bytes": counted_bytes(rank), **resumed(rank)}
    params = fresh()
    optimizer: Any = distoptim.BMUF(params, **FULL)
    steps(optimizer, params, rank, 8, samples=float(rank + 1))
    out["samples"] = flat(params)
    optimizer.close()

    params = fresh()
    optimizer = distoptim.OverlapLocalSGD(params, **PHASES)
    with optimizer.join():
        steps(optimizer, params, rank, 9 + 2 * rank)
    out["join"] = flat(params)
    optimizer.close()

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for codec in (None, "int8"):
        params = fresh()
        optimizer = distoptim.LocalSGD(
            params, tau=4, lr=0.05, codec=codec, levels={2: pairs[rank // 2]}
        )
        steps(optimizer, params, rank, 9)
        optimizer.flush()
        out[f"levels {codec}"] = flat(params)
        optimizer.close()
    return out


def count_what_gloo_gets() -> list[int]:
    """Bytes for other workers, collective by collective, of those that a coded mean is made of."""
    handed: list[int] = []

    def counted(name: str, nbytes: Callable[[Tensor], int]) -> None:
        collective = getattr(ProcessGroupCommunicator, name)

        def call(self: Any, output: Tensor, input: Tensor, **options: Any) -> Handle:
            handed.append(nbytes(input))
            return collective(self, output, input, **options)

        setattr(ProcessGroupCommunicator, name, call)

    others = dist.get_world_size() - 1
    counted("all_to_all", lambda rows: others * rows[0].nbytes)
    counted("all_gather", lambda own: others * own.nbytes)
    return handed


@pytest.mark.parametrize("backend", ["gloo", pytest.param("emulated", marks=pytest.mark.soak)])
def test_four_real_workers(backend: str) -> None:
    results = workers.run(whole_path, 4, backend=backend)
    streaming = Lockstep(partial(distoptim.StreamingDiLoCo, **STREAMING), [START] * 4).run(
        24, gradient
    )[-1]
    sampled = Lockstep(partial(distoptim.BMUF, **FULL), [START] * 4)
    for _ in range(8):
        sampled.step(gradient, samples=[1.0, 2.0, 3.0, 4.0])
    for rank, result in enumerate(results):
        assert result["bytes"] == 3 * sent_per_mean("int8", 4)
        assert result["in flight"] >= 2
        assert torch.equal(result["streaming"], streaming[rank])
        assert torch.equal(result["resumed"], streaming[rank])
        assert torch.equal(result["samples"], sampled.x()[rank])
        torch.testing.assert_close(result["mean"], streaming.mean(0), atol=1e-6, rtol=1e-6)
        for name in ("join", "levels int8"):
            assert torch.equal(result[name], results[0][name]), name
            assert not torch.equal(result[name], flat(fresh()))
        exact = result["levels None"]
        assert 0 < (result["levels int8"] - exact).norm() < 0.02 * exact.norm()


def fail(rank: int) -> str:
    """Rank 2 is gone when the others' first stage is under way."""
    params = fresh()
    optimizer = distoptim.CoCoDSGD(params, tau=3, lr=0.05, codec="int8")
    steps(optimizer, params, rank, 5)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CommunicationError) as caught:
        steps(optimizer, params, rank, 9)
    with pytest.raises(CommunicationError):
        optimizer.average()
    assert torch.isfinite(flat(params)).all()
    optimizer.state_dict()
    optimizer.close()
    return str(caught.value)


def test_a_death_surfaces_as_with_float32() -> None:
    for rank, message in enumerate(workers.run(fail, 4, expect_exit={2: -9})):
        assert rank == 2 or message.startswith(f"rank {rank}: mean of fragment 0 failed ")


def freeze(rank: int) -> str:
    """The host of torch's store stands still before the first coded mean."""
    params = fresh()
    optimizer = distoptim.CoCoDSGD(params, tau=3, lr=0.05, codec="int8", timeout_s=4.0)
    steps(optimizer, params, rank, 2)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(CommunicationError) as caught:
        steps(optimizer, params, rank, 9)
    optimizer.close()
    return str(caught.value)


def test_nobody_waits_for_a_store_whose_host_stands_still() -> None:
    results = workers.run(freeze, 3, expect_exit={0: -signal.SIGSTOP})
    for rank in (1, 2):
        assert results[rank].startswith(f"rank {rank}: mean of fragment 0 failed ")
        assert "(timeout 4 s)" in results[rank]
