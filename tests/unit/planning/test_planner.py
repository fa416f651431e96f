"""The planner predicts by running the engine, and recommends what its own rule says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distoptim import ALGORITHMS
from distoptim.comm import Link
from distoptim.planning.planner import CLOSE, TAUS, Island, Job, plan
from distoptim.planning.studied import below
from distoptim.simulator import Gloo, Ring
from tests.helpers.share import share


def job(latency_s=0.01, bandwidth_gbit_s=1.0, **changes):
    return Job(
        **{
            "step_s": 0.1,
            "params": 11_000_000,
            "workers": 4,
            "network": Ring([Link(latency_s, bandwidth_gbit_s)]),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def usual():
    return plan(job()).predictions


def test_predictions_by_hand(usual):
    mean_s = Link(0.01, 1.0).all_reduce_s(44e6, 4)
    found = {(p.algorithm, p.tau): p for p in usual}
    assert len(found) == 1 + len(ALGORITHMS) * len(TAUS)
    assert found["local-sgd", 8].step_s == pytest.approx(0.1 + mean_s / 8)
    assert found["overlap-local-sgd", 2].step_s == pytest.approx(0.1 + (mean_s - 0.2) / 2)
    assert found["overlap-local-sgd", 8].step_s == pytest.approx(0.1)
    assert found["ddp", 1].step_s > found["local-sgd", 2].step_s
    assert found["local-sgd", 8].gbytes_per_hour == pytest.approx(
        44e6 / 1e9 * 3600 / (0.8 + mean_s)
    )


def test_memory_is_what_the_docs_say(usual):
    copies = {p.algorithm: p.copies for p in usual}
    assert copies == {
        "ddp": 1,
        "local-sgd": 1,
        "cocod-sgd": 2,
        "easgd": 2,
        "bmuf": 3,
        "slowmo": 3,
        "overlap-local-sgd": 3,
        "diloco": 3,
        "streaming-diloco": 3,
        "eager-diloco": 5,
        "co2": 3,
        "overlap-bmuf": 3,
        "global-momentum": 3,
    }


@pytest.mark.parametrize(
    ("latency_s", "bandwidth"), share([(0.001, 10), (0.01, 1), (0.05, 0.1), (0.2, 0.01)], of=2)
)
def test_recommends_the_smallest_tau_that_is_close_to_the_fastest(latency_s, bandwidth):
    made = plan(job(latency_s, bandwidth))
    close = [
        p for p in made.predictions if p.step_s <= CLOSE * min(q.step_s for q in made.predictions)
    ]
    assert made.best in close
    assert made.best.tau == min(p.tau for p in close)
    points = below("sgd", made.best.tau)
    equals = {p.algorithm for p in close if p.tau == made.best.tau}
    assert made.best.algorithm == next(name for name in points if name in equals)
    assert f"(optimizer, tau={made.best.tau}" in made.line
    assert made.best.hidden
    assert "docs/which.md" in made.reason


def test_fewer_bytes_are_offered_where_a_round_would_be_very_long(usual):
    made = plan(job(0.01, 0.02, params=124_000_000))
    hidden = {(p.codec, p.tau) for p in made.predictions if p.hidden and p.algorithm != "ddp"}
    # An all-reduce takes 2976 local steps; in codes of 1.016 and 0.504 bytes a number 756 and 375.
    assert hidden == {(None, 4096), *(("int8", t) for t in (1024, 2048, 4096))} | {
        ("e3m0", tau) for tau in (512, 1024, 2048, 4096)
    }
    assert made.line == "optimizer = distoptim.OverlapBMUF(optimizer, tau=512, codec='e3m0')"
    assert (
        "without a codec tau = 4096 hides it; codecs are for float32, on GPUs with offload=True"
        in made.reason
    )
    assert made.best.gbytes_per_hour == pytest.approx(0.504 * 0.124 * 3600 / 51.2, rel=2e-3)
    assert {p.codec for p in usual} == {None}


def test_says_when_nothing_hides():
    made = plan(job(0.01, 1e-4, params=124_000_000))
    assert made.reason.startswith(
        "nothing that is offered hides this link: even this waits for 1731%"
    )
    assert "no tau hides it without a codec" in made.reason
    only = plan(job(0.01, 0.02, params=124_000_000), algorithms=["co2"], taus=[256])
    assert {(p.algorithm, p.tau) for p in only.predictions} == {("ddp", 1), ("co2", 256)}
    assert only.best.codec == "e3m0"
    coded = plan(job(), algorithms=["local-sgd"], taus=[8], codecs=["int8"]).predictions
    assert [p.codec for p in coded] == [None, None, "int8"]
    assert coded[2].step_s < coded[1].step_s
    assert only.reason.startswith("nothing that is offered hides this link")


@pytest.mark.parametrize(
    ("tau", "name"), [(4, "overlap-local-sgd"), (8, "overlap-bmuf"), (32, "overlap-bmuf")]
)
def test_of_equals_it_takes_what_did_best_in_the_recorded_runs(tau, name):
    made = plan(job(), taus=[tau])
    equals = {
        p.algorithm
        for p in made.predictions
        if p.step_s == made.best.step_s and p.copies == made.best.copies
    }
    assert {"overlap-local-sgd", "overlap-bmuf"} <= equals
    assert made.best.algorithm == name


def test_of_equals_it_takes_the_first_that_was_asked_for():
    for first, second in (("co2", "overlap-bmuf"), ("overlap-bmuf", "co2")):
        assert plan(job(), algorithms=[first, second], taus=[8]).best.algorithm == first


def test_the_inner_optimizer_decides_among_equals():
    near = job(0.001)
    assert plan(near, taus=[16]).best.algorithm == "overlap-bmuf"
    made = plan(near, taus=[16], inner="adamw")
    # A mean of all takes 0.53 s; one of a sixth is shorter than the local step behind which it hides.
    assert made.line == "optimizer = distoptim.StreamingDiLoCo(optimizer, tau=16, fragments=6)"
    with pytest.raises(ValueError, match="inner='adam': allowed are sgd, adamw"):
        plan(job(), inner="adam")


@pytest.mark.parametrize(
    "changes", [{"bandwidth_gbit_s": 1000.0, "latency_s": 1e-6}, {"workers": 1}]
)
def test_says_when_none_of_it_pays(changes):
    made = plan(job(**changes))
    assert made.best.algorithm == "ddp"
    assert "none of this pays" in made.reason


def test_one_stream_cannot_fill_a_long_fat_link():
    far = Link(0.1, 1.0)
    one, several = (
        plan(job(network=Gloo(far, streams=s), workers=2), algorithms=["local-sgd"], taus=[1])
        for s in (1, "auto")
    )
    found = [{(p.algorithm, p.tau): p.step_s for p in made.predictions} for made in (one, several)]
    # 44 MB take 25 round trips beside the two of the ring.
    assert found[0]["local-sgd", 1] == pytest.approx(0.1 + 0.2 + 44 / 1.75 * 0.1)
    assert found[1]["local-sgd", 1] < found[0]["local-sgd", 1] / 3
    assert found[0]["ddp", 1] == found[1]["ddp", 1]
    assert Gloo(Link(0.001, 1.0)).all_reduce_s(44e6, 2) == Ring([Link(0.001, 1.0)]).all_reduce_s(
        44e6, 2
    )


def test_ddp_has_two_buckets_at_once_on_a_link_that_they_share():
    # Of 25 MiB, but the first of 1.
    nbytes = [2**20, 25 * 2**20, 25 * 2**20]
    params = sum(nbytes) // 4
    ready = [0.1 / 3 + 0.2 / 3 * sum(nbytes[: i + 1]) / sum(nbytes) for i in range(3)]
    alone = [0.2 + n / 1.75e6 * 0.1 for n in nbytes]
    far, near = (
        plan(
            job(network=Gloo(Link(0.1, rate)), workers=2, params=params),
            algorithms=["local-sgd"],
            taus=[1],
        )
        for rate in (1000.0, 0.1)
    )
    # The third begins when the first is over, beside the second.
    assert far.predictions[0].step_s == pytest.approx(ready[0] + alone[0] + alone[2])
    assert ready[0] + alone[0] + alone[2] > ready[1] + alone[1]
    # Where the link is full at once it stays so, and the last message has its own way to go.
    assert near.predictions[0].step_s == pytest.approx(ready[0] + sum(nbytes) * 8 / 1e8 + 0.2)


def test_islands_are_one_worker_each_or_none():
    """Four hosts of two ranks, which share 1 Gbit/s between hosts and have 100 inside."""
    island = Island(2, Ring([Link(0.0, 100.0)]))
    made = plan(job(island=island), algorithms=["local-sgd", "overlap-local-sgd"], taus=[2])
    found = {(p.algorithm, p.ranks): p for p in made.predictions}
    flat_s = Link(0.01, 1.0).all_reduce_s(44e6, 8)
    # Gradients inside wait for DDP's last bucket alone, the third.
    inside_s = 0.1 + Link(0.0, 100.0).all_reduce_s(44e6 - 26 * 2**20, 2)
    among_s = Link(0.01, 1.0).all_reduce_s(44e6, 4)
    assert found["local-sgd", 1].step_s == pytest.approx(0.1 + flat_s / 2)
    assert found["local-sgd", 2].step_s == pytest.approx(inside_s + among_s / 2)
    assert found["overlap-local-sgd", 2].gbytes == 3 * 0.044
    # The same as of eight workers on the link among hosts.
    eight = plan(job(workers=8), algorithms=["local-sgd"], taus=[2]).predictions
    assert found["ddp", 1] == eight[0]
    assert found["local-sgd", 1] == eight[1]
    assert made.best.ranks == 2
    assert made.line == "optimizer = distoptim.OverlapLocalSGD(optimizer, tau=2, device_mesh=mesh)"
    assert "islands of 2 ranks" in made.reason
    uneven = plan(job(island=island, speeds=(1, 0.5)), algorithms=["local-sgd"], taus=[2])
    assert {p.ranks for p in uneven.predictions if p.round_s} == {1, 2}


def test_it_says_by_how_much_nothing_hides():
    slow = job(params=11_000_000_000)
    made = plan(slow, algorithms=["overlap-local-sgd"], taus=[8], codecs=[])
    factor = 1 + made.best.exposed_share
    assert f"a link {factor:.2g} times as fast would hide it" in made.reason
    longer = replace(slow, step_s=slow.step_s * factor)
    assert plan(longer, algorithms=["overlap-local-sgd"], taus=[8], codecs=[]).best.hidden
    blocking = plan(slow, algorithms=["local-sgd"], taus=[8], codecs=[])
    assert "longer local steps would help" in blocking.reason


def test_machines_of_unequal_speed():
    made = plan(job(speeds=(1.0, 1.0, 0.25)), algorithms=["overlap-local-sgd"], taus=[1, 8])
    # Workers of speeds 1, 1, 1/4, 1: on the mean 13/16, and a single step of the slowest takes 0.4 s.
    found = [(p.tau, p.round_s is None, p.step_s) for p in made.predictions[1:]]
    assert found[1:] == [(8, True, pytest.approx(0.4)), (8, False, pytest.approx(0.1 * 16 / 13))]
    assert made.best.round_s == pytest.approx(8 * 0.1 * 16 / 13)
    assert (
        made.line
        == "optimizer = distoptim.OverlapLocalSGD(optimizer, tau=distoptim.periods.EqualTime(0.985))"
    )
    assert "with one tau all wait for the slowest" in made.reason
    alike = [plan(job(speeds=s), taus=[8]) for s in ((), (1.0, 1.0))]
    assert alike[0] == alike[1]
    assert {p.algorithm for p in plan(job(speeds=(1, 2)), taus=[8]).predictions if p.round_s} <= {
        name for name in ALGORITHMS if name != "streaming-diloco"
    }


@pytest.mark.parametrize(
    "bad",
    [
        lambda: job(step_s=0.0),
        lambda: job(params=0),
        lambda: job(workers=0),
        lambda: Island(1, Ring([Link(0.0, 1.0)])),
        lambda: job(speeds=(1.0, 0.0)),
        lambda: job(bandwidth_gbit_s=-1.0),
        lambda: plan(job(), taus=[0]),
        lambda: plan(job(), algorithms=["sgd"]),
        lambda: plan(job(), codecs=["zip"]),
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match="allowed"):
        bad()
