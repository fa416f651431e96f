"""What holds for every algorithm beside `levels=`, at every delay and split.

Over real gloo processes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distoptim
from distoptim.comm import Handle, ProcessGroupCommunicator, connect
from distoptim.periods import PostLocal, Schedule
from distoptim.testing.inspection import inspect
from distoptim.testing.lockstep import Lockstep
from distoptim.testing.processes import run
from tests.helpers import toy
from tests.helpers.share import ALL, share

TAU, STEPS, STOPS = 4, 12, (5, 8, 10)
MAKERS = toy.variants(tau=TAU, fragments=(2,))
PAIRS, CROSSED, ALONE = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]
LEVELS = {
    "pairs": {2: PAIRS},
    "two levels": {1: PAIRS, 2: CROSSED},
    "alone": {1: ALONE, 2: ALONE},
    "none": {},
}
# More than one level, which costs many messages, at one delay of each.
KINDS = {
    name: ["pairs", "alone", "none", *["two levels"] * (f"delay{TAU}" in name)]
    for name in (MAKERS if ALL else toy.diagonal(MAKERS))
}
# What all algorithms take and a plain loop would have to repeat; with each of them what two workers
# share and resume.
OPTIONS: dict[str, dict[str, Any]] = {
    "codec": {"tau": TAU, "codec": "int8+ef", "fragments": 2, "pattern": "strided"},
    "phases": {"tau": PostLocal(start=3, tau=Schedule({0: 4, 9: 2 * TAU})), "reset_inner": True},
    "samples": {"tau": Schedule({0: 4, 6: 6}), "fragments": 2},
}
OPTIONED = {
    f"{name}, {option}": partial(algorithm, **{**toy.OPTIONS, **OPTIONS[option]})
    for i, (name, algorithm) in enumerate(distoptim.ALGORITHMS.items())
    for option in share(OPTIONS, of=3, turn=i)
}
# What a worker keeps of its own, until the next launch or for good; the members of a group have it
# in common.
OWN = ("sent", "base", "own")


class Recorder(ProcessGroupCommunicator):
    """Remembers what it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []

    def all_reduce(self, buffer: Tensor) -> Handle:
        self.sent.append(buffer.clone())
        return super().all_reduce(buffer)


def memory(optimizer: Any, *, own: bool) -> Tensor:
    """The algorithm's states: the workers' own parts of them, or the rest."""
    view = inspect(optimizer)
    assert all(name in OWN for part in view.fragments for name in part.own)
    found = view.own() if own else view.shared()
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(x.double() for x in found)])


