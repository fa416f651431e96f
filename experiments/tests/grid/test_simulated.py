"""Simulated training runs and grids of them."""

from __future__ import annotations

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.grid import simulated as grid
from distoptim_experiments.machines import Machines
from distoptim_experiments.training.virtual import check_virtual, run

MACHINES = Machines(step_ms=30, slowdown="exponential", latency_ms=10, bandwidth_gbit_s=1)
CONFIG = RunConfig(data="synthetic", model="mlp", workers=3, steps=12, batch_size=16, log_every=4)


def test_a_grid_runs_all_combinations_once_and_resumes(tmp_path):
    configs = grid.combinations(CONFIG, {"algorithm": ["ddp", "cocod-sgd"], "tau": [2, 4]})
    assert [(c.algorithm, c.tau) for c in configs] == [
        ("ddp", 1),
        ("cocod-sgd", 2),
        ("cocod-sgd", 4),
    ]
    seen = []
    folders = grid.run_all(configs[:2], MACHINES, tmp_path, done=lambda *at: seen.append(at))
    before = [(f / records.FILE).read_text() for f in folders]
    (tmp_path / grid.name(configs[2], MACHINES)).mkdir()
    folders = grid.run_all(configs, MACHINES, tmp_path, done=lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2), (2, 2), (2, 3), (3, 3)]
    assert [(f / records.FILE).read_text() for f in folders[:2]] == before
    assert all(records.read(f).summary is not None for f in folders)


def test_a_run_is_deterministic_and_its_time_virtual(tmp_path):
    lines = []
    for threads in (1, 2):
        run(CONFIG, MACHINES, tmp_path / str(threads), threads=threads)
        record = records.read(tmp_path / str(threads))
        lines.append((record.logs, record.evaluations, record.summary))
    assert lines[0] == lines[1]
    assert lines[0][2].seconds > 12 * 0.03


def test_a_failed_run_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("distoptim_experiments.training.virtual.score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(CONFIG, MACHINES, tmp_path)
    assert not records.finished(tmp_path)


def test_synchronous_is_large_batch_sgd(tmp_path):
    run(CONFIG.replace(algorithm="ddp"), Machines(), tmp_path / "a")
    run(
        CONFIG.replace(algorithm="bmuf", tau=1, options={"block_momentum": 0.0}),
        Machines(),
        tmp_path / "b",
    )
    a, b = records.read(tmp_path / "a"), records.read(tmp_path / "b")
    assert [line.loss for line in a.logs] == pytest.approx([line.loss for line in b.logs], rel=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        {"step_ms": 0.0},
        {"slowdown": "often"},
        {"latency_ms": -1.0},
        {"bandwidth_gbit_s": -2.0},
        {"collective": "star"},
        {"streams": 65},
        {"site_size": 1},
        {"site_size": 4, "site_bandwidth_gbit_s": 0.0},
    ],
)
def test_bad_machines_are_refused(bad):
    with pytest.raises(ValueError, match="allowed"):
        Machines(**bad)


def test_streams_bound_what_a_mean_moves_in_a_round_trip():
    far = {"latency_ms": 100.0, "bandwidth_gbit_s": 1.0}
    one, eight = (Machines(streams=n, **far).network().all_reduce_s(100e6, 2) for n in (1, 8))
    assert one > 4 * eight
    assert eight == pytest.approx(Machines(**far).network().all_reduce_s(100e6, 2))


def test_a_run_may_begin_synchronously_and_choose_its_period(tmp_path):
    slow = Machines(step_ms=10, latency_ms=12)
    config = CONFIG.replace(algorithm="overlap-local-sgd", steps=40, tau=1)
    exposed, syncs, tau = {}, {}, {}
    variants = {
        "fixed": {},
        "hidden": {"hide_communication": True},
        "post": {"post_local": 20, "tau": 10},
        "table": {"tau_at": "20:4"},
        "loss": {"tau": 8, "adacomm": 8},
        "equal": {"equal_time": 0.08, "steps": 5},
    }
    for name, changed in variants.items():
        run(config.replace(**changed), slow, tmp_path / name)
        summary = records.read(tmp_path / name).summary
        exposed[name], syncs[name] = summary.exposed_s, summary.syncs
        tau[name] = summary.tau
    assert exposed["hidden"] < exposed["fixed"] / 3
    assert syncs["post"] in (21, 22)
    assert (tau["fixed"], tau["table"]) == (1, 4)
    assert tau["loss"] < 8
    assert (tau["equal"], syncs["equal"]) == (8, 5)


def test_what_virtual_workers_cannot_do_is_refused():
    with pytest.raises(ValueError, match="levels='1:2': virtual workers are in no process group"):
        check_virtual(CONFIG.replace(levels="1:2", workers=4))


def test_names_of_finished_runs_stay():
    """A name that changed would make every run of every finished grid anew."""
    assert (
        grid.name(RunConfig(algorithm="ddp", milestones=[3]), Machines(step_ms=20))
        == "ddp-tau4-m4-seed0-85cf2ba3"
    )
