"""The same cases as users start them: by each framework's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distoptim.testing.processes import free_port
from tests.helpers import marks

SCRIPT = Path(__file__).with_name("launched.py")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    # Of its ways to start processes of one host the only one that needs no MPI; the script chooses the CPU.
    "accelerate": (
        f"{BIN}/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port {port}"
    ),
    "transformers": f"{BIN}/torchrun --nproc-per-node 2 --master-port {{port}}",
    # Trainer(devices=2) starts the second one.
    "lightning": f"{sys.executable}",
}


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks.trainer(name)) for name in LAUNCHERS]
)
def test_by_its_own_launcher(name: str, tmp_path: Path) -> None:
    command = LAUNCHERS[name].format(port=free_port()).split()
    # None of what a launcher sets, as xdist's process may have it from other tests.
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, str(SCRIPT), name, str(tmp_path)],
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"{name}: all cases have passed") == 2, done.stdout[-4000:]
