"""The house stays one that can be read: bounds on what a reader meets. Its floors are import-linter's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import pairwise

import pytest
import torch

import distoptim
from distoptim.testing.processes import run
from tests.helpers import house

# These need more than torch, or the library's public names.
ABOVE = ("distoptim.__main__", "distoptim.cli", "distoptim.integrations", "distoptim.testing")


# Seldom, since it follows from the contract of `make lint` that modules have no circles at any depth.
@pytest.mark.soak
def test_every_module_can_be_imported_first():
    names = [name for name in house.modules(house.LIBRARY) if not name.startswith(ABOVE)]
    assert "distoptim.rule" in names
    # A process of its own, so that no thread is there when it forks and torch is imported once.
    code = (
        f"import torch, numpy; from tests.helpers import house; print(*house.fail_alone({names}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=house.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], done.stderr


def test_the_library_loads_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import distoptim;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert loaded <= {"distoptim", "torch"}


def test_all_say_one_version():
    for name in ("experiments/pyproject.toml", "CITATION.cff"):
        said = re.search(r"^version\W+([\d.]+)", (house.ROOT / name).read_text(), re.MULTILINE)
        assert said is not None
        assert said[1] == distoptim.__version__, name


def test_both_distributions_say_the_same_of_themselves():
    library, experiments = (
        tomllib.loads((house.ROOT / name).read_text())["project"]
        for name in ("pyproject.toml", "experiments/pyproject.toml")
    )
    for field in ("classifiers", "license", "requires-python", "urls"):
        assert library[field] == experiments[field], field
    assert all(url.startswith(library["urls"]["Source"]) for url in library["urls"].values())
    licenses = [(house.ROOT / name).read_text() for name in ("LICENSE", "experiments/LICENSE")]
    assert licenses[0] == licenses[1]


@pytest.mark.parametrize("package", [house.LIBRARY, house.EXPERIMENTS], ids=lambda p: p.name)
def test_functions_fit_a_screen(package):
    lengths = dict(house.functions(package))
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


@pytest.mark.parametrize("package", [house.LIBRARY, house.EXPERIMENTS], ids=lambda p: p.name)
def test_a_line_holds_one_statement(package):
    assert house.packed_per_1000_lines(package) <= 2


def test_nothing_from_others_is_unpickled():
    # Between a process and its own children.
    assert house.unpicklers(house.LIBRARY) == {"testing/processes.py"}
    assert house.unpicklers(house.EXPERIMENTS) == set()


def test_who_is_derived_from_is_abstract():
    made_for_it = {"AveragingOptimizer", "State"}
    assert house.concrete_bases(house.LIBRARY) == {*made_for_it, "CommunicationError"}
    assert house.concrete_bases(house.EXPERIMENTS) == set()


def test_results_are_few_files():
    command = ["git", "ls-files", "results"]
    done = subprocess.run(command, cwd=house.ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) <= 80


def _walk(rank):
    parameter = torch.nn.Parameter(torch.ones(3) * rank)
    optimizer = distoptim.OverlapLocalSGD([parameter], lr=0.1, tau=2)

    def step():
        parameter.grad = torch.ones(3)
        optimizer.step()

    for _ in range(3):
        step()
        optimizer.average()
    step()
    assert optimizer.stats()["syncs"] == 1
    files = house.files_entered(optimizer.average, house.LIBRARY)
    assert optimizer.stats()["syncs"] == 2
    optimizer.close()
    return files


def test_one_average_is_a_short_walk():
    """With a merge and a launch, it is read without losing the thread."""
    files, _ = run(_walk, 2)
    assert len(files) <= 45
    assert len(set(files)) <= 11
    assert sum(before != after for before, after in pairwise(files)) <= 30
