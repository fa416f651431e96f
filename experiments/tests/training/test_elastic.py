"""`distoptim train --elastic`: three processes, one of which is killed and comes back by the same line."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.problem import Problem

from distoptim.cli import application
from distoptim.testing.processes import free_port

COMMAND = [sys.executable, "-m", "distoptim"]
# Long enough for one of them to be killed, and to start again beside the others.
RUN = "--start 3 --steps 1500 --tau 5 --slowdown exponential --slowdown-ms 30 --data synthetic"
RUN += " --evaluate-every 1500 --checkpoint-every 100 --log-every 100"


def started(address: str, name: str, folder: Path) -> subprocess.Popen[bytes]:
    where = ["--elastic", address, "--name", name, "--folder", str(folder)]
    with (folder.parent / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, "train", *where, *RUN.split()], stdout=log, stderr=subprocess.STDOUT
        )


def seen(folder: Path, name: str) -> list[records.Membership]:
    path = records.file(folder / name)
    lines = records.read_lines(path) if path.exists() else []
    return [line for line in lines if isinstance(line, records.Membership)]


def wait_until(check, processes) -> None:
    deadline = time.monotonic() + 120
    while not check():
        assert time.monotonic() < deadline
        assert all(p.poll() in (None, 0) for p in processes)
        time.sleep(0.1)


@pytest.mark.soak
def test_one_that_is_killed_comes_back_by_the_same_line(tmp_path):
    pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")
    address = f"127.0.0.1:{free_port()}"
    folder = tmp_path / "run"
    listens = [*COMMAND, "lighthouse", "--bind", address, "--heartbeat-timeout-s", "3"]
    with subprocess.Popen(listens, stdout=subprocess.DEVNULL) as lighthouse:
        a, b, c = (started(address, name, folder) for name in "abc")
        wait_until((folder / "c" / "checkpoints" / "latest").exists, [a, b, c])
        os.kill(c.pid, signal.SIGKILL)
        c.wait()
        wait_until(lambda: ("lost", "c") in [(e.what, e.worker) for e in seen(folder, "a")], [a, b])
        c = started(address, "c", folder)
        said = [p.wait(300) for p in (a, b, c)]
        lighthouse.terminate()
    assert said == [0, 0, 0], "\n".join(p.read_text() for p in tmp_path.glob("*.log"))
    found = {name: records.read(folder / name) for name in "abc"}
    assert all(one.summary.step == 1500 for one in found.values())
    # What they evaluate is what all share.
    assert len({one.evaluations[-1].test_loss for one in found.values()}) == 1
    assert [(e.what, e.worker) for e in seen(folder, "a")][:3] == [
        ("begins", "a"),
        ("lost", "c"),
        ("joined", "c"),
    ]
    back = [e for e in seen(folder, "c") if e.what == "joined"]
    assert len(back) == 1
    assert back[0].members == ["a", "b", "c"]
    # Who has ended has nothing to do any more.
    assert started(address, "a", folder).wait(120) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--elastic h:1 --folder x", "goes with --name NAME and --start N"),
        ("--elastic h:1 --name a --start 2", "goes with --folder FOLDER"),
        ("--elastic h:1 --name a/b --start 2 --folder x", "--name a/b: allowed are letters"),
        ("--elastic h:1 --name a --start 2 --folder x --resume y", "--resume does not go with"),
        ("--elastic h:1 --name a --start 2 --folder x --algorithm ddp", "ddp with --elastic"),
        (
            "--elastic h:1 --name a --start 2 --folder x --island-size 2",
            "island_size=2 with --elas",
        ),
        ("--elastic h --name a --start 1 --folder x", "lighthouse='h': allowed is HOST:PORT"),
        ("--name a", "--name a: has an effect only with --elastic"),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        application()(["train", *arguments.split()])


def test_members_deal_the_training_set_out_among_as_many_as_there_are():
    problem = Problem(RunConfig(data="synthetic", workers=3, batch_size=1))
    whole = problem.data.train_labels.numel()

    def some(of: int, turn: int) -> list[torch.Tensor]:
        dealt = [problem.batches(worker, of=of, turn=turn) for worker in range(of)]
        return [images for batches in dealt for images, _ in itertools.islice(batches, whole // of)]

    seen_by_two = torch.cat(some(2, 0)).flatten(1)
    assert len(seen_by_two.unique(dim=0)) == whole
    assert not torch.equal(seen_by_two, torch.cat(some(2, 7)).flatten(1))
