"""Workers that come and go: what those that are left, and those that return, hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import distoptim
from distoptim import CommunicationError, Elastic
from distoptim.comm.elastic import MeanThread
from distoptim.comm.generation import Generation
from distoptim.comm.lighthouse import Lighthouse
from distoptim.periods import AdaComm, EqualTime, PostLocal
from distoptim.testing.processes import free_port, run
from tests.helpers import elastic
from tests.helpers.elastic import TAU, Wire, Worker, lighthouse, stop_for, write

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

address = elastic.address


def same(*found: dict[str, Any]) -> dict[Any, str]:
    """By merge and members, what these workers held after those that all of them made; equal."""
    first, *others = (one["held"] for one in found)
    for held in others:
        first = {count: first[count] for count in first.keys() & held.keys()}
        assert first == {count: held[count] for count in first}
    return first


def killed_and_back(
    rank: int, address: str, algorithm: str, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """c (rank 2) is killed in the middle of a round; rank 3 is c again, started anew."""
    died = folder / "died"
    end = folder / "end"
    if rank == 3:
        while not died.exists():
            time.sleep(0.01)
    worker = Worker("abcc"[rank], address, algorithm, options=options)
    if rank == 3:
        write(end, worker.began + 10 * TAU)
    while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
        worker.step()
        if rank == 2 and worker.optimizer.local_step >= 5 * TAU + 2:
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return worker.found()


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("overlap-local-sgd", {"fragments": 2, "codec": "int8+ef"}),
        ("local-sgd", {}),
        pytest.param("cocod-sgd", {"codec": "1bit+ef"}, marks=pytest.mark.soak),
        ("bmuf", {"tau": {0: 2, 12: TAU}}),
        ("eager-diloco", {"fragments": 3}),
        pytest.param("slowmo", {"tau": PostLocal(start=12, tau=TAU)}, marks=pytest.mark.soak),
        pytest.param("diloco", {"tau": AdaComm(TAU, interval=8)}, marks=pytest.mark.soak),
    ],
)
def test_a_killed_worker_is_missed_and_comes_back(address, tmp_path, algorithm, options):
    """P2, P4: at most what is in flight is lost, and who comes is in the rounds that begin then."""
    found = run(
        killed_and_back, 4, address, algorithm, options, tmp_path,
        backend=None, expect_exit={2: -9},
    )  # fmt: skip
    a, b, back = found[0], found[1], found[3]
    assert back["began"] > 5 * TAU
    assert back["members"] == a["members"] == ["a", "b", "c"]
    parts = options.get("fragments", 1)
    assert back["catch_ups"] >= 1
    # The means that were on their way when c died, at most; and on a machine that does much else a worker that
    # the others took for dead, and went on without.
    assert all(one["lost"] <= parts * (1 + one["catch_ups"]) for one in (a, b))
    assert len(same(a, b, back)) >= 5
    assert same(a, b)
    assert same(a, back)


def leaves(rank: int, address: str) -> dict[str, Any]:
    """c is told to end, and says goodbye; later b does."""
    worker = Worker("abc"[rank], address, "overlap-local-sgd")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        while worker.optimizer.local_step < 40 * TAU:
            worker.step()
            if worker.optimizer.local_step >= (1000, 20, 5)[rank] * TAU:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        return worker.found()
    return worker.found()


def test_nobody_waits_for_who_says_goodbye_and_no_mean_is_lost():
    """Whom the lighthouse counts among the living for longer than this test may take."""
    server = lighthouse(0, heartbeat_s=3600.0, join_s=3600.0)
    found = run(leaves, 3, elastic.at(server), backend=None, timeout_s=300)
    server.shutdown()
    assert [one["lost"] for one in found] == [0, 0, 0]
    assert found[0]["members"] == ["a"]
    assert [one["leaves"] for one in found] == [2, 1, 0]
    assert len(same(*found[:2])) >= 12


def stands_still(rank: int, address: str, folder: Path) -> dict[str, Any]:
    """b stands still for longer than all timeouts, and goes on."""
    end = folder / "end"
    worker = Worker("abc"[rank], address, "overlap-local-sgd", timeout_s=2.0)
    stopped = False
    while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
        worker.step()
        if rank == 1 and worker.optimizer.local_step >= 5 * TAU + 1 and not stopped:
            stopped = True
            stop_for(4.0)
        if rank == 1 and worker.optimizer.stats()["catch_ups"] and not end.exists():
            write(end, worker.optimizer.local_step + 10 * TAU)
    return worker.found()


def test_who_stands_still_is_left_behind_and_catches_up(address, tmp_path):
    """P6."""
    a, b, c = run(stands_still, 3, address, tmp_path, backend=None)
    assert b["catch_ups"] >= 1
    assert a["members"] == b["members"] == c["members"] == ["a", "b", "c"]
    assert len(same(a, b)) >= 10
    assert len(same(a, c)) >= 10


def goes_on(rank: int, address: str, folder: Path) -> dict[str, Any]:
    worker = Worker("ab"[rank], address, "overlap-local-sgd", start=2)
    while worker.optimizer.local_step < 60 * TAU:
        worker.step()
        # Not at this step alone: who was late has caught up, over it.
        if worker.optimizer.local_step >= 5 * TAU:
            (folder / f"begun-{rank}").touch()
    return worker.found()


def test_all_wait_for_a_lighthouse_that_is_away_and_go_on(tmp_path):
    """P7."""
    port = free_port()
    first = lighthouse(port)

    def restart() -> None:
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.01)
        first.shutdown()
        time.sleep(1.0)
        servers.append(lighthouse(port))

    servers: list[Any] = []
    thread = threading.Thread(target=restart, daemon=True)
    thread.start()
    a, b = run(goes_on, 2, f"127.0.0.1:{port}", tmp_path, backend=None)
    thread.join()
    servers[0].shutdown()
    assert len(same(a, b)) >= 20
    assert a["members"] == ["a", "b"]


def cut_off(rank: int, addresses: list[str], folder: Path) -> dict[str, Any]:
    """c's way to the lighthouse is cut, until the others have gone on without it."""
    end = folder / "end"
    worker = Worker("abc"[rank], addresses[rank == 2], "overlap-local-sgd")
    while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
        worker.step()
        if worker.optimizer.local_step >= 5 * TAU:
            (folder / f"begun-{rank}").touch()
        if rank == 0 and (folder / "cut").exists() and worker.workers.members == ["a", "b"]:
            (folder / "without").touch()
        if rank == 2 and worker.optimizer.stats()["catch_ups"] and not end.exists():
            write(end, worker.optimizer.local_step + 10 * TAU)
    return worker.found()


