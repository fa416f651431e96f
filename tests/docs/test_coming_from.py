"""Each pair of docs/coming-from.md, both sides of its diff, with real workers: where the page says so, the same numbers."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distoptim
from distoptim.testing.processes import run
from tests.helpers import marks, problem
from tests.helpers.elastic import at, lighthouse

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
STEPS = 15
BATCH = 8
TIMEOUT = timedelta(seconds=60)

Names = dict[str, Any]

# What a script leaves behind stays until its process ends: a DDP that is dropped may wait for a thread of
# gloo that waits for the interpreter (see tests/helpers/shell.py).
_kept: list[Names] = []


def pair(heading: str) -> tuple[str, str]:
    """Their lines and ours, as two scripts: the diff under a heading of the page."""
    section = re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE)
    (diff,) = [
        block
        for text in section
        if text.startswith(f"{heading}\n")
        for block in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    lines = diff.splitlines()
    assert all(line[:1] in (" ", "+", "-") for line in lines)
    theirs, ours = ("\n".join(line[1:] for line in lines if line[:1] != drop) for drop in "+-")
    return theirs, ours


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batches(rank: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1 + rank)
    return [
        (
            torch.randn(BATCH, 6, generator=generator),
            torch.randint(3, (BATCH,), generator=generator),
        )
        for _ in range(steps)
    ]


def seen(model: nn.Module, loader: list[Any], into: list[Tensor]) -> Iterator[Any]:
    """The batches; notes the parameters before each, so after each step."""
    for batch in loader:
        into.append(flat(model))
        yield batch


def train(script: str, rank: int, **names: Any) -> Tensor:
    """Execute the lines of the page; returns a row of parameters per step and one of the end."""
    model = network()
    rows: list[Tensor] = []
    given: Names = {
        "torch": torch,
        "dist": dist,
        "distoptim": distoptim,
        "model": model,
        "loss_function": nn.functional.cross_entropy,
        "loader": seen(model, batches(rank), rows),
        **names,
    }
    exec(compile(script, PAGE.name, "exec", dont_inherit=True), given)
    _kept.append(given)
    return torch.stack([*rows, flat(model)])


def both(rank: int, heading: str) -> tuple[Tensor, Tensor]:
    torch.set_default_dtype(torch.float64)
    theirs, ours = pair(heading)
    return train(theirs, rank), train(ours, rank)


def same(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def trained(found: Tensor) -> None:
    """That there is something to compare: workers differ between averages and move."""
    assert (found[:, -1] - found[:, 0]).abs().max() > 0.01


def of(heading: str, workers: int = 2, **options: Any) -> tuple[Tensor, Tensor]:
    """By worker, step and parameter: theirs and ours."""
    found = run(both, workers, heading, **options)
    theirs, ours = (torch.stack(side) for side in zip(*found, strict=True))
    trained(theirs)
    return theirs, ours


def test_ddp() -> None:
    theirs, ours = of("DistributedDataParallel")
    same(theirs, ours)


def other_settings(rank: int) -> list[tuple[Tensor, Tensor]]:
    torch.set_default_dtype(torch.float64)
    found = []
    for settings in ("lr=0.1", "lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01"):
        scripts = [
            script.replace("lr=0.1, momentum=0.9", settings)
            for script in pair("DistributedDataParallel")
        ]
        found.append((train(scripts[0], rank), train(scripts[1], rank)))
    return found


def test_ddp_with_sgd_of_other_settings() -> None:
    for found in run(other_settings, 2):
        for theirs, ours in found:
            same(theirs, ours)
        assert not torch.equal(found[0][1], found[1][1])


def without_linearity(rank: int) -> tuple[Tensor, Tensor]:
    torch.set_default_dtype(torch.float64)
    theirs, ours = pair("DistributedDataParallel")
    theirs = theirs.replace("SGD(model.parameters(), lr=0.1, momentum=0.9)", ADAM)
    ours = ours.replace("model.parameters(), lr=0.1, momentum=0.9", f"torch.optim.{ADAM}")
    return train(theirs, rank), train(ours, rank)


ADAM = "Adam(model.parameters(), lr=0.01, eps=1e-15)"


def test_ddp_with_adam_is_another_thing() -> None:
    """Adam's first step is lr times the sign of the gradient: of the mean one under DDP, the mean of both signs here."""
    found = run(without_linearity, 2)
    theirs, ours = (torch.stack(side)[0] for side in zip(*found, strict=True))
    steps = (ours[1] - ours[0]) / 0.01
    torch.testing.assert_close((theirs[1] - theirs[0]).abs(), torch.full_like(steps, 0.01))
    torch.testing.assert_close(steps, steps.round())
    assert set(steps.round().tolist()) == {-1.0, 0.0, 1.0}


