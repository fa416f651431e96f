"""What a user gets of the two distributions: built, installed, with no more packages than they ask for.

`make package` runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile

import pytest

from tests.helpers import distributions

pytestmark = pytest.mark.package


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
