"""What 4 workers in lockstep compute, case by case: to be held to a record of it, bit for bit.

`python -m tests.laws.trajectories` writes the record anew.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distoptim import ALGORITHMS, QuarantineWarning
from distoptim.periods import AdaComm, HideCommunication, PostLocal, Schedule
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy

RECORD = Path(__file__).parents[1] / "reference" / "trajectories.npz"
WORKERS, STEPS = 4, 40
KEPT = (10, 20, 30, 40)
# Of a large x so many numbers are kept, evenly spread.
PICKED = 24
TABLE = Schedule({0: 2, 5: 4, 12: 3, 25: 5})
THREE = ("overlap-local-sgd", "diloco", "local-sgd")

Make = Callable[..., Any]
Hook = Callable[[Lockstep, int], object]


# Problems


@dataclass(frozen=True)
class Problem:
    """A quadratic whose minimum is another one on every worker."""

    start: list[Tensor]
    minima: list[list[Tensor]]

    def gradient(self, rank: int, params: list[Tensor]) -> list[Tensor]:
        return [
            (p - c) * (1 + 0.1 * i)
            for i, (p, c) in enumerate(zip(params, self.minima[rank], strict=True))
        ]


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Of a normal law; from numpy, whose stream is one on all machines."""
    random = np.random.RandomState(seed)
    x = torch.from_numpy(np.asarray(random.standard_normal(shape)))
    if dtype.is_complex:
        x = torch.complex(x, torch.from_numpy(np.asarray(random.standard_normal(shape))))
    x = x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def problem(shapes: Sequence[Sequence[int]], *dtypes: torch.dtype) -> Problem:
    """Parameters of these shapes, whose dtypes are these in turn."""
    start, *minima = [
        [numbers(shape, dtypes[i % len(dtypes)], 100 * k + i) for i, shape in enumerate(shapes)]
        for k in range(WORKERS + 1)
    ]
    return Problem(start, minima)


SMALL: list[tuple[int, ...]] = [(2, 3), (4,), ()]
# 5 blocks of a codec, so that a coded mean of 4 workers goes in two stages; alone the first does too.
LARGE: list[tuple[int, ...]] = [(37, 23), (17, 13), (129,)]
FLOAT64, FLOAT32 = problem(SMALL, torch.float64), problem(SMALL, torch.float32)
CODED = problem(LARGE, torch.float32)
COMPLEX, BFLOAT16 = problem(SMALL, torch.complex128), problem(SMALL, torch.bfloat16)
FLOAT16, MIXED = problem(SMALL, torch.float16), problem(SMALL, torch.bfloat16, torch.float32)
MIXED_WIDE = problem(SMALL, torch.float32, torch.float64)
CHANNELS_LAST = problem([(3, 2, 2, 3), (5,), (2, 3, 1, 2)], torch.float64)


# Runs


def go(
    make: Make,
    of: Problem = FLOAT64,
    *,
    before: Hook = lambda cluster, step: None,
    after: Hook = lambda cluster, step: None,
    gradient: Callable[..., list[Tensor]] | None = None,
    **told: Callable[[int], list[float]],
) -> Tensor:
    """[STEPS, WORKERS, dimension]: x after every step.

    Args:
        make: called as make(parameters, communicator=...) -> optimizer.
        before: called with the cluster and the number of each step, from 1, before it.
        after: likewise, behind the step's `average()`.
        gradient: of step, rank and parameters; default the problem's.
        told: what `average()` is, `losses` or `samples`: of the step, rank by rank.
    """
    cluster = Lockstep(make, [of.start] * WORKERS)
    out = []
    for step in range(1, STEPS + 1):
        before(cluster, step)
        cluster.step(
            of.gradient if gradient is None else partial(gradient, step),
            **{name: of_step(step) for name, of_step in told.items()},
        )
        after(cluster, step)
        out.append(cluster.x())
    return torch.stack(out)


