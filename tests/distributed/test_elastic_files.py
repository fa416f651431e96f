"""Workers that come and go, and what they have kept in files; how a run ends, and who comes after it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distoptim import ALGORITHMS, CommunicationError, Elastic
from distoptim.testing.processes import run
from tests.helpers import elastic
from tests.helpers.elastic import TAU, Worker

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

address = elastic.address


def save(worker: Worker, path: Path) -> None:
    torch.save(
        {"model": worker.model.state_dict(), "optimizer": worker.optimizer.state_dict()}, path
    )


def load(worker: Worker, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    worker.model.load_state_dict(saved["model"])
    worker.optimizer.load_state_dict(saved["optimizer"])


def all_restarted(rank: int, address: str, algorithm: str, options: Any, folder: Path) -> Any:
    """c's file is two rounds older than the others'; a's lies between two means; d has none."""
    name = "abcd"[rank]
    file = folder / f"{name}.pt"
    if rank < 3:
        worker = Worker(name, address, algorithm, options=options)
        for _ in range((5 * TAU + 2, 5 * TAU + 1, 3 * TAU + 1)[rank]):
            worker.step()
        save(worker, file)
        while worker.optimizer.local_step < 5 * TAU + 2:
            worker.step()
        worker.optimizer.close()
        (folder / f"{name}.ended").touch()
    while len(list(folder.glob("*.ended"))) < 3:
        time.sleep(0.01)
    again = Worker(name, address, algorithm, options=options, start=4)
    if rank < 3:
        load(again, file)
    while again.optimizer.local_step < 12 * TAU:
        again.step()
    return again.found()


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("overlap-local-sgd", {"fragments": 2, "codec": "int8+ef"}),
        ("local-sgd", {"codec": "1bit+ef"}),
    ],
)
def test_all_that_restart_begin_where_the_furthest_was(address, tmp_path, algorithm, options):
    """P3: those of another history take over that of the furthest."""
    found = run(all_restarted, 4, address, algorithm, options, tmp_path, backend=None)
    a, b, c, d = found
    # Whoever was less far has caught up, and nobody has gone back behind the furthest file.
    assert c["catch_ups"] >= 1
    assert d["catch_ups"] >= 1
    held = [one["held"] for one in found]
    common = set.intersection(*({*each} for each in held))
    assert len(common) >= 5
    assert all(len({each[count] for each in held}) == 1 for count in common)
    assert all(one["steps"] < 9 * TAU for one in (a, b))


@pytest.mark.parametrize("algorithm", ["overlap-local-sgd", "diloco", "cocod-sgd", "co2"])
def test_one_that_is_alone_goes_on_from_its_file_bit_equal(address, tmp_path, algorithm):
    def made(name: str) -> Worker:
        return Worker(name, address, algorithm, start=1, options={"codec": "int8+ef"})

    whole = made("a")
    for step in range(6 * TAU):
        if step == 3 * TAU + 1:
            save(whole, tmp_path / "file")
            place = whole.generator.get_state()
        whole.step()
    whole.optimizer.close()
    again = made("a")
    load(again, tmp_path / "file")
    again.generator.set_state(place)
    assert again.optimizer.local_step == 3 * TAU + 1
    while again.optimizer.local_step < 6 * TAU:
        again.step()
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    # Of other groups, so of other histories.
    assert set(again.found()["held"].values()) <= set(whole.held.values())


def test_files_of_others_and_of_other_rounds_are_refused(address):
    def made(name: str, tau: int) -> Any:
        model = torch.nn.Linear(2, 2)
        return ALGORITHMS["overlap-local-sgd"](
            model.parameters(), lr=0.1, tau=tau, communicator=Elastic(address, name=name)
        )

    first = made("a", 4)
    saved = first.state_dict()
    first.close()
    other = made("b", 4)
    with pytest.raises(ValueError, match=r"elastic.name is 'a': allowed is 'b': each worker loads"):
        other.load_state_dict(saved)
    other.close()
    again = made("a", 5)
    with pytest.raises(ValueError, match=r"delay is 4: allowed is 5 with tau Fixed"):
        again.load_state_dict(saved)
    again.close()