class Worker:
    """One of the four, over the same process groups again and again."""

    def __init__(self, rank: int) -> None:
        self.rank, self.communicator = rank, Recorder()
        self.groups = {
            str(groups): [dist.new_group(ranks) for ranks in groups][
                next(i for i, ranks in enumerate(groups) if rank in ranks)
            ]
            for groups in (PAIRS, CROSSED, ALONE)
        }

    def start(
        self, make: Any, levels: Any, value: float = 0.0
    ) -> tuple[list[torch.nn.Parameter], Any]:
        dtype = torch.float32 if "codec" in make.keywords else torch.float64
        params = [torch.nn.Parameter(p + value) for p in toy.start(dtype)]
        groups = {period: self.groups[str(ranks)] for period, ranks in levels.items()}
        return params, make(params, levels=groups, communicator=self.communicator)

    def train(
        self,
        params: Any,
        optimizer: Any,
        steps: range,
        *,
        samples: bool = False,
        stops: Sequence[int] = (),
    ) -> tuple[dict[str, Tensor], dict[int, bytes]]:
        """What came of these local steps, and files saved after some of them."""
        found: dict[str, list[Tensor]] = {"x": [], "shared": [], "own": []}
        saved = {}
        self.communicator.sent.clear()
        for step in steps:
            for p, g in zip(
                params, toy.gradient(self.rank, [p.detach() for p in params]), strict=True
            ):
                p.grad = g
            optimizer.step()
            optimizer.average(samples=1.0 + self.rank * (step % 3) if samples else None)
            found["x"].append(torch.cat([p.detach().reshape(-1) for p in params]))
            for name, own in (("shared", False), ("own", True)):
                found[name].append(memory(optimizer, own=own))
            if step in stops:
                file = io.BytesIO()
                torch.save(
                    {"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()},
                    file,
                )
                saved[step] = file.getvalue()
        # Saving waits for what is in flight, which the next optimizer's groups would meet.
        optimizer.state_dict()
        sent = torch.cat([torch.zeros(0), *self.communicator.sent])
        return {
            "x": torch.stack(found.pop("x")),
            "sent": sent,
            **{name: torch.cat(rows) for name, rows in found.items()},
        }, saved

    def resume(
        self, make: Any, levels: Any, stop: int, file: bytes, samples: bool
    ) -> dict[str, Tensor]:
        saved = torch.load(io.BytesIO(file), weights_only=True)
        params, optimizer = self.start(make, levels, value=7.0)
        with torch.no_grad():
            torch._foreach_copy_(params, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return self.train(params, optimizer, range(stop + 1, STEPS + 1), samples=samples)[0]


# Making and leaving process groups would take most of the time.
@patch("distoptim.engine.hierarchy.connect", cache(connect))
def everything(rank: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    worker, out = Worker(rank), {}
    for i, name in enumerate([*KINDS, *OPTIONED]):
        make = {**MAKERS, **OPTIONED}[name]
        samples, pairs = "samples" in name, LEVELS["pairs"]
        stops = share(STOPS, of=3, turn=i)
        out[name, "pairs"], saved = worker.train(
            *worker.start(make, pairs), range(1, STEPS + 1), samples=samples, stops=stops
        )
        for stop in stops:
            out[name, f"from {stop}"] = worker.resume(make, pairs, stop, saved[stop], samples)
        for kind in KINDS.get(name, [])[1:]:
            out[name, kind], _ = worker.train(
                *worker.start(make, LEVELS[kind]), range(1, STEPS + 1)
            )
    worker.communicator.close()
    return out


@pytest.fixture(scope="module")
def results():
    """(name, kind) -> x, states and what was sent: of every worker."""
    found = run(everything, toy.WORKERS, timeout_s=180.0)
    return {
        key: {
            part: torch.stack([result[key][part] for result in found], -2) for part in found[0][key]
        }
        for key in found[0]
    }


def by_definition(make: Any, levels: dict[int, list[list[int]]]) -> Tensor:
    """x of virtual workers that know nothing of levels.

    The test averages the groups' parameters before `average()`.
    """
    workers = Lockstep(make, [toy.start()] * toy.WORKERS)
    fragments = [view.fragments for view in workers.views()]
    out = []
    for step in range(1, STEPS + 1):
        workers.local_step(toy.gradient)
        for period, groups in levels.items():
            for ranks in groups:
                for same in zip(*(fragments[rank] for rank in ranks), strict=True):
                    if (step - same[0].offset) % period == 0:
                        for params in zip(*(fragment.params for fragment in same), strict=True):
                            mean = torch.stack([p.detach() for p in params]).mean(0)
                            with torch.no_grad():
                                torch._foreach_copy_(list(params), [mean] * len(params))
        workers.average()
        out.append(workers.x())
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, kinds in KINDS.items()
        for kind in kinds
        if kind in ("pairs", "two levels")
    ],
)
def test_groups_average_before_the_algorithm_does_what_it_does_without(results, name, kind):
    expected = by_definition(MAKERS[name], LEVELS[kind])
    torch.testing.assert_close(results[name, kind]["x"], expected, rtol=0, atol=1e-12)
    # That is not what they do without.
    assert not torch.allclose(results[name, "none"]["x"], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_groups_of_one_change_nothing(results, name):
    for part, value in results[name, "none"].items():
        assert torch.equal(results[name, "alone"][part], value), part


@pytest.mark.parametrize("name", KINDS)
def test_members_of_a_group_send_the_same(results, name):
    sent = results[name, "pairs"]["sent"]
    assert torch.equal(sent[::2], sent[1::2])
    assert not torch.equal(sent[0], sent[2])
    assert not torch.equal(results[name, "none"]["sent"][0], results[name, "none"]["sent"][1])


@pytest.mark.parametrize("name", [*KINDS, *OPTIONED])
def test_anchors_and_outer_states_are_bit_equal_on_all_workers_and_the_rest_inside_groups(
    results, name
):
    found = results[name, "pairs"]
    shared = found["shared"].unbind(-2)
    assert all(torch.equal(state, shared[0]) for state in shared)
    own = found["own"].unbind(-2)
    assert torch.equal(own[0], own[1])
    assert torch.equal(own[2], own[3])
    assert torch.isfinite(found["x"]).all()
    # Each algorithm remembers something, but for a mean that is adopted at once.
    assert (
        found["shared"].numel()
        or found["own"].numel()
        or name.startswith(("local-sgd", "cocod-sgd-delay0"))
    )


@pytest.mark.parametrize("name", [*KINDS, *OPTIONED])
def test_resumed_in_flight_they_go_on_bit_equally(results, name):
    stops = [stop for stop in STOPS if (name, f"from {stop}") in results]
    assert stops
    for stop in stops:
        assert torch.equal(
            results[name, f"from {stop}"]["x"], results[name, "pairs"]["x"][stop:]
        ), stop