def with_lr(table: Mapping[int, float]) -> Hook:
    """Sets these learning rates at these steps."""

    def set_lr(cluster: Lockstep, step: int) -> None:
        for optimizer in cluster.optimizers if step in table else ():
            for group in optimizer.param_groups:
                group["lr"] = table[step]

    return set_lr


def samples(step: int) -> list[float]:
    """Other numbers on every worker and at every step, now and then 0."""
    return [float((3 * rank + step) % 5) for rank in range(WORKERS)]


def losses(step: int) -> list[float]:
    """Such as fall and then are stuck."""
    return [(1 + 0.25 * rank) * max(0.85**step, 0.1) for rank in range(WORKERS)]


def quarantined(make: Make, at: int, of: Problem = FLOAT64) -> Tensor:
    """Worker 1 has gradients that are not finite at one step."""

    def gradient(step: int, rank: int, params: list[Tensor]) -> list[Tensor]:
        found = of.gradient(rank, params)
        return [torch.full_like(g, math.nan) for g in found] if (step, rank) == (at, 1) else found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuarantineWarning)
        return go(make, of, gradient=gradient)


def flushed(make: Make, at: int) -> Tensor:
    """`flush()` of one worker after the other; no more than a merge, at a step that has launched all there is."""
    return go(
        make,
        after=lambda cluster, step: [o.flush() for o in cluster.optimizers] if step == at else None,
    )


def inside(make: Make, inner: Make, **options: Any) -> Make:
    """The same algorithm around an inner optimizer, inner(parameters)."""
    given = {name: value for name, value in make.keywords.items() if name not in toy.OPTIONS}  # type: ignore[attr-defined]
    return lambda params, communicator: make.func(  # type: ignore[attr-defined]
        inner(params), communicator=communicator, **given, **options
    )


def grouped(make: Make) -> Make:
    """Two param groups, of different learning rates and with one momentum of their own."""
    return lambda params, communicator: make(
        [{"params": params[:1], "lr": 0.07}, {"params": params[1:], "lr": 0.02, "momentum": 0.5}],
        communicator=communicator,
    )


def in_parts(make: Make) -> Make:
    """Fragments that are given one by one."""
    return lambda params, communicator: make(
        params, communicator=communicator, fragments=[[params[1]], [params[2], params[0]]]
    )


def partly_frozen(make: Make) -> Make:
    """The second parameter is left out."""

    def start(params: Any, communicator: Any) -> Any:
        params[1].requires_grad_(False)
        return make(params, communicator=communicator)

    return start


def thawed(make: Make, of: Problem = FLOAT64) -> Tensor:
    """With one frozen parameter, which stays."""

    def gradient(step: int, rank: int, params: list[Tensor]) -> list[Tensor]:
        return [
            g if i != 1 else torch.zeros_like(g) for i, g in enumerate(of.gradient(rank, params))
        ]

    return go(partly_frozen(make), of, gradient=gradient)


def resumed(
    make: Make, then: Make, *, at: int = 17, workers: int = WORKERS, of: Problem = FLOAT64
) -> Tensor:
    """Saved by so many workers after a step and loaded into another cluster; workers that are not there are 0."""
    first = Lockstep(make, [of.start] * workers)
    x = first.run(at, of.gradient)
    second = Lockstep(then, [[torch.zeros_like(p) for p in of.start]] * WORKERS)
    for rank, (optimizer, params) in enumerate(zip(second.optimizers, second.params, strict=True)):
        with torch.no_grad():
            torch._foreach_copy_(list(params), [p.detach() for p in first.params[rank % workers]])
        optimizer.load_state_dict(copy.deepcopy(first.optimizers[rank % workers].state_dict()))
    missing = torch.zeros(at, WORKERS - workers, x.shape[-1], dtype=x.dtype)
    return torch.cat([torch.cat([x, missing], 1), second.run(STEPS - at, of.gradient)])


