"""The scripts that people copy run as they stand there, or with fewer steps."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from distoptim.testing.processes import run
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


@pytest.mark.parametrize(("name", "bound"), [("ddp_replaced", 0.1), ("every_step", 0.1)])
def test_two_workers_train_under_torchrun(tmp_path, name, bound):
    said, nothing = execute(f"torchrun --nproc-per-node=2 {EXAMPLES / name}.py", tmp_path)
    assert nothing == ""
    (loss,) = re.findall(r"loss of the mean: ([\d.]+)", said)
    assert float(loss) < bound


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