@pytest.mark.soak
def test_one_that_is_cut_off_is_missed_and_catches_up(address, tmp_path):
    wire = Wire(address)

    def cut_and_mend() -> None:
        while len(list(tmp_path.glob("begun-*"))) < 3:
            time.sleep(0.01)
        wire.cut()
        (tmp_path / "cut").touch()
        while not (tmp_path / "without").exists():
            time.sleep(0.01)
        wire.is_cut = False

    thread = threading.Thread(target=cut_and_mend, daemon=True)
    thread.start()
    a, b, c = run(cut_off, 3, [address, wire.address], tmp_path, backend=None)
    thread.join()
    assert c["catch_ups"] >= 1
    assert a["members"] == b["members"] == c["members"] == ["a", "b", "c"]
    assert len(same(a, b)) >= 10
    assert len(same(a, c)) >= 10


def misses_an_answer(rank: int, address: str, folder: Path) -> dict[str, Any]:
    """c does not get an answer of the lighthouse in which the others are told of it."""
    if rank == 2:
        ask = Lighthouse.ask

        def missed(self, said, limit_s):
            found = ask(self, said, limit_s)
            if said.phase == "round" and said.count == 4 and not (folder / "missed").exists():
                (folder / "missed").touch()
                return None
            return found

        Lighthouse.ask = missed
    worker = Worker("abc"[rank], address, "diloco", timeout_s=2.0, options={"fragments": 3})
    while worker.optimizer.local_step < 12 * TAU:
        worker.step()
    return worker.found()


@pytest.mark.soak
def test_who_is_in_a_launch_that_the_others_have_given_up_gives_it_up(address, tmp_path):
    """P6: they have waited for it, and are one launch further with no mean more."""
    found = run(misses_an_answer, 3, address, tmp_path, backend=None, timeout_s=120)
    assert (tmp_path / "missed").exists()
    for one in found:
        assert one["members"] == ["a", "b", "c"]
        assert one["lost"] >= 1
    assert len(same(*found)) >= 10


STRANGERS: list[tuple[dict[str, Any], str]] = [
    ({"tau": 5}, r"workers disagree on tau: rank 0 has 4, rank 1 has 5"),
    ({"width": 9}, r"workers disagree on fragment 0: .*8, 6.*, rank 1 has .*9, 6"),
]