def makers(
    *,
    tau: int = 3,
    delays: Sequence[int] = (0, 3),
    fragments: tuple[int, ...] = (1,),
    extra: bool = False,
    same: bool = False,
) -> dict[str, Make]:
    """Algorithms at some of the delays they have, by name.

    Args:
        tau: local steps in a round.
        delays: those.
        fragments: numbers of them.
        extra: whether those of the toy's table too.
        same: whether also those that compute what another does, CoCoD-SGD and EASGD that waits.
    """
    out = {}
    for label, make in toy.variants(tau, fragments).items():
        parts = re.fullmatch(r"(.*)-delay(\d+)-fragments\d+", label)
        assert parts is not None, label
        name, delay = parts[1], int(parts[2])
        if (
            delay in delays
            and (extra or name in ALGORITHMS)
            and (same or (name != "cocod-sgd" and (name, delay) != ("easgd", 0)))
        ):
            # As they are handed over; its default has a codec where that can be.
            out[label] = partial(make, codec=None) if name == "global-momentum" else make
    return out


# Away from the defaults.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha": ("overlap-local-sgd", {"alpha": 0.3, "gmf": 0.2}),
    "alpha 0": ("overlap-local-sgd", {"alpha": 0}),
    "alpha 1": ("overlap-local-sgd", {"alpha": 1, "delay": 0}),
    "delay 2 of 5": ("overlap-local-sgd", {"tau": 5, "delay": 2, "fragments": 3}),
    "elastic": ("easgd", {"alpha": 0.3}),
    "block": (
        "bmuf",
        {"block_momentum": 0.5, "block_lr": 0.7, "nesterov_block": True, "delay": 2, "carry": True},
    ),
    "block without momentum": ("bmuf", {"block_momentum": 0}),
    "slow": ("slowmo", {"slow_momentum": 0.4, "slow_lr": 0.5}),
    "slow without momentum": ("slowmo", {"slow_momentum": 0, "delay": 1, "carry": True}),
    "classic": ("diloco", {"outer_nesterov": False, "outer_lr": 0.3}),
    "outer without momentum": ("diloco", {"outer_momentum": 0, "outer_lr": 0.8}),
    "local weight": ("diloco", {"local_weight": 0.3, "delay": 2}),
    "outer SGD": (
        "diloco",
        {"outer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ),
    "outer Adam": (
        "streaming-diloco",
        {"outer": partial(torch.optim.Adam, lr=0.1), "fragments": 3, "delay": 2},
    ),
    "outer AdamW": (
        "diloco",
        {"outer": partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.95)), "fragments": 2},
    ),
    "streaming without local weight": (
        "streaming-diloco",
        {"local_weight": 0, "delay": 0, "fragments": 3},
    ),
    "eager classic": ("eager-diloco", {"outer_nesterov": False, "outer_momentum": 0.5}),
    "eager without momentum": ("eager-diloco", {"outer_momentum": 0}),
    "clipped": ("co2", {"clip": 0.01}),
    "co2 without momentum": ("co2", {"outer_momentum": 0, "outer_lr": 0.5}),
    "gain 1": ("overlap-bmuf", {"gain": 1, "block_momentum": 0.3}),
    "gain without momentum": ("overlap-bmuf", {"block_momentum": 0, "gain": 0.25}),
    "tau 1": ("cocod-sgd", {"tau": 1}),
    "tau 1 blocking": ("local-sgd", {"tau": 1}),
    "tau 50": ("overlap-local-sgd", {"tau": 50}),
    "inner": ("overlap-local-sgd", {"nesterov": False, "dampening": 0.2, "weight_decay": 0.01}),
    "tensor lr": ("overlap-local-sgd", {"lr": torch.tensor(0.05)}),
}


def cases() -> dict[str, Callable[[], Tensor]]:
    """Name -> the trajectory. The first word of a name says how tightly it is to be compared: see `bound`."""
    out = {}
    for word, name, case in _cases():
        key = f"{word}: {name}"
        assert key not in out, key
        out[key] = case
    return out


