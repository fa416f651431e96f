"""Grids on real workers."""

from __future__ import annotations

import os
import signal

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.grid import run, spec
from distoptim_experiments.grid.real import LocalProcesses, OneOfWorkers, Stopped
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.launch import Job, run_local

from distoptim.cli import application
from tests.helpers.shell import execute

GRID = """
[run]
data = "synthetic"
model = "mlp"
workers = 2
batch_size = 100
epochs = 6
log_every = 1
slowdown = "exponential"
slowdown_ms = 60.0
[grid]
tau = [2]
[methods.overlap]
algorithm = "overlap-local-sgd"
[methods.wild]
algorithm = "local-sgd"
lr = 1e9
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path / "grid.toml"


def lines(folder):
    return list(records.read_lines(folder / records.FILE))


def test_an_interrupted_grid_goes_on_at_its_checkpoint_and_repeats_nothing(file, tmp_path):
    grid, out = spec.read(file, virtual=False), tmp_path / "out"
    sent = []

    def interrupt(stage, finished, total):
        # After the first epoch of the first run, and long before it ends: workers vote four times a second.
        if finished > 0.2 and not sent:
            sent.append(finished)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as stopped:
        run.reproduce(grid, out, runner=LocalProcesses(), done=interrupt)
    assert stopped.value.signum == signal.SIGINT
    first, wild = (
        path
        for (stage,) in [run.stages(grid, out, runner=LocalProcesses())]
        for _, path in stage.runs()
    )
    assert checkpoint.exists(first)
    assert not records.finished(first)
    assert not wild.exists()

    assert run.reproduce(grid, out, runner=LocalProcesses()) == [first, wild]
    assert [line.kind for line in lines(first) if line.kind in ("start", "resume", "summary")] == [
        "start",
        "resume",
        "summary",
    ]
    assert [line.step for line in records.read(first).logs] == list(range(1, 61))
    assert (records.read(first).start.label, records.read(first).summary.diverged) == (
        "overlap",
        False,
    )
    assert records.read(wild).summary.diverged
    assert not list(out.rglob(checkpoint.FOLDER))

    before = [path.stat().st_mtime_ns for path in out.rglob(records.FILE)]
    told = []
    run.reproduce(grid, out, runner=LocalProcesses(), done=lambda *at: told.append(at))
    assert told == [("runs", 1, 2), ("runs", 2, 2)]
    assert [path.stat().st_mtime_ns for path in out.rglob(records.FILE)] == before


def test_under_torchrun_every_process_is_one_worker_of_every_run(file, tmp_path):
    file.write_text(GRID + "[tune]\nlr = [0.01, 0.02]\nepochs = 1\n")
    changes = ("steps=4", "validation=0.1", "slowdown=none", "slowdown_ms=0")
    sets = " ".join(f"--set {change}" for change in changes)
    said = execute(f"torchrun --nproc-per-node=2 -m distoptim reproduce {file} {sets}", tmp_path)
    assert ["records: runs/grid" in one for one in said] == [True, False]
    final = [
        records.read(path.parent)
        for path in (tmp_path / "runs/grid/final").glob(f"*/{records.FILE}")
    ]
    assert sorted((r.start.label, r.config.workers, r.summary.step) for r in final) == [
        ("overlap", 2, 4),
        ("wild", 2, 4),
    ]
    assert len(list((tmp_path / "runs/grid/trials").glob(f"*/{records.FILE}"))) == 4


def test_another_number_of_processes_is_refused(file, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="workers=2, but torchrun has started 4 processes"):
        application()(["reproduce", str(file)])


@pytest.mark.parametrize("algorithm", ["ddp", "cocod-sgd"])
def test_a_run_without_finite_losses_ends_early_and_is_marked(tmp_path, algorithm):
    config = RunConfig(
        data="synthetic",
        model="mlp",
        workers=2,
        batch_size=8,
        steps=10**6,
        tau=2,
        lr=1e30,
        algorithm=algorithm,
        log_every=1,
        evaluate_every=10**6,
    )
    assert run_local(Job(config, tmp_path)) == 0
    summary = records.read(tmp_path).summary
    assert summary.diverged
    assert summary.step < 10**6


class At:
    """A place where everybody reads what anybody has written."""

    def __init__(self, rank, store):
        self.rank = rank
        self._store = store

    def connect(self, timeout_s):
        return self._store


class Store(dict):
    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


def test_what_rank_0_decides_is_data_that_all_get_alike():
    store = Store()
    first, second = (OneOfWorkers(At(rank, store), 1.0) for rank in (0, 1))
    made = first.decide(lambda: [(0, True), ("a", 0.5)])
    assert second.decide(lambda: pytest.fail("rank 0 decides")) == made == [[0, True], ["a", 0.5]]
    # A pickle that prints, as a stranger might put it there.
    store["decision2"] = b"cbuiltins\nprint\n(S'run'\ntR."
    with pytest.raises(ValueError, match="Expecting value"):
        second.decide(list)