def after_the_end(rank: int, address: str, folder: Path) -> Any:
    """a and b end; c comes while b has still to close, and d leaves in the middle."""
    came = folder / "came"
    if rank == 2:
        while not (folder / "ended").exists():
            time.sleep(0.01)
        came.touch()
        with pytest.raises(
            CommunicationError, match=r"c: the run has ended, after \d+ means, as [ab] says"
        ):
            Worker("c", address, "overlap-local-sgd")
        return None
    worker = Worker("abcd"[rank], address, "overlap-local-sgd")
    while worker.optimizer.local_step < (4 * TAU if rank == 3 else 10 * TAU):
        worker.step()
    if rank == 3:
        try:
            raise SystemExit
        except SystemExit:
            worker.optimizer.close()
    if rank == 1:
        # As one that evaluates; what it makes is not asked of it.
        (folder / "ended").touch()
        while not came.exists():
            time.sleep(0.01)
        time.sleep(1.0)
    found = worker.found()
    return {**found, "events": [(e.what, e.worker) for e in worker.workers.events]}


def test_who_comes_after_the_end_is_told_and_who_leaves_has_not_ended_the_run(address, tmp_path):
    """P8: a run that has ended says so."""
    found = run(after_the_end, 4, address, tmp_path, backend=None)
    b = found[1]
    assert b["leaves"] == 1
    assert b["events"][:2] == [("begins", "b"), ("left", "d")]


def below_the_least(rank: int, address: str, folder: Path) -> Any:
    """b leaves; a waits, as it must, until c is there."""
    worker = None
    if rank == 2:
        while not (folder / "alone").exists():
            time.sleep(0.01)
        time.sleep(1.0)
    worker = Worker("abc"[rank], address, "overlap-local-sgd", start=2, min_workers=2)
    while worker.optimizer.local_step < (4 * TAU if rank == 1 else 10 * TAU):
        worker.step()
    if rank == 1:
        (folder / "alone").touch()
    return worker.found()


def test_too_few_wait_until_others_come(address, tmp_path):
    """P5."""
    a, _, c = run(below_the_least, 3, address, tmp_path, backend=None)
    assert a["members"] == c["members"] == ["a", "c"]
    common = a["held"].keys() & c["held"].keys()
    assert len(common) >= 4
    assert all(a["held"][count] == c["held"][count] for count in common)


def test_what_happens_is_told_and_logged(address, caplog):
    with caplog.at_level(logging.INFO, logger="distoptim"):
        worker = Worker("a", address, "overlap-local-sgd", start=1)
        for _ in range(3 * TAU):
            worker.step()
        saved = worker.optimizer.state_dict()["distoptim"]["elastic"]
        found = worker.found()
    (event,) = worker.workers.events
    assert (event.what, event.worker, event.why) == ("begins", "a", "with nobody yet")
    assert saved["events"][0]["what"] == "begins"
    assert saved["count"] == found["syncs"]
    assert [r.message for r in caplog.records if "a: " in r.message] == [
        "a: a begins (with nobody yet)"
    ]


def statistics_of(rank: int, address: str, folder: Path) -> Any:
    """b closes long before a asks for what the last mean's statistics were."""
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    workers = Elastic(address, name="ab"[rank], start=2, timeout_s=2.0)
    optimizer = ALGORITHMS["overlap-local-sgd"](
        model.parameters(), lr=0.1, tau=TAU, communicator=workers, module=model, codec="int8"
    )
    sent: list[torch.Tensor] = []
    for step in range(2 * TAU):
        model(rank + torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # That of the mean that is merged at 2 tau, which was launched at tau.
        if step == TAU - 1:
            sent.append(model[1].running_var.clone())
        optimizer.average()
    own = model[1].running_var.clone()
    if rank == 1:
        optimizer.close()
        (folder / "closed").touch()
    else:
        while not (folder / "closed").exists():
            time.sleep(0.01)
    with optimizer.averaged(model):
        shown = model[1].running_var.clone()
    assert torch.equal(model[1].running_var, own)
    optimizer.consolidate(model)
    assert torch.equal(model[1].running_var, shown)
    optimizer.close()
    return {"sent": sent[0], "shown": shown}


def test_statistics_come_with_every_mean(address, tmp_path):
    a, b = run(statistics_of, 2, address, tmp_path, backend=None)
    assert torch.equal(a["shown"], b["shown"])
    assert torch.allclose(a["shown"], (a["sent"] + b["sent"]) / 2)
    assert not torch.allclose(a["sent"], b["sent"])
