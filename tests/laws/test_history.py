"""What a worker's history says it did, and the files made of it."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch

from distoptim import simulator
from distoptim.comm import Link
from tests.helpers import toy

MAKERS = toy.diagonal(toy.variants(fragments=(1, 2)))
NETWORK = simulator.Ring([Link(latency_s=0.15, bandwidth_gbit_s=1.0)])


def trained(name, steps, folder=None):
    """Virtual workers whose means take longer than a round, for every algorithm once."""
    cluster = simulator.Cluster(
        workers=3,
        model=lambda: torch.nn.Linear(8, 2).double(),
        optimizer=MAKERS[name],
        compute=simulator.Constant(0.1),
        network=NETWORK,
    )
    for optimizer in cluster.optimizers if folder else ():
        optimizer.record(folder)
    for _ in range(steps):
        cluster.step(lambda model, rank: model(torch.ones(4, 8).double()).square().mean())
    return cluster


@pytest.mark.parametrize("name", MAKERS)
def test_steps_and_waits_are_all_of_a_workers_time(name):
    cluster = trained(name, 4 * toy.TAU + 1)
    for optimizer, clock in zip(cluster.optimizers, cluster.fabric.clocks, strict=True):
        spans = optimizer.history()
        own = [s for s in spans if s.name in ("step", "wait")]
        # One after the other, from the first average() on, without a gap.
        assert own[0].start_s == 0.1
        assert all(a.end_s == b.start_s for a, b in itertools.pairwise(own))
        assert own[-1].end_s == clock
        stats = optimizer.stats()
        waits = sum(s.end_s - s.start_s for s in spans if s.name == "wait")
        assert waits == pytest.approx(stats["exposed_s"])
        assert sum(s.name == "merge" for s in spans) == stats["syncs"]
        flights = [s for s in spans if s.name == "in flight"]
        assert all(s.end_s > s.start_s for s in flights)
        # Round 0 of what is hidden counts as in flight from the start, and takes no time.
        assert 0 < len(flights) <= stats["syncs"]


def test_real_steps_waits_and_merges_do_not_overlap():
    params = [torch.nn.Parameter(torch.ones(1000))]
    optimizer = toy.alone(partial(toy.ALGORITHMS["overlap-local-sgd"], lr=0.1, tau=2), params)
    for _ in range(7):
        params[0].grad = torch.ones(1000)
        optimizer.step()
        optimizer.average()
    spans = [s for s in optimizer.history() if s.name != "in flight"]
    assert [s.name for s in spans].count("step") == 6
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))
    optimizer.close()


def test_a_file_has_all_spans_and_a_trace_the_profilers_labels(tmp_path):
    name = next(name for name in MAKERS if name.startswith("overlap-local-sgd"))
    cluster = trained(name, 9, tmp_path / "run")
    first = cluster.optimizers[0]
    with pytest.raises(ValueError, match="this optimizer records already"):
        first.record(tmp_path)
    first.export_trace(tmp_path / "trace.json")
    first.close()
    before = first.history()
    first.record(tmp_path / "later")
    first.close()
    # From there on: what was before is in the other file.
    assert len((tmp_path / "later" / "worker-0.jsonl").read_text().splitlines()) == 1
    assert first.history() == before
    for optimizer in cluster.optimizers:
        optimizer.close()
    for rank, optimizer in enumerate(cluster.optimizers):
        lines = (tmp_path / "run" / f"worker-{rank}.jsonl").read_text().splitlines()
        head, *spans = map(json.loads, lines)
        assert (head["worker"], head["algorithm"]) == (str(rank), "OverlapLocalSGD")
        assert spans == [list(span) for span in optimizer.history()]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shown = {event["name"] for event in events if event["ph"] == "X"}
    assert shown == {
        "step",
        "in flight",
        "distoptim::wait",
        "distoptim::merge",
        "distoptim::launch",
    }
    assert all(event["ts"] >= 0 for event in events if event["ph"] == "X")
