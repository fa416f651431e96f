"""Grids from TOML files."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distoptim_experiments import frames, records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import cifar
from distoptim_experiments.grid import run, spec
from distoptim_experiments.grid.ended import Ended
from distoptim_experiments.report import drawing, report, runs
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.virtual import Virtual
from distoptim_experiments.training.virtual import run as run_one

from distoptim.cli import application
from experiments.tests.report.records import lines, put

GRID = """
[run]
data = "synthetic"
model = "mlp"
workers = 3
batch_size = 16
epochs = 3
validation = 0.1
[machines]
latency_ms = 20.0
[grid]
seed = [0, 1]
tau = [2, 4]
[tune]
lr = [0.01, 1e6]
epochs = 1
[methods.sync]
algorithm = "ddp"
[methods.overlap]
algorithm = "overlap-local-sgd"
"""


def written(tmp_path: Path, text: str = GRID) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_a_grid_tries_learning_rates_and_runs_everything_once(tmp_path):
    grid = spec.read(written(tmp_path, GRID.replace("epochs = 3", "epochs = 1")))
    told = []
    folders = run.reproduce(grid, tmp_path / "out", done=lambda *at: told.append(at), processes=1)
    made = [records.read(folder) for folder in folders]
    assert [(r.start.label, r.config.tau, r.config.seed) for r in made] == [
        ("sync", 1, 0),
        ("overlap", 2, 0),
        ("overlap", 4, 0),
        ("sync", 1, 1),
        ("overlap", 2, 1),
        ("overlap", 4, 1),
    ]
    # 1e6 makes every method diverge; a diverged trial is whole, and never chosen.
    assert {r.config.lr for r in made} == {0.01}
    trials = [
        records.read(path.parent) for path in (tmp_path / "out" / run.TRIALS).glob("*/record.jsonl")
    ]
    assert (
        sorted((r.config.lr, r.summary.diverged) for r in trials)
        == [(0.01, False)] * 3 + [(1e6, True)] * 3
    )
    before = [(folder / records.FILE).stat().st_mtime_ns for folder in folders]
    assert run.reproduce(grid, tmp_path / "out", processes=1) == folders
    assert [(folder / records.FILE).stat().st_mtime_ns for folder in folders] == before
    # A trial is missing: the rate of its setting alone is open, and what has one is done.
    (tmp_path / "out" / frames.RUNS).unlink()
    first, runs_ = run.stages(grid, tmp_path / "out", processes=1)
    (first.runs()[0][1] / records.FILE).unlink()
    first, runs_ = run.stages(grid, tmp_path / "out", processes=1)
    missing = [
        case.label
        for stage in (first, runs_)
        for case, path in stage.runs()
        if not records.finished(path)
    ]
    assert missing == ["sync"] * 3


@pytest.mark.soak
def test_records_moved_beside_their_folders_are_found(tmp_path):
    grid, out = (
        spec.read(written(tmp_path, GRID.replace("epochs = 3", "steps = 4"))),
        tmp_path / "out",
    )
    run.reproduce(grid, out, processes=1)
    # In so few steps no trial is better than guessing: the smaller rate it is, not none.
    assert set(frames.read(out).ended.lr) == {0.01, 1e6}
    before = [
        path.read_text() for path in report.write(runs.named(frames.read(out)), tmp_path / "before")
    ]
    for path in list(out.rglob(records.FILE)):
        path.rename(path.parent.with_name(f"{path.parent.name}.{records.FILE}"))
        path.parent.rmdir()
    done = run.reproduce(grid, out, processes=1)
    assert not any(folder.exists() for folder in done)
    assert len(list(out.rglob(f"*.{records.FILE}"))) == 12
    assert [
        path.read_text() for path in report.write(runs.named(frames.read(out)), tmp_path / "after")
    ] == before


def test_without_records_a_grid_goes_on_at_the_rows_of_its_csv(tmp_path, capsys):
    path, out = written(tmp_path), tmp_path / "out"
    command = ["reproduce", str(path), "--folder", str(out), "--processes", "1", "--set", "steps=4"]
    command += ["--set", "seed=[0]"]
    assert application()([*command, "--hours", "1e-9"]) == 0
    assert "1e-09 hours are over, 9 to do" in capsys.readouterr().out
    assert application()(command) == 0
    for stage in (run.TRIALS, run.FINAL):
        shutil.rmtree(out / stage)
    capsys.readouterr()
    # The learning rates chosen are those of the rows, or the runs would be others.
    assert application()([*command, "--set", "seed=[0, 1]"]) == 0
    assert capsys.readouterr().out.startswith("3 to do")
    assert len(list(out.rglob(records.FILE))) == 3
    ended = frames.read(out).ended
    assert sorted(ended.seed[ended.stage == "final"]) == [0] * 3 + [1] * 3


def test_a_list_under_machines_is_an_axis_of_the_grid(tmp_path):
    text = GRID.replace(
        "latency_ms = 20.0",
        'latency_ms = 20.0\nslowdown = ["none", "pareto"]\nstep_ms = [10.0, 20.0]',
    )
    text = text.replace("seed = [0, 1]", "seed = [0]").replace("tau = [2, 4]", "tau = [2]")
    grid = spec.read(written(tmp_path, text.replace("epochs = 3", "steps = 4")))
    told = []
    folders = run.reproduce(grid, tmp_path / "out", done=lambda *at: told.append(at), processes=1)
    starts = [records.read(folder).start for folder in folders]
    assert len(set(folders)) == len(folders) == 4 * 2
    assert [(s.machines.slowdown, s.machines.step_ms) for s in starts[::2]] == [
        ("none", 10.0),
        ("none", 20.0),
        ("pareto", 10.0),
        ("pareto", 20.0),
    ]
    assert {s.machines.latency_ms for s in starts} == {20.0}
    assert [at for at in told if at[0] == "learning rates"][-1] == ("learning rates", 4, 4)
    assert told[-1] == ("runs", 8, 8)


def test_rates_for_text_are_chosen_by_loss(tmp_path):
    text = (
        GRID.replace('"synthetic"', '"plays"')
        .replace('"mlp"', '"gpt-small"')
        .replace("1e6", "0.02")
    )
    trials = spec.read(written(tmp_path, text)).trials()
    for i, case in enumerate(trials):
        # The more accurate one has the larger loss.
        score = {
            "validation_loss": 2 + case.config.lr,
            "validation_accuracy": case.config.lr,
        }
        first, *_, last = lines(lr=case.config.lr, model="gpt-small")
        put(tmp_path, f"{i}", [first, last | score])
    tried = [(case, tmp_path / f"{i}") for i, case in enumerate(trials)]
    rates = run.choose(tried, Ended(tmp_path))
    assert set(rates.values()) == {0.01}
    assert len(rates) == 3


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("algorithm", ["ddp", "overlap-local-sgd", "easgd", "streaming-diloco"])
def test_a_run_goes_on_at_its_last_epoch_as_if_it_had_never_stopped(
    tmp_path, monkeypatch, algorithm
):
    config = RunConfig(
        data="synthetic",
        model="mlp",
        workers=3,
        batch_size=16,
        epochs=3,
        algorithm=algorithm,
        tau=4,
        validation=0.1,
        schedule="cosine",
        warmup_epochs=0.5,
    )
    machines = spec.read(written(tmp_path)).machines[0]
    run_one(config, machines, tmp_path / "whole", threads=1)
    step = Virtual.step

    def dying(self, at):
        if at == 2 * self.problem.steps_per_epoch + 1:
            raise Killed
        return step(self, at)

    monkeypatch.setattr(Virtual, "step", dying)
    with pytest.raises(Killed):
        run_one(config, machines, tmp_path / "parts", threads=1)
    made = []
    monkeypatch.setattr(Virtual, "step", lambda self, at: made.append(at) or step(self, at))
    run_one(config, machines, tmp_path / "parts", threads=1)
    whole, parts = records.read(tmp_path / "whole"), records.read(tmp_path / "parts")
    assert len(made) == parts.start.steps_per_epoch
    assert (parts.logs, parts.evaluations) == (whole.logs, whole.evaluations)
    assert parts.summary == whole.summary
    assert not (tmp_path / "parts" / checkpoint.FOLDER).exists()


def test_kill_dash_nine_loses_no_finished_run(tmp_path):
    text = GRID.replace("epochs = 3", "epochs = 10").replace("seed = [0, 1]", "seed = [0]")
    text = text.replace("[tune]\nlr = [0.01, 1e6]\nepochs = 1", "")
    path = written(tmp_path, text)
    arguments = ["reproduce", str(path), "--folder", str(tmp_path / "out")]
    command = [sys.executable, "-m", "distoptim", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (
        not list((tmp_path / "out").glob(f"*/*/{checkpoint.FOLDER}/latest"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.kill()
    # Ends when nobody holds the pipe any more: the processes of the pool end too, though nobody
    # killed them.
    process.communicate(timeout=300)
    states = list((tmp_path / "out").glob(f"*/*/{checkpoint.FOLDER}/latest"))
    assert states
    assert not application()([*arguments, "--processes", "1"])
    assert len(list((tmp_path / "out" / run.FINAL).glob("*/record.jsonl"))) == 3
    assert not list((tmp_path / "out").glob(f"*/*/{checkpoint.FOLDER}/latest"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs = 3", "epochz = 3"), "has no key 'epochz'"),
        (("[grid]", "[gird]"), "no key 'gird'"),
        (("latency_ms = 20.0", "stepms = 1.0"), "[machines] has no key 'stepms'"),
        (
            ("epochs = 3", "epochs = 3\nlatency_ms = 5.0"),
            "latency_ms=5.0 emulates a link between real workers",
        ),
        (("workers = 3", "workers = 0"), "workers=0"),
        (("workers = 3", "workers ="), "not TOML"),
        (
            ("workers = 3", 'workers = 4\nlevels = "1:2"'),
            "levels='1:2': virtual workers are in no process group",
        ),
        (('sgd"', 'sgd"\nisland_size = 2'), "island_size=2: a virtual worker is one machine"),
        (
            ("workers = 3", 'workers = 3\nslowdown = "pareto"\nslowdown_ms = 2'),
            "slowdown='pareto' is for real workers",
        ),
        (("tau = [2, 4]", "tau = 2"), "tau=2: expected a list"),
        (("validation = 0.1", ""), "needs validation"),
        (('algorithm = "ddp"', 'algorithm = "ddq"'), "algorithm='ddq'"),
        (("latency_ms = 20.0", "latency = 20.0"), "latency"),
        (("latency_ms = 20.0", "latency_ms = []"), "latency_ms=[]: expected a value"),
        (("latency_ms = 20.0", 'slowdown = ["none", "now"]'), "slowdown='now'"),
        (('data = "synthetic"', "data = 5"), "data=5: allowed is text"),
        (("tau = [2, 4]", "partition = []"), "[grid] partition=[]: expected a list of values, not"),
        (("[grid]", 'title = "x"\n[grid]'), "[machines] has no key 'title'"),
        (("lr = [0.01, 1e6]", ""), "[tune] lr=None: expected a list of values, not empty"),
        (("lr = [0.01, 1e6]", 'lr = ["fast"]'), "lr='fast': allowed is a number"),
        (('algorithm = "ddp"', "algorithm = [1]"), "algorithm=[1]: allowed is one of ddp"),
        (
            ('algorithm = "ddp"', 'algorithm = "ddp"\nwidth = 1'),
            "[methods.sync] has no key 'width'",
        ),
    ],
)
def test_a_wrong_key_or_value_gives_one_line_with_the_file(tmp_path, change, words):
    path = written(tmp_path, GRID.replace(*change))
    with pytest.raises(ValueError, match=r"grid\.toml") as raised:
        spec.read(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("methods", [], "methods=[]: expected a table"),
        ("methods", {}, "no [methods.NAME]: nothing to run"),
        ("methods", {"a": 3}, "[methods] a=3: expected a table"),
        ("run", 3, "run=3: expected a table"),
        ("run.tau.x", 3, "no key 'run.tau'"),
        ("grid", [1], "grid=[1]: expected a table"),
        ("grid.tau", 2, "[grid] tau=2: expected a list"),
        ("machines", [], "machines=[]: expected a table"),
        ("title", 3, "title=3: expected text"),
    ],
)
def test_a_value_of_another_kind_gives_one_line_too(tmp_path, key, value, words):
    path = written(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")) as raised:
        spec.read(path, overrides={key: value})
    assert "\n" not in str(raised.value)


def test_what_is_no_text_gives_one_line(tmp_path):
    (tmp_path / "grid.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"grid\.toml: not TOML: .*decode"):
        spec.read(tmp_path / "grid.toml")


def test_a_finished_grid_is_a_table_that_needs_no_records(tmp_path, monkeypatch):
    # Pictures have a test of their own, and take a second.
    monkeypatch.setattr(drawing, "png", lambda *_, **__: b"\x89PNG")
    text = GRID.replace("epochs = 3", "steps = 4").replace("seed = [0, 1]", "seed = [0]")
    grid = spec.read(written(tmp_path, text))
    out = tmp_path / "out"
    run.reproduce(grid, out, processes=1)
    made = frames.read(out)
    assert made.ended.stage.value_counts().to_dict() == {"final": 3, "trial": 6}
    before = report.write(runs.named(made), tmp_path / "before")[0].read_text()
    for name in (run.TRIALS, run.FINAL):
        shutil.rmtree(out / name)
    again = runs.named(frames.read(out))
    assert report.write(again, tmp_path / "again")[0].read_text() == before
    # One run of them is made again: its record counts, the rows of the others stay.
    first, _ = run.stages(grid, out, processes=1)
    case, folder = first.runs()[0]
    run_one(case.config.replace(lr=0.02), grid.machines[0], folder, label=case.label, threads=1)
    (changed,) = frames.read(out).ended.query("lr == 0.02").run
    assert changed == folder.relative_to(out).as_posix()
    assert len(frames.read(out).ended) == 9


def test_what_only_real_workers_can_do_is_read_for_them(tmp_path):
    path = written(tmp_path, GRID.replace("workers = 3", 'workers = 4\nlevels = "1:2"'))
    levels = {
        case.config.algorithm: case.config.levels for case in spec.read(path, virtual=False).cases()
    }
    assert levels.pop("ddp") == ""
    assert set(levels.values()) == {"1:2"}


def test_a_damaged_state_and_a_full_disk_name_the_file(tmp_path, monkeypatch):
    config = RunConfig(data="synthetic", model="mlp", workers=2, steps=4, batch_size=16)
    machines = spec.read(written(tmp_path)).machines[0]
    damaged = tmp_path / "run" / checkpoint.FOLDER / "step-9"
    damaged.mkdir(parents=True)
    (damaged / "rank-0.pt").write_bytes(b"nonsense")
    (damaged.parent / "latest").write_text(damaged.name)
    with pytest.raises(ValueError, match=r"rank-0\.pt: damaged, not a checkpoint$"):
        run_one(config, machines, tmp_path / "run", threads=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distoptim_experiments.training.checkpoint.torch.save", full)
    with pytest.raises(ValueError, match=r"rank-0\.pt: cannot be written: No space left"):
        run_one(
            RunConfig(data="synthetic", model="mlp", workers=2, epochs=2, batch_size=16),
            machines,
            tmp_path / "full",
            threads=1,
        )


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "stragglers",
        "churn",
        "beyond",
        "shakespeare",
        "front",
        "front-text",
        "paper",
        "gpu",
    ],
)
def test_shipped_grids_are_whole(name):
    grid = spec.read(Path(name))
    assert grid.cases()
    workers = {"shakespeare": 4, "front-text": 8}.get(name, 16)
    assert {case.config.workers for case in grid.cases()} == {workers}
    if name in ("small", "beyond", "shakespeare"):
        # A new field must not make a finished run another one.
        folder = Path(__file__).parents[3] / "results" / name
        trials, _ = run.stages(grid, folder)
        ended = Ended(folder)
        assert all(path in ended for _, path in trials.runs())
    if name in ("paper", "gpu"):
        assert {case.config.tau for case in grid.cases()} == {1, 2, 8, 24}


def write_cifar10(folder, records_each):
    """CIFAR-10's binary files with random pixels; all classes in turn."""
    g = torch.Generator().manual_seed(0)
    for name in (*cifar.LAYOUTS["cifar10"].train, cifar.LAYOUTS["cifar10"].test):
        rows = torch.randint(256, (records_each, 3073), dtype=torch.uint8, generator=g)
        rows[:, 0] = torch.arange(records_each) % 10
        (folder / name).write_bytes(rows.numpy().tobytes())


