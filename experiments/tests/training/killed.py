"""A worker that is killed under torch's elastic agent, which starts all of them again."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path

from distoptim_experiments import records
from distoptim_experiments.training import checkpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distoptim.cli import application
from distoptim.testing.processes import forking, free_port


def train_with_a_victim(
    folder: Path, *, ranks: int, steps: int, options: str = ""
) -> tuple[Path, dict[int, str]]:
    """`train --auto-resume` of `ranks` to its end; returns the run's folder and what each printed.

    As `torchrun --nproc-per-node=RANKS --max-restarts=1 -m distoptim train`, but that the agent
    forks workers which have imported everything.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=1,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        monitor_interval=0.1,
        start_method="forkserver",
    )
    command = (
        f"train --folder {folder / 'run'} --auto-resume --data synthetic --model mlp"
        f" --steps {steps} --checkpoint-every 4 --log-every 1 {options}"
    )
    forking()
    printed = elastic_launch(config, _worker)(command.split())
    lines = list(records.read_lines(folder / "run" / records.FILE))
    assert sum(line.kind == "resume" for line in lines) == 1, lines
    return folder / "run", printed


def _worker(arguments: list[str]) -> str:
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        checkpoint.save = _save_and_die
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert not application()(arguments)
    return said.getvalue()


_save = checkpoint.save


def _save_and_die(*args, **options):
    """Of worker 1 in the first attempt: right after the first checkpoint."""
    _save(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