def halves(
    rank: int,
    addresses: list[str],
    algorithm: str,
    options: dict[str, Any],
    least: int,
    folder: Path,
) -> dict[str, Any]:
    """c and d are cut off from a and b, and have a lighthouse of their own meanwhile."""
    name = "abcd"[rank]
    mine = ["a", "b"] if rank < 2 else ["c", "d"]
    end = folder / "end"
    worker = Worker(
        name, addresses[rank > 1], algorithm, start=4, min_workers=least, options=options
    )
    apart = 0
    while not end.exists() or worker.optimizer.local_step < int(end.read_text()):
        before = len(worker.held)
        worker.step()
        if worker.optimizer.local_step >= 5 * TAU:
            (folder / f"begun-{name}").touch()
        if len(worker.held) > before and worker.workers.members == mine:
            apart += 1
            if apart == 5:
                (folder / f"apart-{name}").touch()
        mended = (folder / "mended").exists()
        if rank == 0 and mended and len(worker.workers.members) == 4 and not end.exists():
            write(end, worker.optimizer.local_step + 20 * TAU)
    return {**worker.found(), "apart": apart}


@pytest.mark.soak
@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("overlap-local-sgd", {}),
        ("diloco", {"fragments": 3, "codec": "int8+ef", "adamw": True, "lr": 0.005}),
    ],
)
def test_two_halves_of_a_network_never_merge_silently(address, tmp_path, algorithm, options, least):
    """P3: they go on apart, or wait where they are too few, meet again, and one half takes over what the other has."""
    other = lighthouse(0)
    wire = Wire(address)

    def wait_for(pattern: str, count: int) -> None:
        while len(list(tmp_path.glob(pattern))) < count:
            time.sleep(0.01)

    def cut_and_mend() -> None:
        wait_for("begun-*", 4)
        wire.lay(elastic.at(other))
        if least == 1:
            wait_for("apart-*", 4)
        else:
            time.sleep(4 * elastic.HEARTBEAT_S)
        (tmp_path / "mended").touch()
        wire.lay(address)

    thread = threading.Thread(target=cut_and_mend, daemon=True)
    thread.start()
    places = [address, wire.address]
    found = run(
        halves, 4, places, algorithm, options, least, tmp_path, backend=None, timeout_s=400
    )  # fmt: skip
    thread.join()
    other.shutdown()
    for one in found:
        assert one["members"] == ["a", "b", "c", "d"]
        assert (one["apart"] >= 5) is (least == 1)
    if least == 1:
        # All of one half at least, and nobody has kept what it had made apart from those that were right.
        assert all(one["catch_ups"] for one in found[:2]) or all(
            one["catch_ups"] for one in found[2:]
        )
    assert len(same(*found)) >= 10


def joins_with(
    rank: int, address: str, algorithm: str, options: dict[str, Any], folder: Path
) -> str:
    """Another tau, and another model, than the run's; the others go on."""
    if rank == 2:
        while not (folder / "begun").exists():
            time.sleep(0.01)
        for other, message in STRANGERS:
            with pytest.raises(ValueError, match=message):
                Worker("c", address, algorithm, options=options, **other)
        (folder / "refused").touch()
        return "refused"
    worker = Worker("ab"[rank], address, algorithm, start=2, options=options)
    while not (folder / "refused").exists():
        worker.step()
        (folder / "begun").touch()
    count = worker.optimizer.rounds
    # Both have to end at one round.
    while worker.optimizer.rounds < count + 20:
        worker.step()
    return "went on"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("overlap-local-sgd", {}),
        pytest.param(
            "diloco", {"fragments": 3, "codec": "int8+ef", "adamw": True}, marks=pytest.mark.soak
        ),
    ],
)
def test_a_newcomer_that_disagrees_is_refused_and_the_others_go_on(
    address, tmp_path, algorithm, options
):
    """P9."""
    found = run(joins_with, 3, address, algorithm, options, tmp_path, backend=None)
    assert found == ["went on", "went on", "refused"]


def other_tau(rank: int, address: str) -> str:
    torch.manual_seed(0)
    workers = Elastic(address, name="ab"[rank], start=2, timeout_s=20.0)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"workers disagree on tau: rank 0 has 4, rank 1 has 5"):
        distoptim.LocalSGD(model.parameters(), lr=0.1, tau=4 + rank, communicator=workers)
    workers.close()
    return "refused"


def test_workers_that_disagree_are_refused(address):
    assert run(other_tau, 2, address, backend=None) == ["refused"] * 2


def test_a_death_before_the_run_has_begun_is_said(address, monkeypatch):
    def gone(*_, meet):
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(MeanThread, "form", gone)
    workers = Elastic(address, name="a")
    with pytest.raises(CommunicationError, match=r"a: a worker is gone .*nobody listens"):
        distoptim.LocalSGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, tau=4, communicator=workers)
    assert workers.history == ""