def _cases() -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    for name, make in makers(delays=(0, 1, 3), fragments=(1, 3), extra=True, same=True).items():
        yield "exact", f"plain {name}", partial(go, make)
    for label, (name, options) in SETTINGS.items():
        yield (
            "exact",
            f"settings {name} {label}",
            partial(go, partial(ALGORITHMS[name], **{**toy.OPTIONS, "tau": 3, **options})),
        )
    yield from _coded()
    yield from _periods()
    yield from _inner()
    yield from _dtypes()
    for name, make in makers(extra=True).items():
        yield "exact", f"sick {name}", partial(quarantined, make, 15)
    for name, make in makers(delays=(3,)).items():
        yield "exact", f"sick in mid-round {name}", partial(quarantined, make, 14)
        yield "exact", f"flushed {name}", partial(flushed, make, 18)
    for name in ALGORITHMS:
        three, five = (partial(ALGORITHMS[name], tau=tau, **toy.OPTIONS) for tau in (3, 5))
        yield "exact", f"resumed with another tau {name}", partial(resumed, three, five)
        yield "exact", f"resumed by other workers {name}", partial(resumed, three, three, workers=3)
    for name in THREE:
        make = partial(ALGORITHMS[name], tau=6, codec="int8+ef", **toy.OPTIONS)
        yield (
            "int8+ef",
            f"resumed by other workers {name}",
            partial(resumed, make, make, workers=3, of=CODED),
        )


def _coded() -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    for name, make in makers(tau=6, delays=(0, 6), fragments=(1, 3)).items():
        for codec in ("int8+ef", "2bit+ef"):
            yield codec, f"large {name}", partial(go, partial(make, codec=codec), CODED)
    for name, make in makers(tau=6, delays=(6,)).items():
        yield "int8+ef", f"small {name}", partial(go, partial(make, codec="int8+ef"), FLOAT32)
    for name in THREE:
        make = partial(ALGORITHMS[name], tau=6, **toy.OPTIONS)
        for codec in ("e3m0", "bf16", "int8", "2bit", "e3m0+ef", "1bit"):
            if name == THREE[0]:
                yield (
                    codec,
                    f"large {name} fragments2",
                    partial(go, partial(make, codec=codec, fragments=2), CODED),
                )
        for codec in ("2bit+ef", "e3m0", "bf16", "1bit+ef"):
            yield (
                codec,
                f"small {name} fragments3",
                partial(go, partial(make, codec=codec, fragments=3), FLOAT32),
            )
        make = partial(make, codec="int8+ef")
        yield "int8+ef", f"samples {name}", partial(go, make, CODED, samples=samples)
        yield "int8+ef", f"sick {name}", partial(quarantined, make, 18, CODED)
        yield "int8+ef", f"half precision {name}", partial(go, make, BFLOAT16)


