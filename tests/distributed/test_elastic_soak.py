"""Ten workers killed at random moments of a run of 250 rounds, each of which comes back."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from distoptim.testing.processes import run
from tests.helpers import elastic
from tests.helpers.elastic import TAU, Worker

# Read when torchft is imported, which prints every question of every worker without it.
os.environ.setdefault("RUST_LOG", "warn")
pytest.importorskip("torchft", reason="workers that come and go need distoptim[elastic]")

address = elastic.address
ROUNDS = 250
KILLS = 10
# Nobody may wait for so long.
TIMEOUT_S = 60.0


def plan(seed: int) -> list[tuple[float, int]]:
    """When who is killed, in seconds since all have begun."""
    choose = random.Random(seed)
    return [(3.5 * k + choose.uniform(0.0, 2.0), choose.randrange(3)) for k in range(1, KILLS + 1)]


def live(name: str, address: str, algorithm: str, options: dict[str, Any], folder: Path) -> None:
    """One life; what it holds after each merge goes to a file at once."""
    worker = Worker(name, address, algorithm, options=options, timeout_s=TIMEOUT_S)
    with (folder / f"{name}.jsonl").open("a") as file:
        while worker.optimizer.local_step < ROUNDS * TAU:
            known = len(worker.held)
            worker.step()
            time.sleep(0.02)
            if len(worker.held) > known:
                merges, held = list(worker.held.items())[-1]
                line = [os.getpid(), time.monotonic(), repr(merges), held]
                file.write(json.dumps(line) + "\n")
                file.flush()
                (folder / f"{name}.begun").touch()
        worker.optimizer.consolidate()
        loss = elastic.loss_of(worker.model)
        worker.optimizer.close()
    (folder / f"{name}.json").write_text(json.dumps({**worker.optimizer.stats(), "loss": loss}))


def bear(*life: Any) -> int:
    """In a process of its own; this one has started no threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(*life)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return pid


def watch(
    rank: int, address: str, algorithm: str, options: dict[str, Any], seed: int, folder: Path
) -> int:
    life = ("abc"[rank], address, algorithm, options, folder)
    pid = bear(*life)
    while len(list(folder.glob("*.begun"))) < 3:
        time.sleep(0.01)
    begun = time.monotonic()
    killed = 0
    for after_s in [after_s for after_s, victim in plan(seed) if victim == rank]:
        time.sleep(max(0.0, begun + after_s - time.monotonic()))
        if not (folder / f"{life[0]}.json").exists():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            pid = bear(*life)
    assert os.waitpid(pid, 0)[1] == 0
    return killed


@pytest.mark.soak
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("overlap-local-sgd", {}),
        ("diloco", {"fragments": 3, "codec": "int8+ef", "adamw": True, "lr": 0.005}),
    ],
)
def test_ten_that_are_killed_come_back(address, tmp_path, algorithm, options):
    killed = run(
        watch, 3, address, algorithm, options, 0, tmp_path, backend=None, timeout_s=900
    )  # fmt: skip
    lines = {
        name: [json.loads(x) for x in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in "abc"
    }
    held: dict[str, set[str]] = {}
    for _, _, merges, digest in itertools.chain(*lines.values()):
        held.setdefault(merges, set()).add(digest)
    assert sum(killed) >= KILLS - 1
    assert all(len(digests) == 1 for digests in held.values())
    gaps = [
        after[1] - before[1]
        for each in lines.values()
        for before, after in itertools.pairwise(each)
        if before[0] == after[0]
    ]
    stats = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc"}
    print(f"killed {killed}, {len(held)} merges, longest {max(gaps):.2f} s between two of a worker")
    print(
        {n: {k: s[k] for k in ("lost", "catch_ups", "losses", "joins")} for n, s in stats.items()}
    )
    losses = [each["loss"] for each in stats.values()]
    alone = [elastic.undisturbed(algorithm, options, ROUNDS * TAU, seed) for seed in range(5)]
    print(f"loss {losses}, of 5 seeds without a loss {alone}")
    # Within what seeds differ by, of which five are known.
    assert max(losses) <= max(alone) + (max(alone) - min(alone))
    assert len(held) >= ROUNDS - 3 * KILLS
    assert max(gaps) < TIMEOUT_S / 3