@pytest.mark.soak
@pytest.mark.parametrize("name", ["paper", "gpu"])
def test_shipped_grids_of_cifar10_run_with_every_method_and_partition(tmp_path, monkeypatch, name):
    layout = dataclasses.replace(cifar.LAYOUTS["cifar10"], train_records=40, test_records=40)
    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", layout)
    write_cifar10(tmp_path, 40)
    changes = ["seed=[0]", "tau=[2]", "steps=2", "model=mlp", "batch_size=2", "log_every=1"]
    changes += ["tune.lr=[0.1]", "tune.epochs=1"] if name == "gpu" else []
    done = application()(
        [
            "reproduce",
            name,
            "--data-dir",
            str(tmp_path),
            "--folder",
            str(tmp_path / "out"),
            "--processes",
            "1",
            *(word for text in changes for word in ("--set", text)),
        ]
    )
    assert done == 0
    made = [
        records.read(path.parent)
        for path in (tmp_path / "out" / run.FINAL).glob(f"*/{records.FILE}")
    ]
    assert {(r.start.label, r.config.partition) for r in made} == {
        (label, partition)
        for partition in ("iid", "label-skew")
        for label in ("sync", "Local SGD", "BMUF", "CoCoD-SGD", "EAMSGD", "Overlap-Local-SGD")
    }
    assert len(made) == 12
    assert {r.summary.step for r in made} == {2}


