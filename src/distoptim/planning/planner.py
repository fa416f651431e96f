"""What will pay.

Seconds per step of every algorithm and tau on a given link, and one recommendation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from distoptim import checks
from distoptim.algorithms import ALGORITHMS
from distoptim.comm.codecs import CODECS as _CODECS
from distoptim.fragments import Flat
from distoptim.optimizer import AveragingOptimizer
from distoptim.planning.studied import below, inner_optimizers
from distoptim.settings import Params
from distoptim.simulator.cluster import Cluster
from distoptim.simulator.compute import Constant
from distoptim.simulator.fabric import VirtualCommunicator
from distoptim.simulator.network import Gloo, Network

TAUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Periods offered; more local steps than that are rarely trained with."""

FURTHER_TAUS = (512, 1024, 2048, 4096)
"""Periods offered where none of `TAUS` hides the link."""

CODECS = ("int8", "e3m0")
"""Offered where a period would be longer than `MANY` local steps; the mildest first."""

MANY = 64
"""From more local steps in a round on, sending fewer bytes is the lesser evil."""

CLOSE = 1.05
"""Settings up to 5 % slower than the fastest count as equally fast: then the smaller tau trains better."""

FRAGMENTED = "streaming-diloco"
MOST_FRAGMENTS = 64
"""Messages of a round that are offered."""

# Of DDP: each but the first.
_BUCKET_BYTES = 25 * 2**20
_FIRST_BUCKET_BYTES = 2**20
# Collectives of one group, as many as it has threads.
_AT_ONCE = 2
_BACKWARD = 2 / 3
_ELEMENT_BYTES = 4
# From the third round on all are alike: longer runs differ by their rounding.
_FIRST_ROUNDS = 2
_ROUNDS = 2


@dataclass(frozen=True)
class Island:
    """Ranks that are joined by a faster link, as of one host, and may be one worker together.

    Args:
        size: how many, >= 2.
        network: what a mean inside costs.

    Raises:
        ValueError: a value outside its range.
    """

    size: int
    network: Network

    def __post_init__(self) -> None:
        """Check the range."""
        checks.integer("size of an island", self.size, 2)


@dataclass(frozen=True)
class Job:
    """What is to be planned.

    Args:
        step_s: seconds of one local step without communication, > 0.
        params: number of parameters, >= 1; they travel as float32.
        workers: >= 1; with islands, how many of these.
        network: what a mean costs; with islands, among them, all ranks of one sharing its link.
        island: what each of the workers is made of; None: of one rank.
        speeds: of the workers, > 0, in turn where there are more workers: a local step takes step_s / speed.

    Raises:
        ValueError: a value outside its range.
    """

    step_s: float
    params: int
    workers: int
    network: Network
    speeds: tuple[float, ...] = ()
    island: Island | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for speed in self.speeds:
            checks.number("speed", speed, 0, math.inf, open_low=True, open_high=True)
        checks.number("step_s", self.step_s, 0, math.inf, open_low=True, open_high=True)
        checks.integer("params", self.params, 1)
        checks.integer("workers", self.workers, 1)

    def at(self, speed: float) -> Job:
        """The same where all workers have this speed."""
        return replace(self, step_s=self.step_s / speed, speeds=())

    @property
    def each_speed(self) -> list[float]:
        """Worker by worker."""
        speeds = self.speeds or (1.0,)
        return [speeds[i % len(speeds)] for i in range(self.workers)]

    @property
    def of_ranks(self) -> Job:
        """The same where every rank is a worker."""
        if self.island is None:
            return self
        size = self.island.size
        speeds = tuple(speed for speed in self.each_speed for _ in range(size))
        return replace(self, workers=size * self.workers, speeds=speeds, island=None)

    @property
    def of_islands(self) -> Job:
        """The same where every island trains as one worker, with DDP inside."""
        if self.island is None:
            return self
        inside = replace(
            self, workers=self.island.size, network=self.island.network, island=None, speeds=()
        )
        return replace(self, step_s=_ddp(inside).step_s)

    def nbytes(self, codec: str | None = None) -> int:
        """Of one mean, in a codec of `distoptim.comm.codecs`, by its name."""
        return _ELEMENT_BYTES * self.params if codec is None else _CODECS[codec].nbytes(self.params)

    def all_reduce_s(self, nbytes: float) -> float:
        """Seconds of one mean."""
        return self.network.all_reduce_s(nbytes, self.workers) if self.workers > 1 else 0.0


