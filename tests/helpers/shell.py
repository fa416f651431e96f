"""Lines of shell as the docs have them, run in little time.

A command of ours runs in this process, and torchrun's workers are forked from one that has imported
all they need: starting each anew takes some seconds of importing.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distoptim import __main__ as console
from distoptim.testing.processes import run

# What a script leaves behind, until its process ends, as in one of its own. Dropped at once, torch's
# DistributedDataParallel hung in one of ten runs: its end waits, with the interpreter lock, for a thread of
# gloo that wants it.
_kept: list[dict[str, Any]] = []


def execute(line: str, folder: Path) -> list[str]:
    """Run one command in `folder`; it must end well. Returns what torchrun's workers said, by rank."""
    words = shlex.split(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        if words[0] == "distoptim":
            patch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as end:
                console.main()
            assert not end.value.code, line
        elif words[0] == "torchrun":
            (workers,) = [int(w.partition("=")[2]) for w in words if w.startswith("--nproc")]
            program = [w for w in words[1:] if not w.startswith(("--nproc", "--max-restarts"))]
            return run(_worker, workers, program, backend=None)
        else:
            subprocess.run(line, shell=True, check=True, timeout=300)
    return []


def _worker(rank: int, program: list[str]) -> str:
    """What `python PROGRAM` does."""
    said = io.StringIO()
    module = program[0] == "-m"
    sys.argv = program[module:]
    sys.path.insert(0, str(Path.cwd() if module else Path(program[0]).parent))
    try:
        with contextlib.redirect_stdout(said):
            if module:
                runpy.run_module(program[1], run_name="__main__", alter_sys=True)
            else:
                _kept.append(runpy.run_path(program[0], run_name="__main__"))
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{program}: exit code {end.code}") from end
    return said.getvalue()