def _periods() -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    later = PostLocal(start=5, tau=3)
    for name, algorithm in ALGORITHMS.items():
        make = partial(algorithm, **toy.OPTIONS)
        yield (
            "exact",
            f"schedule {name} fragments2",
            partial(go, partial(make, tau=TABLE, fragments=2)),
        )
        yield (
            "exact",
            f"post-local {name} fragments3",
            partial(go, partial(make, tau=later, fragments=3)),
        )
        yield (
            "exact",
            f"post-local schedule {name}",
            partial(go, partial(make, tau=PostLocal(start=4, tau=TABLE))),
        )
        yield (
            "exact",
            f"adacomm {name}",
            partial(go, partial(make, tau=AdaComm(4, interval=4)), losses=losses),
        )
        yield (
            "exact",
            f"samples {name}",
            partial(go, partial(make, tau=3, fragments=2), samples=samples),
        )
    for name in THREE:
        make = partial(ALGORITHMS[name], **toy.OPTIONS)
        yield (
            "exact",
            f"adacomm follows lr {name}",
            partial(
                go,
                partial(make, tau=AdaComm(3, interval=3, follow_lr=True)),
                losses=losses,
                before=with_lr({1: 0.02, 5: 0.1, 20: 0.01}),
            ),
        )
        yield (
            "exact",
            f"adacomm after post-local, with samples {name}",
            partial(
                go,
                partial(make, tau=PostLocal(start=6, tau=AdaComm(4, interval=2))),
                losses=losses,
                samples=samples,
            ),
        )
        yield (
            "int8+ef",
            f"adacomm {name}",
            partial(
                go,
                partial(make, tau=AdaComm(6, interval=6), codec="int8+ef"),
                CODED,
                losses=losses,
            ),
        )
        yield (
            "int8+ef",
            f"post-local {name}",
            partial(
                go,
                partial(make, tau=PostLocal(start=5, tau=6), codec="int8+ef", fragments=2),
                CODED,
            ),
        )
        yield (
            "exact",
            f"schedule as a mapping {name}",
            partial(go, partial(make, tau={0: 3, 10: 6}, fragments=3)),
        )
        yield (
            "exact",
            f"schedule at a delay {name}",
            partial(
                go,
                partial(make, tau=TABLE, delay=1, **({} if name != "diloco" else {"carry": True})),
            ),
        )
    yield (
        "exact",
        "hide overlap-local-sgd",
        partial(
            go,
            partial(
                ALGORITHMS["overlap-local-sgd"], tau=HideCommunication(smallest=2), **toy.OPTIONS
            ),
        ),
    )


def _inner() -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    table = with_lr({7: 0.05, 13: 0.0, 19: 0.02})
    for name, make in makers(extra=True).items():
        yield "exact", f"lr {name}", partial(go, make, before=table)
    for name, make in makers(delays=(3,)).items():
        yield (
            "exact",
            f"two groups {name}",
            partial(go, grouped(make), before=with_lr({11: 0.03, 23: 0.01})),
        )
        yield "exact", f"reset {name}", partial(go, partial(make, reset_inner=True))
    for name, make in makers(same=True).items():
        if "delay3" in name or name.startswith(THREE):
            yield (
                "exact",
                f"AdamW {name}",
                partial(go, inside(make, partial(torch.optim.AdamW, lr=0.05))),
            )
    for name, make in makers(delays=(3,), fragments=(2,)).items():
        yield "exact", f"strided {name}", partial(go, partial(make, pattern="strided"))
    for name in THREE:
        make = partial(ALGORITHMS[name], tau=3, **toy.OPTIONS)
        yield (
            "exact",
            f"reset AdamW {name}",
            partial(go, inside(make, partial(torch.optim.AdamW, lr=0.05), reset_inner=True)),
        )
        yield "exact", f"parts {name}", partial(go, in_parts(make))
        yield "exact", f"frozen {name}", partial(thawed, make)


def _dtypes() -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    for name, make in makers(delays=(3,)).items():
        yield "half", f"bfloat16 {name}", partial(go, make, BFLOAT16)
        yield "exact", f"complex {name}", partial(go, make, COMPLEX)
        yield "exact", f"channels last {name}", partial(go, make, CHANNELS_LAST)
    for name, make in makers(delays=(3,), fragments=(3,)).items():
        yield "single", f"float32 {name}", partial(go, make, FLOAT32)
    for name in THREE:
        make = partial(ALGORITHMS[name], tau=3, **toy.OPTIONS)
        yield "half", f"float16 {name}", partial(go, make, FLOAT16)
        yield "half", f"bfloat16 and float32 {name}", partial(go, make, MIXED)
        yield "single", f"float32 and float64 {name}", partial(go, make, MIXED_WIDE)


# A share of them