@dataclass(frozen=True)
class Prediction:
    """One setting.

    Attributes:
        algorithm: its name in `ALGORITHMS`, or "ddp".
        tau: local steps in a round.
        step_s: seconds per local step, communication included.
        speed_up: over DDP.
        exposed_share: exposed communication / computation, which what an island's ranks wait for each
            other is part of.
        copies: memory beyond the model and its inner optimizer, in float32 copies of the model.
        gbytes: the same in 10^9 bytes; of an island whose ranks hold shards, of all together.
        gbytes_per_hour: payload per worker and hour, in 10^9 bytes.
        codec: in which means travel; None: float32. Its time on the processor is not counted.
        fragments: messages in which a round's mean is cut.
        round_s: of rounds of equal time (`EqualTime`), in which a worker makes tau steps on the mean.
        ranks: that are one worker, an island.
    """

    algorithm: str
    tau: int
    step_s: float
    speed_up: float
    exposed_share: float
    copies: float
    gbytes: float
    gbytes_per_hour: float
    codec: str | None = None
    fragments: int = 1
    round_s: float | None = None
    ranks: int = 1

    @property
    def hidden(self) -> bool:
        """Whether so little is exposed that nothing could be more than 5 % faster."""
        return self.exposed_share <= CLOSE - 1


@dataclass(frozen=True)
class Plan:
    """All predictions, fastest first within an algorithm, and what to take.

    Attributes:
        best: the recommended setting.
        line: the line of code for it.
        reason: why, in one sentence.
    """

    predictions: list[Prediction]
    best: Prediction
    line: str
    reason: str

    def as_dict(self) -> dict[str, object]:
        """As JSON can hold it, for `--json`."""
        return asdict(self)


def plan(
    job: Job,
    *,
    algorithms: Sequence[str] | None = None,
    taus: Sequence[int] | None = None,
    codecs: Sequence[str] | None = None,
    inner: str = "sgd",
) -> Plan:
    """Predict every setting and choose one.

    Chosen is, of the settings within 5 % of the fastest, DDP if it is among them, else the one with
    the smallest tau, since workers drift apart for tau steps. Of equals it is the algorithm that
    comes first; by default the one that ended least below DDP in the studies with this inner
    optimizer, at a tau like this (`planning.studied`).
    With one tau every round lasts as long as on the slowest worker; where speeds differ, rounds of equal
    time are offered as well, which last as long as on machines of the mean speed.
    Of islands every rank may be a worker, or every island with DDP inside; DDP is over all ranks, on the link
    among islands.
    Where that is more than `MANY` local steps, `CODECS` are offered too, and where none of `TAUS`
    hides the link, `FURTHER_TAUS`; by default only with the best two that hide a round.

    Args:
        job: the model, the machines and their link.
        algorithms: names in `ALGORITHMS`; default all.
        taus: the periods offered, and no others; default `TAUS`.
        codecs: names in `distoptim.comm.codecs.CODECS`, offered beside none at every tau, and no others;
            default `CODECS` where periods are long.
        inner: the inner optimizer, "sgd" or "adamw".

    Raises:
        ValueError: an unknown algorithm or codec, or a tau below 1.
    """
    names = list(dict.fromkeys(ALGORITHMS if algorithms is None else algorithms))
    for name in names:
        if name not in ALGORITHMS:
            raise ValueError(f"algorithm {name!r}: allowed are {', '.join(ALGORITHMS)}")
    for codec in codecs or ():
        if codec not in _CODECS:
            raise ValueError(f"codec {codec!r}: allowed are {', '.join(_CODECS)}")
    if inner not in inner_optimizers():
        raise ValueError(f"inner={inner!r}: allowed are {', '.join(inner_optimizers())}")
    offered = [checks.integer("tau", tau, 1) for tau in (TAUS if taus is None else taus)]
    ddp = _ddp(job.of_ranks.at(min(job.each_speed)))
    predictions = [ddp]
    for name in names:
        for each in (None, *(codecs or ())):
            predictions += _offers(job, name, offered, ddp.step_s, each)
    studied = inner if algorithms is None else None
    best = _best(predictions, studied)
    if best.tau > MANY and codecs is None:
        further = () if taus is not None or best.hidden else FURTHER_TAUS
        few = names if algorithms is not None else _hiding(inner)
        predictions += _further(job, few, offered, further, ddp.step_s)
        best = _best(predictions, studied)
    return Plan(predictions, best, _line(best), _reason(best, predictions, studied))


