"""What a killed worker costs: ours, torchft's Manager over DDP's gradients, and torchrun's restart over DDP with checkpoints.

Three workers with equally long steps; one is killed with SIGKILL in the middle, and started again at once (by torchrun: all
are). Run: python -m benchmarks.recovery [--repeats 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distoptim
from benchmarks.report import Report, save

WORKERS = 3
STEP_S = 0.05
TAU = 10
"""Local steps in a round of ours; torchrun's workers write a checkpoint as often."""
KILL_AT = 8 * TAU
WIDTH = 256
LIMIT_S = 240.0


class Diary:
    """What a worker notes after every step that counts: when, which, among how many."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = (folder / f"{name}.{os.getpid()}.jsonl").open("a")

    def note(self, step: int, workers: int, means: int) -> None:
        self._file.write(json.dumps([time.monotonic(), step, workers, means]) + "\n")
        self._file.flush()


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))


def backward(model: torch.nn.Module) -> None:
    model(torch.randn(16, WIDTH)).square().mean().backward()
    time.sleep(STEP_S)


def ours(folder: Path, name: str, address: str) -> None:
    """A mean every `TAU` local steps, hidden behind the next round."""
    workers = distoptim.Elastic(address, name=name, start=WORKERS)
    model = network()
    make: Any = distoptim.OverlapLocalSGD
    optimizer = make(model.parameters(), lr=1e-3, tau=TAU, communicator=workers)
    diary = Diary(folder, name)
    while True:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.average()
        diary.note(optimizer.local_step, len(workers.members), optimizer.stats()["syncs"])


def torchft(folder: Path, name: str, address: str) -> None:
    """The gradients of every step, averaged by torchft's Manager."""
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    store: Any = dist
    server = store.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)

    def load(state: Any) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["inner"])

    manager: Any = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=server.port,
        lighthouse_addr=f"http://{address}",
        replica_id=name,
        hostname="127.0.0.1",
    )
    # All begin together, as ours do; the first question waits for whoever is alive.
    while len(list(folder.glob("*.ready"))) < WORKERS:
        (folder / f"{name}.ready").touch()
        time.sleep(0.01)
    trained = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    diary = Diary(folder, name)
    while True:
        optimizer.zero_grad()
        backward(trained)
        before = manager.current_step()
        optimizer.step()
        diary.note(
            manager.current_step(),
            manager.num_participants(),
            manager.current_step() - before,
        )


def torchrun(folder: Path, name: str, address: str) -> None:
    """Plain DDP under torchrun, which restarts all; from rank 0's last checkpoint."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"{'abc'[rank]}.pid").write_text(str(os.getpid()))
    model = network()
    trained = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = 0
    file = folder / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        step = saved["step"]
    diary = Diary(folder, "abc"[rank])
    while True:
        backward(trained)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0 and step % TAU == 0:
            draft = file.with_suffix(".draft")
            torch.save({"model": model.state_dict(), "step": step}, draft)
            draft.replace(file)
        diary.note(step, WORKERS, 1)


KINDS: dict[str, Callable[[Path, str, str], None]] = {
    "ours": ours,
    "torchft": torchft,
    "torchrun": torchrun,
}


def notes(folder: Path, name: str) -> list[list[float]]:
    """Of all lives of a worker, in order of time."""
    lines = [path.read_text().splitlines() for path in folder.glob(f"{name}.*.jsonl")]
    # The last line of one that was killed may be half of one.
    whole = [json.loads(line) for each in lines for line in each if line.endswith("]")]
    return sorted(whole)


def wait_for(what: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {LIMIT_S:g} s")
        if processes[0].poll() is not None:
            raise RuntimeError(f"a survivor has ended with {processes[0].returncode}")
        time.sleep(0.01)


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    """As `distoptim lighthouse` starts it."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, quorum_tick_ms=20
    )
    yield f"127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


def start(kind: str, folder: Path, address: str, name: str) -> subprocess.Popen[bytes]:
    own = ["-m", "benchmarks.recovery", "--worker", kind, "--folder", str(folder)]
    own += ["--address", address, "--name", name]
    if kind == "torchrun":
        own = [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"),
            # At a load at which workers do not connect at once it starts all again, and again.
            *("--max-restarts=20", *own),
        ]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, *own], stdout=log, stderr=log, env={**os.environ, "RUST_LOG": "warn"}
    )