def share(names: Iterable[str]) -> list[str]:
    """Of the cases those that the suite checks at every call, less than a third.

    Greedily, until every kind of case has been met with every word in front, and every algorithm with
    every word, delay and number of fragments that there is with it.
    """
    missing = {name: _pairs(name) for name in names}
    met: set[tuple[str, str]] = set()
    chosen = []
    while best := max(missing, key=lambda name: len(missing[name] - met), default=None):
        if not missing[best] - met:
            break
        met |= missing.pop(best)
        chosen.append(best)
    return chosen


def _pairs(name: str) -> set[tuple[str, str]]:
    word, rest = name.split(": ")
    named = [algorithm for algorithm in (*ALGORITHMS, *toy.EXTRA) if f" {algorithm}" in rest]
    algorithm = max(named, key=len)
    numbers = re.findall(r"(?:delay|fragments)\d", rest)
    kind = re.sub(r"-?(delay|fragments)\d", "", rest.replace(algorithm, ""))
    return {(kind, word), (algorithm, word), *((algorithm, number) for number in numbers)}


# Records

# Where rounding may fall otherwise on another machine, or a code on the other side: (rtol, atol).
BOUNDS = {
    "exact": (1e-12, 1e-12),
    "single": (1e-6, 1e-6),
    "half": (0.02, 0.02),
    "bf16": (0.02, 0.02),
    "int8": (0.05, 0.05),
    "e3m0": (0.5, 0.5),
    "2bit": (1.0, 1.0),
    "1bit": (1.0, 1.0),
}


def bound(name: str) -> tuple[float, float]:
    """Relative and absolute, of a case's values on a machine or with a torch that did not record them."""
    return BOUNDS[name.partition(":")[0].removesuffix("+ef")]


def digest(x: Tensor) -> str:
    """Of its bits; every NaN counts as the same."""
    x = _real(x)
    x = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def kept(x: Tensor) -> np.ndarray[Any, Any]:
    """What a record holds of the values, half precision as float32."""
    x = _real(x[[step - 1 for step in KEPT]]).reshape(len(KEPT), WORKERS, -1)
    if x.shape[-1] > PICKED + PICKED // 2:
        x = x[..., torch.linspace(0, x.shape[-1] - 1, PICKED).long()]
    return (x.float() if x.element_size() == 2 else x).numpy()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def environment() -> list[str]:
    """On which the last bits may depend."""
    return [str(torch.__version__), torch.backends.cpu.get_cpu_capability()]


def record(path: str | Path, trajectories: Mapping[str, Tensor]) -> None:
    """Write digests and values."""
    arrays: dict[str, Any] = {f"x{i}": kept(x) for i, x in enumerate(trajectories.values())}
    np.savez_compressed(
        path,
        environment=np.array(environment()),
        names=np.array(list(trajectories)),
        digests=np.array([digest(x) for x in trajectories.values()]),
        **arrays,
    )


class Record:
    """What was recorded."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            names = [str(name) for name in arrays["names"]]
            self.environment = [str(fact) for fact in arrays["environment"]]
            self.digests = dict(zip(names, map(str, arrays["digests"]), strict=True))
            self.values = {name: arrays[f"x{i}"] for i, name in enumerate(names)}

    def check(self, name: str, x: Tensor, *, bit_equal: bool) -> None:
        """Whether a trajectory is the recorded one.

        Args:
            name: of the case.
            x: [steps, workers, dimension].
            bit_equal: demand it of every bit; else of the codes' where environments are equal, and a bound elsewhere.
        """
        coded = name.partition(":")[0] not in ("exact", "single", "half")
        same = digest(x) == self.digests[name]
        rtol, atol = bound(name)
        np.testing.assert_allclose(kept(x), self.values[name], rtol=rtol, atol=atol, err_msg=name)
        if bit_equal or (coded and self.environment == environment()):
            assert same, (
                f"{name}: within the bound at the steps kept, but not bit-equal to the record"
            )


def main(path: str | Path = RECORD) -> None:
    torch.set_num_threads(1)
    record(path, {name: case() for name, case in cases().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
