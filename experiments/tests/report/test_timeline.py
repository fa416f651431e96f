"""The time line of a run: virtual and real workers, from the command to the page."""

from __future__ import annotations

import json

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.report import timeline
from distoptim_experiments.training import virtual

from distoptim.testing.processes import run
from experiments.tests.training.ranks import train

SMALL = RunConfig(
    data="synthetic",
    model="mlp",
    workers=2,
    tau=3,
    batch_size=8,
    steps=10,
    evaluate_every=10,
    timeline=True,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of virtual workers whose means take longer than a round."""
    folder = tmp_path_factory.mktemp("run")
    virtual.run(SMALL, Machines(step_ms=100, latency_ms=200), folder, threads=1)
    return folder


def test_virtual_workers_are_rows_and_their_sums_those_of_the_record(made, tmp_path):
    lanes = timeline.read(made)
    assert [lane.name for lane in lanes] == ["0", "1"]
    summary = records.read(made).summary
    for lane in lanes:
        waited = sum(s.end_s - s.start_s for s in lane.spans if s.name == "wait")
        assert waited == pytest.approx(summary.exposed_s)
        assert lane.spans[0].start_s == 0
    timeline.write(lanes, tmp_path)
    assert (tmp_path / timeline.PNG).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / timeline.HTML).read_text()
    assert f"<td>{summary.exposed_s:.2f}</td>" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def trained(rank, folder):
    train(SMALL, folder)


def test_real_workers_stand_on_one_clock(tmp_path):
    run(trained, 2, tmp_path)
    first, second = timeline.read(tmp_path)
    for name in ("merge", "launch"):
        assert sum(s.name == name for s in first.spans) == 3
    # A mean is there for nobody before both have begun to launch it; the last one is still in flight.
    for one, other in ((first, second), (second, first)):
        launches = [s.start_s for s in one.spans if s.name == "launch"]
        ends = [s.end_s for s in other.spans if s.name == "in flight"]
        assert len(ends) == 2
        assert all(a < b for a, b in zip(launches, ends, strict=False))


def test_what_came_and_went_is_marked(tmp_path):
    lines = [
        {"format": 1, "worker": "a", "algorithm": "LocalSGD", "zero": 1000.0},
        ["step", 1.0, 2.0, 1, -1],
        ["lost", 2.0, 2.0, 1, 0],
        {"time": 1002.5, "what": "joined", "worker": "b", "why": "-"},
        {"time": 1002.7, "what": "lost", "worker": "b", "why": "-"},
    ]
    (tmp_path / "worker-a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (lane,) = timeline.read(tmp_path)
    assert lane.marks == [
        (pytest.approx(1.0), "lost"),
        (pytest.approx(1.5), "joined"),
        (pytest.approx(1.7), "lost worker"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no first line that says whose it is"),
        ("{", "worker-0.jsonl:1: not a line of a time line"),
        ('{"format": 2}', "format=2: allowed is 1"),
        ('{"format": 1}', "worker-0.jsonl:1: not a line of a time line: 'worker'"),
        ("[1]", "worker-0.jsonl:1: not a line of a time line"),
        ("3", "worker-0.jsonl:1: not a line of a time line"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, text, words):
    (tmp_path / "worker-0.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"worker-0\.jsonl") as raised:
        timeline.read(tmp_path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_said(made, tmp_path):
    with pytest.raises(ValueError, match=r"no worker-\*\.jsonl in it"):
        timeline.read(tmp_path)
    with pytest.raises(ValueError, match=r"seconds=99:100: allowed is a part of 0:\d"):
        timeline.write(timeline.read(made), tmp_path, seconds=(99.0, 100.0))