def _hiding(inner: str) -> list[str]:
    """The two best of those that hide a whole round by default."""
    return [name for name in below(inner, MANY) if _hides_a_round(name)][:2]


def _further(
    job: Job, names: Sequence[str], taus: Sequence[int], further: Sequence[int], ddp_s: float
) -> list[Prediction]:
    """Longer periods, and all of them with fewer bytes."""
    found: list[Prediction] = []
    for name in names:
        found += _offers(job, name, further, ddp_s)
        for codec in CODECS:
            found += _offers(job, name, (*taus, *further), ddp_s, codec)
    return found


def _offers(
    job: Job, name: str, taus: Sequence[int], ddp_s: float, codec: str | None = None
) -> list[Prediction]:
    """Every rank as a worker and, where there are some, every island."""
    found = _of_workers(job.of_ranks, name, taus, ddp_s, codec)
    if job.island is None:
        return found
    islands = _of_workers(job.of_islands, name, taus, ddp_s, codec)
    return found + [replace(p, ranks=job.island.size) for p in islands]


def _of_workers(
    job: Job, name: str, taus: Sequence[int], ddp_s: float, codec: str | None
) -> list[Prediction]:
    """Each tau on all workers, and rounds of equal time with as many steps on the mean."""
    speeds = job.each_speed
    slowest = job.at(min(speeds))
    found = [_predict(slowest, name, tau, ddp_s, codec) for tau in taus]
    if min(speeds) == max(speeds) or not _may_be_timed(name):
        return found
    usual = job.at(sum(speeds) / len(speeds))
    for tau in taus:
        # Below that the slowest worker's single step takes longer than a round.
        if tau * usual.step_s >= slowest.step_s:
            made = _predict(usual, name, tau, ddp_s, codec)
            found.append(replace(made, round_s=tau * usual.step_s))
    return found


def _may_be_timed(name: str) -> bool:
    """Whether the algorithm takes `EqualTime`: in one message, blocking or over a whole round."""
    delay = inspect.signature(ALGORITHMS[name]).parameters["delay"].default
    return delay in (None, 0) and name != FRAGMENTED


def _best(predictions: Sequence[Prediction], inner: str | None) -> Prediction:
    """See `plan`; without an inner optimizer, of equals the first."""
    fastest = min(p.step_s for p in predictions)
    close = [p for p in predictions if p.step_s <= CLOSE * fastest]
    codecs = list(dict.fromkeys(p.codec for p in predictions))
    return min(
        close,
        key=lambda p: (
            p.algorithm != "ddp",
            p.tau,
            codecs.index(p.codec),
            below(inner, p.tau).get(p.algorithm, math.inf) if inner else 0.0,
        ),
    )