def once(kind: str) -> dict[str, float]:
    """One kill: seconds until the survivors' next step together, and until all three are there; steps lost."""
    with tempfile.TemporaryDirectory() as text, lighthouse() as address:
        folder = Path(text)
        names = ["all"] if kind == "torchrun" else list("abc")
        processes = [start(kind, folder, address, name) for name in names]
        try:
            wait_for(
                lambda: all(n and n[-1][1] >= KILL_AT for n in (notes(folder, x) for x in "abc")),
                processes,
            )
            return measure(kind, folder, address, processes)
        finally:
            for process in processes:
                process.terminate() if kind == "torchrun" else process.kill()
                process.wait()


def measure(
    kind: str, folder: Path, address: str, processes: list[subprocess.Popen[bytes]]
) -> dict[str, float]:
    """Kill c, and see."""
    pid = int((folder / "c.pid").read_text()) if kind == "torchrun" else processes[2].pid
    # In the middle of a round.
    middle = notes(folder, "c")[-1][1] // TAU * TAU + TAU + TAU // 2
    wait_for(lambda: notes(folder, "c")[-1][1] >= middle, processes)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    if kind != "torchrun":
        processes[2].wait()
        processes[2] = start(kind, folder, address, "c")
    before = {name: [n for n in notes(folder, name) if n[0] <= killed][-1] for name in "abc"}

    def first(name: str, fits: Callable[[list[float]], bool]) -> float | None:
        return next((n[0] for n in notes(folder, name) if n[0] > killed and fits(n)), None)

    def goes_on(name: str) -> float | None:
        if kind == "ours":
            # Two means may have been made before: one that was there, and one that is merged a round later.
            return first(name, lambda n: n[2] < WORKERS and n[3] > before[name][3])
        if kind == "torchft":
            return first(name, lambda n: n[3] > 0 and n[2] < WORKERS)
        return first(name, lambda n: n[0] > killed and n[1] <= before[name][1])

    def all_there(name: str) -> float | None:
        went_on = goes_on("a")
        if went_on is None:
            return None
        after = went_on if kind != "torchrun" else killed
        return first(name, lambda n: n[0] >= after and n[2] == WORKERS and n[3] > 0)

    wait_for(lambda: all(goes_on(name) for name in "ab"), processes)
    wait_for(lambda: all(all_there(name) for name in "abc"), processes)
    went_on = goes_on("a") or 0.0
    between = [n for n in notes(folder, "a") if n[0] < went_on]
    if kind == "ours":
        # No local step is undone: what is lost of a mean is in the next one.
        lost = 0.0
    elif kind == "torchft":
        lost = sum(1.0 for n in between if n[0] > killed and not n[3])
    else:
        again = next(n for n in notes(folder, "a") if n[0] == went_on)
        lost = max(n[1] for n in between) - again[1] + 1
    return {
        "go on": max(goes_on(name) or 0.0 for name in "ab") - killed,
        "all again": max(all_there(name) or 0.0 for name in "abc") - killed,
        "lost": lost,
        # Of ours those since its last launch; of torchft's the one that it was in.
        "victim": before["c"][1] % TAU if kind == "ours" else max(lost, 1.0),
    }


TITLES = {
    "go on": "survivors' next mean, s",
    "all again": "all three in a mean, s",
    "lost": "steps that survivors make again",
    "victim": "steps lost of the killed",
}


def tried(kind: str, report: Report) -> dict[str, float] | None:
    """One kill; None where the survivors have given up."""
    try:
        found = once(kind)
    except (RuntimeError, TimeoutError) as error:
        report.note(f"{kind}: {error}")
        return None
    report.note(f"{kind}: {', '.join(f'{key} {value:.1f}' for key, value in found.items())}")
    return found


def told(values: list[float]) -> str:
    """The median and the range, of sorted ones."""
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


def main(repeats: int) -> Report:
    """Print the table."""
    # It would print every question of every worker.
    os.environ.setdefault("RUST_LOG", "warn")
    report = Report("recovery")
    rows = []
    for kind in KINDS:
        runs = [run for run in (tried(kind, report) for _ in range(repeats)) if run]
        row: dict[str, Any] = {"workers": kind}
        for key, title in TITLES.items():
            values = sorted(run[key] for run in runs)
            row[title] = told(values) if values else "-"
        row["gave up"] = repeats - len(runs)
        rows.append(row)
    report.table(f"one of {WORKERS} killed, {repeats} times each: median and range", rows)
    report.finish()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for option in ("worker", "folder", "address", "name"):
        parser.add_argument(f"--{option}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        torch.set_num_threads(1)
        KINDS[given.worker](Path(given.folder), given.name, given.address)
    else:
        save([main(given.repeats)], given.json)
