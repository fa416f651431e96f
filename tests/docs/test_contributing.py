"""What CONTRIBUTING.md says to add to the library is complete and works, as it stands there."""

from __future__ import annotations

import re
import runpy
import threading
from pathlib import Path

import pytest
import torch
from distoptim_experiments.grid import spec

import distoptim
from distoptim.comm import codecs
from distoptim.testing.lockstep import Lockstep
from tests.helpers import problem

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"


def block(section, page=PAGE, language="python"):
    _, text = page.read_text().split(f"\n## {section}\n")
    (code,) = re.findall(
        rf"^```{language}\n(.*?)^```$", text.split("\n## ")[0], re.MULTILINE | re.DOTALL
    )
    return code


def defined(section, page=PAGE):
    names = {"__name__": "elsewhere"}
    exec(compile(block(section, page), page.name, "exec", dont_inherit=True), names)
    return names


def gradient(rank, params):
    return [g.to(params[0].dtype) for g in problem.gradient(rank, [p.double() for p in params])]


def error(cluster):
    mean = cluster.x().mean(0)
    params = [mean[:8].view(2, 4), mean[8:]]
    return sum(g.square().sum() for rank in range(4) for g in gradient(rank, params))


def train(make, *, dtype=torch.float64):
    """How far the workers are from their mean after each local step; and they learn."""
    start = [p.to(dtype) for p in problem.start()]
    cluster = Lockstep(make, [start] * problem.WORKERS)
    before = error(cluster)
    spread = []
    for _ in range(80):
        cluster.step(gradient)
        spread.append(float((cluster.x() - cluster.x().mean(0)).norm()))
    assert error(cluster) < before / 2
    return spread


def test_algorithm(monkeypatch):
    monkeypatch.setattr("distoptim.algorithms.ALGORITHMS", dict(distoptim.ALGORITHMS))
    assert len([line for line in block("Add an algorithm").splitlines() if line.strip()]) <= 20
    defined("Add an algorithm")
    from distoptim.algorithms import ALGORITHMS

    algorithm = ALGORITHMS["partial-averaging"]
    spread = train(lambda params, **options: algorithm(params, tau=2, lr=0.05, **options))
    # A sync halves the distance to the mean.
    assert spread[1] < spread[0]
    with pytest.raises(ValueError, match="exists already"):
        distoptim.register("partial-averaging", algorithm)


@pytest.mark.parametrize("name", ["half", "half+ef"])
def test_codec(monkeypatch, name):
    others = {key: codec for key, codec in codecs.CODECS.items() if key != "half"}
    monkeypatch.setattr("distoptim.comm.codecs.CODECS", others)
    defined("How do I add a codec of my own?", ROOT / "docs" / "compression.md")

    def make(params, **options):
        return distoptim.LocalSGD(params, tau=2, lr=0.05, codec=name, **options)

    spread = train(make, dtype=torch.float32)
    assert spread[0] > 0
    assert spread[1] == 0


def test_communicator():
    threads = defined("Add a communicator")["Threads"]
    board = [None] * problem.WORKERS
    barrier = threading.Barrier(problem.WORKERS, timeout=60)
    ends = [None] * problem.WORKERS

    def work(rank):
        params = [torch.nn.Parameter(p) for p in problem.start()]
        communicator = threads(rank, board, barrier)
        optimizer = distoptim.LocalSGD(params, lr=0.05, tau=4, communicator=communicator)
        for _ in range(40):
            for p, g in zip(
                params, problem.gradient(rank, [p.detach() for p in params]), strict=True
            ):
                p.grad = g
            optimizer.step()
            optimizer.average()
        optimizer.close()
        ends[rank] = torch.cat([p.detach().flatten() for p in params])

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(problem.WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    def make(params, **options):
        return distoptim.LocalSGD(params, lr=0.05, tau=4, **options)

    virtual = Lockstep(make, [problem.start()] * problem.WORKERS)
    for _ in range(40):
        virtual.step(problem.gradient)
    for rank in range(problem.WORKERS):
        torch.testing.assert_close(ends[rank], virtual.x()[rank], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:one worker")
def test_period():
    period = defined("Add a period")["Patient"](largest=4)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = distoptim.LocalSGD([parameter], lr=0.1, tau=period)
    taus = []
    for step in range(24):
        parameter.grad = torch.zeros(3)
        optimizer.step()
        optimizer.average(loss=2.0**-step)
        taus.append(optimizer.stats()["tau"])
    assert taus[0] == 1
    assert sorted(set(taus)) == [1, 2, 4]
    assert taus == sorted(taus)


def test_study(tmp_path):
    (tmp_path / "study.toml").write_text(block("Add a study", language="toml"))
    grid = spec.read(tmp_path / "study.toml")
    assert grid.title == "study"
    assert len(grid.cases()) == 2 * 2 * 2


def test_the_picture_is_of_this_house():
    """After a change of who imports whom, or of a room's first line: python docs/draw_house.py."""
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_house.py"))["draw"]()
    assert (ROOT / "docs" / "house.svg").read_text() == drawn
