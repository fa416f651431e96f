"""A worker that is killed under torchrun, which starts all of them again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from distoptim_experiments import records

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


def train_with_a_victim(
    folder: Path, *, ranks: int, steps: int, options: str = ""
) -> tuple[Path, str]:
    """`train --auto-resume` of `ranks` to its end; returns the run's folder and what was printed."""
    (folder / "victim.py").write_text(VICTIM)
    torchrun = (
        f"-m torch.distributed.run --nproc-per-node={ranks} --max-restarts=1"
        f" --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --monitor-interval=0.1"
    )
    train = (
        "victim.py train --folder run --auto-resume --data synthetic --model mlp"
        f" --steps {steps} --checkpoint-every 4 --log-every 1 {options}"
    )
    done = subprocess.run(
        [sys.executable, *torchrun.split(), *train.split()],
        cwd=folder,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = list(records.read_lines(folder / "run" / records.FILE))
    assert sum(line.kind == "resume" for line in lines) == 1, lines
    return folder / "run", done.stdout
