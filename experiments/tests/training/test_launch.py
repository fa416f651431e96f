import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training import checkpoint, virtual
from distoptim_experiments.training.launch import Job, WorkerError, run_local
from distoptim_experiments.training.rendezvous import Rendezvous, from_torchrun
from distoptim_experiments.training.scalars import WeightsAndBiases

LONG = RunConfig(
    data="synthetic",
    model="mlp",
    workers=2,
    batch_size=8,
    steps=10**6,
    log_every=20,
    evaluate_every=10**6,
    checkpoint_every=0,
)


def on_first_log(action):
    done = []

    def observe(line):
        if line.kind == "log" and not done:
            done.append(line)
            action()

    return observe


def children():
    return sorted(multiprocessing.active_children(), key=lambda p: p.pid)


def test_a_signal_leaves_a_checkpoint_and_no_process(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert (
        run_local(Job(LONG, tmp_path), [on_first_log(lambda: os.kill(os.getpid(), signal.SIGINT))])
        == signal.SIGINT
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert not children()
    steps = [
        torch.load(checkpoint.latest(tmp_path) / f"rank-{rank}.pt", weights_only=True)["step"]
        for rank in (0, 1)
    ]
    assert steps[0] == steps[1] >= 20
    assert records.read(tmp_path).summary is None


def test_a_signal_that_comes_with_the_last_line_is_not_lost(tmp_path):
    """Of several runs the next one would begin."""

    def stop(line):
        if line.kind == "summary":
            os.kill(os.getpid(), signal.SIGTERM)

    config = RunConfig(data="synthetic", model="mlp", workers=2, batch_size=8, steps=2)
    assert run_local(Job(config, tmp_path), [stop]) == signal.SIGTERM
    assert records.read(tmp_path).summary is not None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_worker_ends_the_run_by_its_rank(tmp_path, victim):
    def kill():
        children()[victim].kill()

    with pytest.raises(
        WorkerError, match=r"^worker \d (died: SIGKILL|failed: CommunicationError)"
    ) as error:
        run_local(Job(LONG, tmp_path), [on_first_log(kill)])
    assert "\n" not in str(error.value)
    assert not children()


def test_a_failing_worker_is_named_and_its_traceback_kept(tmp_path):
    config = RunConfig(data="mnist", data_dir=str(tmp_path / "nowhere"), workers=2)
    with pytest.raises(
        WorkerError,
        match=r"worker (\d) failed: ValueError: .*missing train-images.*traceback-rank-\1",
    ):
        run_local(Job(config, tmp_path))
    assert any("Traceback" in path.read_text() for path in tmp_path.glob("traceback-rank-*.txt"))


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig(
        data="synthetic", model="mlp", workers=1, steps=4, log_every=2, evaluate_every=4
    )
    assert run_local(Job(config, tmp_path, tensorboard=True)) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    steps = {
        name: [event.step for event in events.Scalars(f"distoptim/{name}")]
        for name in ("loss", "tau", "exposed_share", "test_accuracy")
    }
    # The last of them is the summary's.
    assert steps == {
        "loss": [2, 4],
        "tau": [2, 4],
        "exposed_share": [2, 4, 4],
        "test_accuracy": [4],
    }


def test_weights_and_biases_gets_the_same_scalars(tmp_path, monkeypatch):
    """By a package of that name which keeps what it is given: the real one wants an account, or says so."""
    (tmp_path / "wandb.py").write_text(
        "import json, pathlib\n"
        "class Run:\n"
        "    def __init__(self, file):\n"
        "        self.file, self.config, self.lines = file, self, []\n"
        "    def update(self, values, *, allow_val_change):\n"
        "        self.lines.append([None, values])\n"
        "    def log(self, values, *, step):\n"
        "        self.lines.append([step, values])\n"
        "    def finish(self):\n"
        "        self.file.write_text(json.dumps(self.lines))\n"
        "def init(*, dir):\n"
        "    return Run(pathlib.Path(dir, 'said.json'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = RunConfig(data="synthetic", model="mlp", workers=1, steps=4, log_every=2)
    folder = tmp_path / "run"
    virtual.run(config, Machines(step_ms=1.0), folder, observers=[WeightsAndBiases(folder)])
    (_, told), *logged = json.loads((folder / "said.json").read_text())
    assert told == json.loads(json.dumps(config.to_dict()))
    record = records.read(folder)
    assert [found["distoptim/loss"] for step, found in logged if "distoptim/loss" in found] == [
        line.loss for line in record.logs
    ]
    assert logged[-1] == [4, {"distoptim/exposed_share": 0.0, "distoptim/overhead_share": 0.0}]


def test_wandb_is_asked_for_alone(tmp_path):
    code = (
        "import sys; from distoptim_experiments.training import launch, scalars;"
        "print({'wandb', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_torchrun_is_recognised_by_its_variables(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)
    assert from_torchrun() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="MASTER_PORT"):
        from_torchrun()
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert from_torchrun() == Rendezvous(socket.gethostname(), 1234, 1, 2, hosted=False)
    # Agents of two hosts may count restarts differently; only their own store outlives an attempt.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert from_torchrun().prefix == ""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert from_torchrun() == Rendezvous(socket.gethostname(), 1234, 1, 2, "attempt1", hosted=True)