def test_post_local_sgd() -> None:
    theirs, ours = of("PostLocalSGD of torch")
    same(theirs, ours)
    equal = [t for t in range(STEPS + 1) if torch.equal(ours[0, t], ours[1, t])]
    assert equal == [0, 1, 2, 3, 4, 5, 6, 10, 14]


def test_post_local_sgd_with_the_mean_within_a_machine() -> None:
    theirs, ours = of("With the gradients' mean within a machine", workers=4)
    same(theirs, ours)
    same(ours[0], ours[1])
    assert (ours[0] - ours[2])[9].abs().max() > 1e-6


def with_momentum(rank: int) -> tuple[Tensor, Tensor]:
    torch.set_default_dtype(torch.float64)
    theirs, ours = (
        script.replace("lr=0.1", "lr=0.1, momentum=0.9") for script in pair("PostLocalSGD of torch")
    )
    return train(theirs, rank), train(ours, rank)


def test_post_local_sgd_with_momentum_is_the_same_for_a_while() -> None:
    found = run(with_momentum, 2)
    theirs, ours = (torch.stack(side) for side in zip(*found, strict=True))
    same(theirs[:, :7], ours[:, :7])
    same(theirs.mean(0)[:8], ours.mean(0)[:8])
    assert (theirs - ours)[:, 7].abs().max() > 1e-6
    assert (theirs - ours).mean(0)[8].abs().max() > 1e-6


def averager_alone(rank: int) -> tuple[Tensor, Tensor]:
    """Without the hook, and without its phase."""
    torch.set_default_dtype(torch.float64)
    theirs, ours = pair("PostLocalSGD of torch")
    theirs = "\n".join(
        line
        for line in theirs.splitlines()
        if not line.startswith(("model =", "state =", "model.register"))
    ).replace("warmup_steps=5", "warmup_steps=0")
    return train(theirs, rank), train(ours.replace("start=6", "start=1"), rank)


def test_the_averager_alone() -> None:
    for theirs, ours in run(averager_alone, 2):
        same(theirs, ours)


@contextlib.contextmanager
def manager(rank: int, address: str) -> Iterator[Any]:
    """As torchft's users make it: one replica group for each worker."""
    from torchft import Manager, ProcessGroupGloo

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = Manager(
        ProcessGroupGloo(timeout=TIMEOUT),
        None,
        None,
        min_replica_size=2,
        use_async_quorum=False,
        timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=f"http://{address}",
        replica_id=f"worker_{rank}",
        hostname="127.0.0.1",
        init_sync=False,
    )
    yield made
    made.shutdown(wait=False)


def torchft(rank: int, heading: str, for_theirs: str, for_ours: str) -> tuple[Tensor, Tensor]:
    torch.set_default_dtype(torch.float64)
    theirs, ours = pair(heading)
    with manager(rank, for_theirs) as made:
        found = train(theirs, rank, manager=made)
        # Who is done first would otherwise leave the other with a quorum of one.
        dist.barrier()
    return found, train(ours, rank, lighthouse=for_ours, name="ab"[rank])


@pytest.mark.parametrize("heading", ["LocalSGD", "DiLoCo", "Streaming DiLoCo"])
def test_torchft(heading: str) -> None:
    pytest.importorskip("torchft")
    # Its managers must not begin one without the other.
    servers = [lighthouse(0, least=2), lighthouse(0)]
    found = run(torchft, 2, heading, *map(at, servers))
    for server in servers:
        server.shutdown()
    theirs, ours = (torch.stack(side) for side in zip(*found, strict=True))
    trained(theirs)
    same(theirs, ours)


@marks.trainer("accelerate")
def test_accelerate() -> None:
    # The accelerator makes the process group.
    theirs, ours = of("LocalSGD of Accelerate", backend=None)
    same(theirs, ours)
    assert torch.equal(ours[0, -1], ours[1, -1])
    assert not torch.equal(ours[0, -2], ours[1, -2])