def _ddp(job: Job) -> Prediction:
    """DDP sends gradients in buckets as the backward pass, 2/3 of a step, makes them ready.

    gloo works on `_AT_ONCE` of them at once, which share the link but not the round trips.
    """
    network = job.network
    lanes = [0.0]
    if isinstance(network, Gloo):
        # DDP knows no streams.
        network = replace(network, streams=1)
        lanes = [0.0] * _AT_ONCE
    one = replace(job, network=network)
    sent = 0
    link_free = 0.0
    for nbytes in _buckets(job.nbytes()):
        sent += nbytes
        ready = job.step_s * (1 - _BACKWARD + _BACKWARD * sent / job.nbytes())
        lane = lanes.index(min(lanes))
        start = max(ready, lanes[lane])
        alone_s = one.all_reduce_s(nbytes)
        link_s = _on_link_s(one, nbytes, alone_s)
        link_free = max(link_free, start) + link_s
        lanes[lane] = link_free + alone_s - link_s
    step_s = max(job.step_s, *lanes)
    return _prediction(job, "ddp", 1, step_s, copies=1.0, baseline=step_s)


def _buckets(nbytes: int) -> list[int]:
    """As DDP cuts them where parameters are small: a short one first."""
    first = min(nbytes, _FIRST_BUCKET_BYTES)
    whole, rest = divmod(nbytes - first, _BUCKET_BYTES)
    return [first, *[_BUCKET_BYTES] * whole, *([rest] if rest else [])]


def _on_link_s(job: Job, nbytes: int, alone_s: float) -> float:
    """How long a mean keeps the link from others."""
    network = job.network
    if not isinstance(network, Gloo) or job.workers == 1:
        return alone_s
    sent = 2 * (job.workers - 1) / job.workers * nbytes
    return sent * 8 / (network.link.bandwidth_gbit_s * 1e9)


def _predict(job: Job, name: str, tau: int, ddp_s: float, codec: str | None = None) -> Prediction:
    """Run the algorithm's own engine on a clock.

    One virtual worker, who stands for all, on their network.
    """

    fragments = _fragments(job, name, tau, codec)

    def optimizer(params: Params, communicator: VirtualCommunicator) -> AveragingOptimizer:
        communicator.size = job.workers
        return ALGORITHMS[name](
            params,
            tau=tau,
            lr=0.0,
            communicator=communicator,
            codec=None,
            fragments=fragments,
        )

    cluster = Cluster(
        workers=1,
        model=lambda: torch.nn.ParameterList([torch.zeros(1) for _ in range(fragments)]),
        optimizer=optimizer,
        threads=1,
        compute=Constant(job.step_s),
        network=_Whole(job, codec, fragments),
    )
    cluster.advance(_FIRST_ROUNDS * tau)
    start = cluster.seconds()
    cluster.advance(_ROUNDS * tau)
    step_s = (cluster.seconds() - start) / (_ROUNDS * tau)
    copies = _copies(cluster.optimizers[0])
    if codec is not None:
        # Codes to send, codes received, and coded means.
        copies += 3 * job.nbytes(codec) / job.nbytes()
    made = _prediction(job, name, tau, step_s, copies=copies, baseline=ddp_s, codec=codec)
    return replace(made, fragments=fragments)


def _fragments(job: Job, name: str, tau: int, codec: str | None) -> int:
    """Of the algorithm that is made of them, as many as leave the least to wait for: each hides behind
    one local step."""
    if name != FRAGMENTED:
        return 1
    nbytes = job.nbytes(codec)

    def exposed_s(count: int) -> float:
        return count * max(0.0, job.all_reduce_s(nbytes / count) - job.step_s)

    return min(range(1, min(tau, MOST_FRAGMENTS, job.params) + 1), key=exposed_s)


def _prediction(
    job: Job,
    name: str,
    tau: int,
    step_s: float,
    *,
    copies: float,
    baseline: float,
    codec: str | None = None,
) -> Prediction:
    per_hour = 3600 / (step_s * tau) * job.nbytes(codec) / 1e9 if job.workers > 1 else 0.0
    exposed = max(0.0, step_s / job.step_s - 1)
    return Prediction(
        algorithm=name,
        tau=tau,
        step_s=step_s,
        speed_up=baseline / step_s,
        exposed_share=exposed,
        copies=copies,
        gbytes=copies * job.nbytes() / 1e9,
        gbytes_per_hour=per_hour,
        codec=codec,
    )


