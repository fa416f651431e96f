"""A worker is killed under torchrun, and the run ends all the same."""

import os
import subprocess
import sys

import pytest
from distoptim_experiments import records

from distoptim.cli import application
from distoptim.testing.processes import free_port

# Worker 1 of the first attempt dies right after the first checkpoint.
VICTIM = """
import os, signal
from distoptim.cli import main
from distoptim_experiments.training import checkpoint

save = checkpoint.save
def save_and_die(*args, **options):
    path = save(*args, **options)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return path
checkpoint.save = save_and_die
main()
"""


def test_a_killed_worker_is_restarted_and_the_run_ends_at_its_last_step(tmp_path):
    (tmp_path / "victim.py").write_text(VICTIM)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--max-restarts=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--monitor-interval=0.1",
        "victim.py",
        "train",
        "--folder",
        "run",
        "--auto-resume",
        "--data",
        "synthetic",
        "--model",
        "mlp",
        "--steps",
        "11",
        "--checkpoint-every",
        "4",
        "--log-every",
        "1",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record = records.read(tmp_path / "run")
    assert record.summary.step == 11
    lines = (tmp_path / "run" / records.FILE).read_text()
    assert lines.count('"resume"') == 1, lines
    assert [line.step for line in record.logs] == list(range(1, 12))


@pytest.mark.parametrize("arguments", [[], ["--folder", "a", "--resume", "b"]])
def test_auto_resume_wants_a_folder_and_nothing_else(arguments):
    with pytest.raises(ValueError, match="--auto-resume goes with --folder"):
        application()(["train", "--auto-resume", *arguments])
