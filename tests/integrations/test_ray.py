"""docs/ray.md as it stands, where Ray is installed: it starts slowly, and is not in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Worker 1 dies in its eighth step, once; all go on from a checkpoint before it.
AROUND = """
import os
import ray
from distoptim import AveragingOptimizer
average = AveragingOptimizer.average

def dying(self):
    average(self)
    died = os.path.join({folder!r}, "died")
    if self.local_step == 8 and self.engine.communicator.rank == 1 and not os.path.exists(died):
        open(died, "w").close()
        os._exit(1)

def begin():
    AveragingOptimizer.average = dying

ray.init(num_cpus=3, include_dashboard=False, runtime_env={{"worker_process_setup_hook": begin}})
{page}
print("steps", result.metrics["steps"], "files", sorted(os.listdir(result.checkpoint.path)))
"""


@pytest.mark.soak
def test_the_page_goes_on_after_a_death(tmp_path: Path) -> None:
    pytest.importorskip(
        "ray", reason="Ray is not installed; nothing in this repository installs it"
    )
    text = (ROOT / "docs" / "ray.md").read_text()
    (page,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    page = page.replace("RunConfig(", f"RunConfig(storage_path={str(tmp_path)!r}, ")
    script = tmp_path / "page.py"
    script.write_text(AROUND.format(folder=str(tmp_path), page=page))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        },
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (tmp_path / "died").exists()
    assert "steps 12 files ['worker0.pt', 'worker1.pt']" in done.stdout
    # What was reported last before the death Ray may have lost, and is saved again.
    files = tmp_path.glob("*/*/worker1.pt")
    steps = {torch.load(path, weights_only=True)["step"] for path in files}
    assert steps == {3, 6, 9, 12}