EPOCHS = 2


def stepped(x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """x after one step of SGD."""
    model = network()
    nn.utils.vector_to_parameters(x, model.parameters())
    data, label = batch
    nn.functional.cross_entropy(model(data), label).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return flat(model)


@pytest.mark.soak
def test_hivemind(tmp_path: Path) -> None:
    """When an epoch ends, both peers hold the mean of what they had before."""
    hivemind = pytest.importorskip("hivemind")
    meeting = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    address = str(meeting.get_visible_maddrs()[0])
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    script = Path(__file__).with_name("hivemind_peer.py")
    peers = [
        subprocess.Popen([sys.executable, script, str(rank), address, file])
        for rank, file in enumerate(files)
    ]
    try:
        assert [peer.wait(500) for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            peer.kill()
        meeting.shutdown()
    ends = [torch.load(file, weights_only=True) for file in files]
    assert [len(found) for found in ends] == [EPOCHS, EPOCHS]
    # Peers that do not find each other in time, as on a busy machine, go on without a mean.
    met = [
        (first, second, held)
        for (first, held), (second, held_by_second) in zip(*ends, strict=True)
        if torch.allclose(held, held_by_second, rtol=0, atol=1e-6)
    ]
    assert met
    for first, second, held in met:
        assert (first - second).abs().max() > 1e-3
        torch.testing.assert_close(held, (first + second) / 2, rtol=0, atol=1e-6)


def beside_hivemind(rank: int, address: str) -> Tensor:
    torch.set_default_dtype(torch.float64)
    _, ours = pair("hivemind")
    return train(ours, rank, lighthouse=address, name="ab"[rank])


def test_ours_beside_hivemind() -> None:
    """The same, every tau local steps."""
    pytest.importorskip("torchft")
    server = lighthouse(0)
    found = run(beside_hivemind, 2, at(server))
    server.shutdown()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for step in (3, 7, 11):
        before = [stepped(rows[step], batches(rank)[step]) for rank, rows in enumerate(found)]
        for rows in found:
            same(torch.stack(before).mean(0), rows[step + 1])
    torch.set_default_dtype(default)


def paper(rank: int, replaced: Callable[[str], str]) -> Tensor:
    torch.set_default_dtype(torch.float64)
    _, ours = pair("The paper's own code")
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), problem.start(), strict=True):
            parameter.copy_(start)
    data = problem.DATA[f"lsq|X{rank}"]
    label = problem.DATA[f"lsq|Y{rank}"]
    rows: list[Tensor] = []
    names: Names = {
        "loss_function": lambda out, label: (out - label).square().sum() / (2 * len(label)),
        "loader": seen(model, [(data, label)] * problem.STEPS, rows),
        "model": model,
    }
    train(replaced(ours), rank, **names)
    return torch.stack([*rows, flat(model)])


def as_it_stands(script: str) -> str:
    return script


def local_sgd(script: str) -> str:
    return script.replace("OverlapLocalSGD", "LocalSGD").replace("    alpha=0.6,\n", "")


def easgd(script: str) -> str:
    script = script.replace("OverlapLocalSGD", "EASGD").replace("    gmf=0.7,\n", "")
    return script.replace("alpha=0.6", "alpha=0.2")


def cocod_sgd(script: str) -> str:
    script = script.replace("OverlapLocalSGD", "CoCoDSGD")
    return script.replace("    alpha=0.6,\n    gmf=0.7,\n", "")


@pytest.mark.parametrize(
    ("replaced", "key"),
    [
        (as_it_stands, "OverlapLocalSGD|tau4|nest1|a0.6|g0.7"),
        (local_sgd, "LocalSGD|tau4|nest1|g0.7"),
        (easgd, "EASGD|tau4|nest1|a0.2"),
        (cocod_sgd, "CoCoDSGD|tau4|nest1"),
    ],
)
def test_the_papers_own_code(replaced: Callable[[str], str], key: str) -> None:
    ours = np.stack(run(paper, problem.WORKERS, replaced), axis=1)
    theirs = np.load(problem.REFERENCE / "original_lsq.npz")[f"lsq|{key}|const#x"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
