"""The scripts that people copy run as they stand there, or with fewer steps."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distoptim.testing.processes import free_port, run
from tests.helpers import marks
from tests.helpers.elastic import at, lighthouse
from tests.helpers.shell import execute

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert re.search(
        rf"^(torchrun|python) .*examples/{path.name}",
        ast.get_docstring(ast.parse(text)),
        re.MULTILINE,
    )


def loss_of(said):
    (loss,) = re.findall(r"loss of the mean: ([\d.]+)", said)
    return float(loss)


def said_by(command, folder, **environment):
    """What a command that starts its workers itself prints; it must end well."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("ddp_replaced", 0.1),
        ("every_step", 0.1),
        pytest.param("accelerate_loop", 0.1, marks=marks.trainer("accelerate")),
        # Of 64 numbers; 4.16 where nothing has been learned.
        pytest.param("transformers_trainer", 1.5, marks=marks.trainer("transformers")),
    ],
)
def test_two_workers_train_under_torchrun(tmp_path, name, bound):
    said, others = execute(f"torchrun --nproc-per-node=2 {EXAMPLES / name}.py", tmp_path)
    assert loss_of(said) < bound
    assert "loss of the mean" not in others


def test_the_script_with_ddp_was_what_its_marks_say(tmp_path):
    text = (EXAMPLES / "ddp_replaced.py").read_text()
    lines = [line for line in text.splitlines() if not re.search("  # [+]", line)]
    before = re.sub("^( *)# - ", r"\1", "\n".join(lines), flags=re.MULTILINE)
    assert "DistributedDataParallel(" in before
    assert "distoptim" not in before.replace("examples/ddp_replaced.py", "")
    (tmp_path / "before.py").write_text(before)
    said, _ = execute("torchrun --nproc-per-node=2 before.py", tmp_path)
    assert loss_of(said) < 0.1


def test_a_gpt_reads_the_pages(tmp_path):
    pages = "".join(page.read_text() for page in sorted((EXAMPLES.parent / "docs").glob("*.md")))
    (tmp_path / "pages.txt").write_text(pages)
    line = f"torchrun --nproc-per-node=2 {EXAMPLES / 'gpt_text.py'} pages.txt 60"
    said, _ = execute(line, tmp_path)
    counts = torch.tensor([*pages.encode()]).bincount().double()
    entropy = torch.distributions.Categorical(counts).entropy().item()
    # Better than counting bytes.
    assert 1 < loss_of(said) < entropy
    assert (tmp_path / "gpt.pt").exists()


@marks.trainer("lightning")
def test_lightning_starts_its_workers(tmp_path):
    command = [sys.executable, EXAMPLES / "lightning_module.py"]
    assert loss_of(said_by(command, tmp_path, OMP_NUM_THREADS="1")) < 0.1


SRUN = """#!/bin/bash
shift
for task in 0 1; do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_slurm_starts_torchrun_on_all_machines(tmp_path):
    """With stand-ins for SLURM's two commands: both machines are this one."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\necho other\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "localhost,other",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "1",
        "PORT": str(free_port()),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", EXAMPLES / "slurm.sh", EXAMPLES / "ddp_replaced.py"]
    said = said_by(command, tmp_path, **slurm)
    assert loss_of(said) < 0.1
    assert set(re.findall(r"rank (\d) waited", said)) == {"0", "1"}


def worker(rank, address):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(EXAMPLES / "elastic.py"))["main"](address, "ab"[rank], 2, 60)
    return said.getvalue()


def test_workers_that_may_die_begin_together_and_end_with_one_anchor():
    pytest.importorskip("torchft")
    server = lighthouse(0)
    said = run(worker, 2, at(server), backend=None)
    server.shutdown()
    assert all("['a', 'b']" in text for text in said)
    first, second = (re.findall(r"anchor (\w+), (\d+) means", text) for text in said)
    assert first == second
    assert first