@dataclass(frozen=True)
class _Whole:
    """The job's network and all its parameters, whatever the virtual worker sends."""

    job: Job
    codec: str | None
    fragments: int

    def all_reduce_s(self, nbytes: float, workers: int) -> float:
        """Seconds of a mean of the job's model over the job's workers; of codes they are the same,
        for as many bytes."""
        return self.job.all_reduce_s(self.job.nbytes(self.codec) / self.fragments)


def _copies(optimizer: AveragingOptimizer) -> float:
    """What the engine keeps, in copies of the fragment."""
    total = 0.0
    for sync in optimizer.engine.syncs:
        flats = [v for v in vars(sync.state).values() if isinstance(v, Flat)]
        outer = [v for v in vars(sync.state).values() if isinstance(v, torch.optim.Optimizer)]
        total += (
            1
            + len(flats)
            + sum("momentum" in g and g["momentum"] > 0 for o in outer for g in o.param_groups)
        )
    return total / len(optimizer.engine.syncs)


def _line(best: Prediction) -> str:
    if best.algorithm == "ddp":
        return "model = torch.nn.parallel.DistributedDataParallel(model)"
    given = f"tau={best.tau}"
    if best.round_s is not None:
        given = f"tau=distoptim.periods.EqualTime({best.round_s:.3g})"
    if best.fragments > 1:
        given += f", fragments={best.fragments}"
    if best.codec:
        given += f", codec={best.codec!r}"
    if best.ranks > 1:
        given += ", device_mesh=mesh"
    return f"optimizer = distoptim.{ALGORITHMS[best.algorithm].__name__}(optimizer, {given})"


def _reason(best: Prediction, predictions: Sequence[Prediction], inner: str | None) -> str:
    """In one sentence, which begins with what is bad."""
    ddp = predictions[0]
    if best.algorithm == "ddp":
        return (
            f"none of this pays: DDP waits {ddp.exposed_share:.1%} of the computation for communication, and "
            f"nothing is more than {CLOSE - 1:.0%} faster"
        )
    told = [
        f"{best.speed_up:.1f} times as fast as DDP, which waits {ddp.exposed_share:.0%} of the computation",
        f"communication exposed {best.exposed_share:.1%}",
        f"no smaller tau is within {CLOSE - 1:.0%} of it",
        _compared(best, inner),
    ]
    if best.round_s is not None:
        told.append(
            "rounds of equal time, since with one tau all wait for the slowest (docs/unequal.md)"
        )
    if not best.hidden:
        told.insert(
            0,
            "nothing that is offered hides this link: even this waits for "
            f"{best.exposed_share:.0%} of the computation; {_would_hide(best)}",
        )
    if best.ranks > 1:
        told.append(f"islands of {best.ranks} ranks are one worker each (docs/islands.md)")
    if best.codec:
        plain = [p.tau for p in predictions[1:] if p.codec is None and p.hidden]
        told.append(
            (
                f"without a codec tau = {min(plain)} hides it"
                if plain
                else "no tau hides it without a codec"
            )
            + "; codecs are for float32, on GPUs with offload=True (docs/compression.md)"
        )
    return "; ".join(told)


def _would_hide(best: Prediction) -> str:
    """What would have to be otherwise."""
    if best.algorithm not in ALGORITHMS or not _hides_a_round(best.algorithm):
        return "a faster link, a smaller model or longer local steps would help"
    # Its mean takes so many rounds of computation.
    factor = f"{1 + best.exposed_share:.2g} times"
    return f"a link {factor} as fast would hide it, or local steps {factor} as long"


def _hides_a_round(name: str) -> bool:
    """Whether by default the mean has a whole round to come."""
    return inspect.signature(ALGORITHMS[name]).parameters["delay"].default is None


def _compared(best: Prediction, inner: str | None) -> str:
    """Why this one of the equally fast algorithms."""
    points = below(inner, best.tau).get(best.algorithm) if inner else None
    if points is None:
        return "of the equally fast algorithms the first (docs/which.md)"
    return (
        f"of the equally fast algorithms the one that ended least below DDP with {inner} in our studies, "
        f"{points:.1f} points (docs/which.md)"
    )