def test_what_is_left_is_shown_and_nothing_is_run(tmp_path, capsys):
    path = written(tmp_path)
    out = tmp_path / "out"
    command = [
        "reproduce",
        str(path),
        "--folder",
        str(out),
        "--processes",
        "1",
        "--set",
        "steps=2",
        "--set",
        "lr=0.5",
    ]
    assert application()([*command, "--set", "tune={}"]) == 0
    capsys.readouterr()
    application()([*command, "--set", "tune={}", "--set", "seed=[1, 2]", "--dry-run"])
    shown = capsys.readouterr().out.splitlines()
    # Of three settings with two seeds each those with seed 1 are done.
    assert len(shown) == 7
    assert sum(line.startswith("done  runs: ") for line in shown) == 3
    assert "to do  runs: overlap, tau 4, iid, seed 2, lr 0.5" in shown
    assert shown[-1].startswith("3 to do, about 0:00:0")
    assert len(list(out.rglob(records.FILE))) == 6


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("steps=2", ("steps", 2)),
        ("seed = [0, 1]", ("seed", [0, 1])),
        ("model=cnn-small", ("model", "cnn-small")),
        ('tune.x="a b"', ("tune.x", "a b")),
        ("tune={}", ("tune", {})),
        ("scale_lr=true", ("scale_lr", True)),
    ],
)
def test_assignments_are_typed_as_in_toml(text, made):
    assert spec.assignment(text) == made


@pytest.mark.parametrize("text", ["steps", "=2", "seed=[0", "steps=", "a=1.2.3"])
def test_a_wrong_assignment_is_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        spec.assignment(text)