def test_too_few_are_said_after_a_while(address):
    """P8: nobody begins anew silently."""
    workers = Elastic(address, name="a", start=2, join_timeout_s=0.5)
    with pytest.raises(
        CommunicationError, match=r"no run to join, and 1 of 2 workers, within 0.5 s"
    ):
        distoptim.LocalSGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, tau=4, communicator=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": {2: None}}, "workers that come and go .*: levels=.* fixed members"),
        ({"tau": EqualTime(1.0)}, "workers that come and go .*: tau=.* another tau"),
        ({"fragments": 2, "tau": {0: 2, 4: 4}}, "workers that come and go .*: tau=.* fragments=1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(address, options, message):
    workers = Elastic(address, name="a")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        distoptim.OverlapLocalSGD(
            model.parameters(), **{"lr": 0.1, "tau": 4, "communicator": workers, **options}
        )
    workers.close()


def inside_ddp(rank: int, address: str) -> str:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    workers = Elastic(address, name="ab"[rank], start=2, timeout_s=20.0)
    optimizer = distoptim.LocalSGD(model.parameters(), lr=0.1, tau=4, communicator=workers)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(
        ValueError, match=r"DistributedDataParallel .* \(Elastic\): .* model.module"
    ):
        optimizer.step()
    optimizer.close()
    return "refused"


def test_ddp_around_the_model_is_refused(address):
    assert run(inside_ddp, 2, address) == ["refused"] * 2


def test_what_all_would_have_to_come_to_is_refused(address):
    model = torch.nn.Linear(2, 2)
    optimizer = distoptim.OverlapLocalSGD(
        model.parameters(), lr=0.1, tau=4, communicator=Elastic(address, name="a")
    )
    with (
        pytest.raises(ValueError, match=r"join.. beside workers that come and go"),
        optimizer.join(),
    ):
        pass
    with pytest.raises(ValueError, match=r"a plain optimizer's state beside workers that come"):
        optimizer.load_state_dict(optimizer.inner.state_dict())
    for _ in range(9):
        optimizer.average()
    before = [p.detach().clone() for p in model.parameters()]
    # No other worker need be there for it.
    with optimizer.averaged(model):
        pass
    optimizer.flush()
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.local_step == 9
    optimizer.close()
    optimizer.close()


def test_while_nobody_comes_or_goes_a_mean_is_one_question(address, monkeypatch):
    """P10, of which `benchmarks.elastic` measures the time: no new group, and nothing asked twice."""
    asked = []
    ask = Lighthouse.ask
    groups = []
    begin = Generation.__init__

    def counted(self, said, limit_s):
        asked.append(said.phase)
        return ask(self, said, limit_s)

    def made(self, *args, **options):
        groups.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(Lighthouse, "ask", counted)
    monkeypatch.setattr(Generation, "__init__", made)
    worker = Worker("a", address, "overlap-local-sgd", start=1)
    for _ in range(5 * TAU):
        worker.step()
    # The start, known to all, is the first.
    assert worker.found()["syncs"] == 5
    # The fifth was launched too.
    assert asked.count("round") == 5
    assert len(groups) == 1


def test_the_script_of_the_docs_runs(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "elastic.md"
    script = page.read_text().partition("```python\n")[2].partition("```")[0]
    for there, here in {
        "10.0.0.1:29510": address,
        "10.0.0.5": "127.0.0.1",
        "start=3": "start=1",
    }.items():
        assert there in script
        script = script.replace(there, here)
    script = script.replace("...", "model(torch.ones(1, 2)).sum().backward()")
    names = {"torch": torch, "distoptim": distoptim, "model": torch.nn.Linear(2, 2), "steps": 45}
    exec(compile(script, page.name, "exec"), names)
    assert names["optimizer"].stats()["syncs"] == 45 // 20 - 1 + 1
    assert Path("model.pt").exists()


def test_the_command_listens_until_it_is_told_to_end():
    port = free_port()
    command = [sys.executable, "-m", "distoptim", "lighthouse", "--bind", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert (
            process.stdout.readline() == f"lighthouse at 127.0.0.1:{port}, heartbeat timeout 5 s\n"
        )
        worker = Worker("a", f"127.0.0.1:{port}", "overlap-local-sgd", start=1)
        worker.step()
        worker.found()
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("host1", {}, "allowed is HOST:PORT"),
        ("127.0.0.1:1", {"name": ""}, "name='': allowed is text"),
        ("127.0.0.1:1", {"start": 0}, "start=0"),
        ("127.0.0.1:1", {"host": "203.0.113.7"}, "host='203.0.113.7'.*an address of this machine"),
    ],
)
def test_bad_arguments_are_refused(where, options, message):
    with pytest.raises(ValueError, match=message):
        Elastic(where, **{"name": "a", **options})


def test_no_lighthouse_is_said():
    with pytest.raises(CommunicationError, match=r"no lighthouse answers at http://127.0.0.1:1"):
        Elastic("127.0.0.1:1", name="a", join_timeout_s=0.1, timeout_s=0.5)
