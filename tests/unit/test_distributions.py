"""What a user gets of the two distributions: built, installed, with no more packages than they ask for.

`make package` runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt

from distoptim.testing.processes import free_port
from tests.helpers import distributions

pytestmark = pytest.mark.package
# For whatever processes have to do, on a machine that does much else.
WAIT_S = 900.0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributions")
    distributions.build(folder)
    return folder / "dist"


def wheel(built, name):
    (path,) = built.glob(f"{name}-*.whl")
    return path


def output(*command, cwd=None, environment=None, code=0):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment or distributions.bare(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


class Addresses(HTMLParser):
    """All that a page leads to or shows."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src", "srcset")]


@pytest.mark.parametrize("name", ["distoptim", "distoptim_experiments"])
def test_what_a_package_index_shows(built, tmp_path, name):
    """A page whose links lead somewhere, with the blocks that README has."""
    distributions.install(tmp_path / "env", [wheel(built, name)], name)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (found,) = metadata.distributions(name=name, path=[str(site)])
    page = found.metadata.get_payload() or found.metadata["Description"]
    addresses = Addresses()
    addresses.feed(MarkdownIt("commonmark").enable("table").render(page))
    assert [a for a in addresses.found if urlsplit(a).scheme != "https"] == []
    folder = distributions.ROOT / ("" if name == "distoptim" else "experiments")
    fences = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert fences.findall(page) == fences.findall((folder / "README.md").read_text())
    files = {Path(file).name for file in found.files}
    assert {"LICENSE", "py.typed"} <= files


def test_library_alone(built, tmp_path):
    commands = distributions.install(tmp_path / "env", [wheel(built, "distoptim")], "distoptim")
    modules = (
        "distoptim, distoptim.planning.planner, distoptim.simulator, distoptim.testing.processes"
    )
    output(commands / "python", "-c", f"import {modules}", cwd=tmp_path)
    said = output(commands / "distoptim", code=2)
    assert said.count("\n") == 1
    assert "pip install 'distoptim[cli]'" in said


def test_command_line_without_and_with_the_experiments(built, tmp_path):
    env = tmp_path / "env"
    commands = distributions.install(env, [wheel(built, "distoptim")], "distoptim[cli]")
    assert "plan" in output(commands / "distoptim", "--help")
    said = output(commands / "distoptim", "train", code=2)
    assert said.count("\n") == 1
    assert "pip install 'distoptim[train]'" in said

    more = [wheel(built, "distoptim_experiments")]
    distributions.install(env, more, "distoptim-experiments")
    said = output(commands / "distoptim", "--help")
    assert "plan" in said
    assert "train" in said
    # Grids are files of the package, so this one finds them.
    output(commands / "distoptim", "reproduce", "stragglers", "--dry-run", cwd=tmp_path)


class ThreeWorkers:
    """That come and go, and their lighthouse, by an environment's commands."""

    def __init__(self, commands, folder):
        self.address = f"127.0.0.1:{free_port()}"
        self.folder = folder
        self.processes = {}
        self._command = commands / "distoptim"

    def start(self, name, *arguments):
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self._command, *arguments],
                cwd=self.folder,
                env=distributions.bare(),
                stdout=log,
                stderr=log,
            )

    def train(self, name):
        self.start(
            name,
            *("train", "--elastic", self.address, "--name", name, "--start", "3"),
            *("--folder", "run", "--data", "synthetic", "--steps", "1500", "--tau", "5"),
            *("--slowdown", "exponential", "--slowdown-ms", "20", "--evaluate-every", "1500"),
        )

    def wait_for(self, name, what, worker):
        """Until it is in the record of that one."""
        file = self.folder / "run" / name / "record.jsonl"
        deadline = time.monotonic() + WAIT_S
        while not file.exists() or f'"what":"{what}","worker":"{worker}"' not in file.read_text():
            assert time.monotonic() < deadline, self.said()
            assert self.processes[name].poll() is None, self.said()
            time.sleep(0.1)

    def said(self):
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))


def test_workers_come_and_go_by_the_installed_commands(built, tmp_path):
    """One is killed, and comes back by the same line."""
    pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")
    wheels = [wheel(built, "distoptim"), wheel(built, "distoptim_experiments")]
    commands = distributions.install(tmp_path / "env", wheels, "distoptim[elastic]")
    distributions.install(tmp_path / "env", [], "distoptim-experiments")
    workers = ThreeWorkers(commands, tmp_path)
    workers.start(
        "lighthouse", "lighthouse", "--bind", workers.address, "--heartbeat-timeout-s", "3"
    )
    try:
        for name in "abc":
            workers.train(name)
        workers.wait_for("a", "begins", "a")
        workers.processes["c"].kill()
        workers.processes["c"].wait()
        workers.wait_for("a", "lost", "c")
        workers.train("c")
        workers.wait_for("c", "joined", "c")
        assert [workers.processes[name].wait(WAIT_S) for name in "abc"] == [0, 0, 0]
        workers.processes["lighthouse"].terminate()
        assert workers.processes["lighthouse"].wait(WAIT_S) == 0
    finally:
        for process in workers.processes.values():
            process.kill()


def test_sdist_has_its_tests_and_their_helpers(built, tmp_path):
    (sdist,) = built.glob("distoptim-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}"}
    collected = output(
        *(
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests",
        ),
        cwd=folder,
        environment=environment,
    )
    assert "test_laws.py" in collected
