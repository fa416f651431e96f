"""Who the workers are: all agree before the first step and before they resume, or all fail alike."""

from __future__ import annotations

import copy
import io
import logging
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor

from distoptim import module_state
from distoptim import rule as rules
from distoptim.comm import CatchUp, CommunicationError, Communicator, Handle, Member
from distoptim.comm.mesh import WorkerMesh, describe
from distoptim.engine import catching_up, checkpoint
from distoptim.engine.calls import Calls
from distoptim.engine.engine import Engine
from distoptim.engine.fragment_sync import FragmentSync
from distoptim.engine.identity import SIZE, Kind, index_of
from distoptim.fragments import Fragment
from distoptim.rule import Rule
from distoptim.settings import SyncSettings

logger = logging.getLogger("distoptim")

Facts = dict[str, object]
_CONSTRUCTION = "construction"
# Of the last optimizers, in the order in which they were made: the communicator, and a fingerprint of what this
# worker's parameters were before they got rank 0's values.
_starts: deque[tuple[weakref.ref[Communicator], int]] = deque(maxlen=64)
# Between looks whether a merge in the other thread is over.
_LOOK_S = 0.001


@torch.no_grad()
def agree(
    communicator: Communicator,
    facts: Facts,
    fragments: Sequence[Fragment],
    names: Sequence[str],
    *,
    start: int,
    untrained: Mapping[str, Tensor],
    sync: bool,
) -> None:
    """Compare facts and parameters, then give everybody rank 0's parameters, and what is not trained.

    Blocking and collective. The ranks of a worker's mesh agree on the facts too: they launch together.
    Their shards may differ.

    Args:
        communicator: to the other workers.
        facts: by name, what must be equal.
        fragments: whose values are to be equal at the start.
        names: the parameters' names, where torch knows them; two of one shape in another order go
            unseen without.
        start: a fingerprint of the parameters.
        untrained: by name, the buffers and frozen parameters that are to be equal too.
        sync: False: of these only compare the values.

    Raises:
        ValueError: on every worker, as `compare`, `_compare_order` and `module_state.make_equal`.
    """
    params = [p for f in fragments for p in f.params]
    own = {
        "number of fragments": len(fragments),
        "names of parameters": list(names),
        "shards": describe(params),
        **{f"fragment {i}": f"part {f.part}: {f.signature()}" for i, f in enumerate(fragments)},
        "buffers and frozen parameters": [
            f"{n} {module_state.look(t)}" for n, t in untrained.items()
        ],
    }
    plain = {key: _plain(value) for key, value in facts.items()}
    mesh = WorkerMesh(params)
    # One message, compared only when everybody has them all: who finds a difference leaves nobody
    # waiting.
    me = communicator.ranks[communicator.rank]
    told = mesh.all_gather_json([me, plain], what=_CONSTRUCTION)
    answers = communicator.enter([told, own, _begun(communicator, start)], what=_CONSTRUCTION)
    try:
        messages = cast("list[tuple[list[tuple[int, Facts | str]], Facts, list[int]]]", answers)
        said = [theirs for ranks, *_ in messages for theirs in ranks]
        for rank, facts_or_error in said:
            if isinstance(facts_or_error, str):
                raise ValueError(f"rank {rank} was refused its arguments: {facts_or_error}")
        # Who comes to others does not know beforehand which of them it will be.
        ranks = range(len(said)) if communicator.elastic else [rank for rank, _ in said]
        compare([cast("Facts", theirs) for _, theirs in said], ranks)
        compare([theirs for _, theirs, _ in messages], communicator.ranks)
        _compare_order([begun for *_, begun in messages], communicator.ranks)
        if not communicator.joins:
            module_state.make_equal(communicator, mesh, untrained, sync=sync)
    except ValueError:
        # Nobody could later: with torch 2.6 a program that ends with these groups open may hang.
        communicator.close()
        raise
    # Who joins a run takes over what the others share with its first mean.
    for f in () if communicator.joins else fragments:
        values = f.flat()
        f.read(values)
        communicator.broadcast(values.tensor)
        f.write(values)


def _begun(communicator: Communicator, start: int) -> list[int]:
    """What this worker's optimizers over the same workers have begun with, this one last."""
    _starts.append((weakref.ref(communicator), start))
    me = communicator.ranks, communicator.rank
    # A copy, since workers may be threads.
    made = [(ref(), begun) for ref, begun in list(_starts)]
    return [begun for other, begun in made if other and (other.ranks, other.rank) == me]


def _compare_order(everybody: Sequence[list[int]], ranks: Sequence[int]) -> None:
    """Whether optimizers were made in one order, as far as it shows in what their parameters were.

    Those of equal shapes would be averaged with each other. It shows where workers begin with equal
    values, as of one seed.

    Raises:
        ValueError: a worker has begun with values of the first one, in another order.
    """
    first = everybody[0]
    for rank, theirs in zip(ranks, everybody, strict=False):
        # Those that both still hold.
        both = [begun for begun in first if first.count(begun) == 1 == theirs.count(begun)]
        if both != [begun for begun in theirs if begun in both]:
            raise ValueError(
                f"rank {rank} makes its optimizers in another order than rank {ranks[0]}, so that the "
                "parameters of one would be averaged with those of another: allowed is the same order "
                "on all workers"
            )


@final
class Giver(Member):
    """An engine whose workers come and go, and what else was equal at the start.

    Args:
        engine: launches the means.
        untrained: buffers and frozen parameters by name; live.
    """

    def __init__(self, engine: Engine, untrained: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._untrained = untrained

    def position(self, buffer: Tensor) -> dict[str, Any]:
        """The message's identity, local step, and what is counted and chosen."""
        engine = self._engine
        code = buffer[-1 - SIZE : -1].tolist()
        # Of who joins, nothing is asked; its message is all 0.
        kind = Kind(int(code[0]) or 1)
        fragment = index_of(code)
        groups = engine.syncs[fragment].fragment.segments
        return {
            "code": code,
            "what": f"{kind.call} at local step {engine.step}",
            "round": kind in (Kind.ROUND, Kind.FLUSH),
            "fragment": fragment,
            "step": engine.step,
            "messages": engine.reducer.messages,
            "launches": [[sync.launched, sync.next_launch] for sync in engine.syncs],
            "lr": [engine.lr(group) for group, _ in groups],
            "clock": None if engine.clock.fixed else engine.clock.state_dict(),
        }

    def give(self) -> dict[str, Any]:
        """Anchors and outer states, and means that have come and are still to be merged."""
        return {
            "fragments": [self._fragment(sync) for sync in self._engine.syncs],
            "untrained": dict(self._untrained),
        }

    def _fragment(self, sync: FragmentSync) -> dict[str, Any]:
        """A copy of what is shared of one fragment.

        The training thread goes on merging: what was copied while it did is copied again.

        Raises:
            CommunicationError: a merge does not end.
        """
        limit = time.monotonic() + self._engine.reducer.timeout_s
        while time.monotonic() < limit:
            before = (sync.merges, sync.pending)
            given = None if sync.merging else self._copy(sync)
            if given is not None and not sync.merging and (sync.merges, sync.pending) == before:
                return given
            time.sleep(_LOOK_S)
        raise CommunicationError(
            f"the merge of {sync.name} does not end, so that nothing can be given"
        )

    def _copy(self, sync: FragmentSync) -> dict[str, Any]:
        pending = sync.pending
        mean = None
        if pending is not None and pending.handle.is_there:
            values = sync.buffer.tensor.clone()
            mean = {"values": values, "workers": pending.handle.workers, "lr": pending.lr}
        coded = None if sync.compressed is None else sync.compressed.state_dict()["reference"]
        return {
            "shared": copy.deepcopy(rules.save(self._engine.rule.shared(sync.state))),
            "merges": sync.merges,
            "reference": None if coded is None else coded.clone(),
            "mean": mean,
        }

    def listen(self, given: CatchUp, workers: Communicator) -> Tensor:
        """A message of no weight, which says that it is what the giver's is."""
        position = given.position
        sync = self._engine.syncs[position["fragment"]]
        timeout_s = self._engine.reducer.timeout_s
        buffer = self.empty(given)
        if sync.compressed is None or not position["round"]:
            workers.all_reduce(buffer).wait(timeout_s)
            return buffer
        state = given.state["fragments"][sync.index]
        reference = state["reference"]
        if reference is None:
            reference = state["shared"]["anchor"]
        sync.compressed.listen(workers, buffer, reference, timeout_s)
        return buffer

    def empty(self, given: CatchUp) -> Tensor:
        """That message."""
        buffer = torch.zeros_like(self._engine.syncs[given.position["fragment"]].buffer.tensor)
        code = given.position["code"]
        buffer[-1 - SIZE : -1] = torch.tensor(code, dtype=buffer.dtype)
        return buffer

    def hurry(self, launch: Handle) -> None:
        """Merge it after the next local step, so that others need not wait for this worker's next launch."""
        for sync in self._engine.syncs:
            pending = sync.pending
            if pending is not None and pending.handle is launch:
                pending.due = 0
                self._engine.look_soon()


@torch.no_grad()
def take_part(engine: Engine, untrained: Mapping[str, Tensor]) -> None:
    """Begin to send means; where workers come and go and a run is on, take over what it shares first.

    Args:
        engine: of this worker.
        untrained: buffers and frozen parameters, by name.
    """
    communicator = engine.communicator
    if not communicator.elastic:
        return
    engine.catch_up = partial(catching_up.catch_up, engine)
    communicator.attach(Giver(engine, untrained))
    if communicator.joins:
        for name, value in catching_up.listen(engine)["untrained"].items():
            untrained[name].copy_(value)


def check_elastic(settings: SyncSettings, rule: Rule, fragments: Sequence[Fragment]) -> None:
    """Whether all of it goes with workers that come and go.

    Args:
        settings: of the optimizer.
        rule: of the algorithm.
        fragments: that it averages.

    Raises:
        ValueError: something does not.
    """
    refusal = _unfit(settings, rule, fragments)
    if refusal is not None:
        raise ValueError(f"beside workers that come and go (Elastic): {refusal}")
    if any(f.sharded or f.device.type != "cpu" for f in fragments):
        raise ValueError(
            "Elastic averages whole parameters in host memory; allowed is no DTensor and no accelerator"
        )


def _unfit(settings: SyncSettings, rule: Rule, fragments: Sequence[Fragment]) -> str | None:
    """What of the settings does not go with workers that come and go, and why not."""
    period = settings.period
    if settings.levels:
        return f"levels={settings.levels!r}, whose groups have fixed members; allowed is none"
    if period.round_s is not None:
        return f"tau={period!r}, of which who comes could not know the others' local steps; allowed is another tau"
    if len(fragments) == 1:
        return None
    if period.choices != frozenset([period.first]):
        return f"tau={settings.tau!r} with {len(fragments)} fragments; allowed is an integer, or fragments=1"
    if "anchor" not in rule.shared(rule.start(fragments[0])):
        return (
            f"{len(fragments)} fragments without an anchor, of which who comes would learn one a message; "
            "allowed is fragments=1, or an algorithm with an anchor"
        )
    return None


def refuse(connect: Callable[[], Communicator], error: Exception, mesh: WorkerMesh) -> None:
    """Tell the other workers, who are in `agree`, why this one will not take part.

    Where they do not come, that is noted after the communicator's timeout.

    Args:
        connect: gives the communicator, which is closed afterwards.
        error: what is wrong with this worker's arguments.
        mesh: the ranks that are one worker with this one.
    """
    try:
        communicator = connect()
        # Virtual workers are made one after the other: nobody waits.
        if mesh.is_shared or not communicator.in_lockstep:
            me = communicator.ranks[communicator.rank]
            # In the form of `agree`.
            told = mesh.all_gather_json([me, str(error)], what=_CONSTRUCTION)
            communicator.all_gather_json([told, {}, []], what=_CONSTRUCTION)
        communicator.close()
    except CommunicationError as silence:
        logger.warning("the other workers could not be told of this error: %s", silence)


@torch.no_grad()
def catch_up(
    calls: Calls, saved: dict[str, Any] | None, refusal: Exception | None = None
) -> dict[str, Any] | None:
    """What this worker is to resume from, so that all resume from the same round.

    Blocking and collective. A mean that is cut off by a failure may be there on some workers and lost
    on others, whose saved anchors and outer states then are a round apart. Where positions differ,
    everybody gets the state of the worker that is furthest, as one of nobody's: what was in flight is
    dropped, workers start from the anchor, and a new round begins.

    Args:
        calls: of the workers that are to resume; the ranks of a worker's mesh resume at one local step too.
        saved: by `checkpoint.save`; None for a plain optimizer's state, which starts a new run.
        refusal: why this worker cannot load its state.

    Raises:
        ValueError: on every worker, if one cannot load its state, if only some have rounds to resume,
            or if what all should have saved alike differs.
    """
    engine = calls.engine
    communicator = engine.communicator
    position = None if saved is None else checkpoint.position(saved)
    of_rank = {
        "number": communicator.ranks[communicator.rank],
        "position": position,
        "refusal": None if refusal is None else _text(refusal),
    }
    own = {
        "rank": communicator.rank,
        "file": None if saved is None else saved["rank"],
        "shared": {} if saved is None else checkpoint.shared(engine, saved),
        **of_rank,
    }
    mesh = WorkerMesh([p for sync in engine.syncs for p in sync.fragment.params])
    what = Kind.LOAD.call
    # Whoever is elsewhere does not come for the messages below.
    calls.meet(Kind.LOAD)
    with engine.reducer.guard():
        answers = communicator.all_gather_json(
            [mesh.all_gather_json(of_rank, what=what), own], what=what
        )
    messages = cast("list[tuple[list[Facts], Facts]]", answers)
    everybody = [theirs for ranks, _ in messages for theirs in ranks]
    ranks = [cast("int", theirs["number"]) for theirs in everybody]
    _refuse_together([theirs["refusal"] for theirs in everybody], ranks, refusal)
    compare(
        [
            {"what to resume": "a plain optimizer" if theirs["position"] is None else "rounds"}
            for theirs in everybody
        ],
        ranks,
    )
    if saved is None:
        return None
    positions = cast("list[dict[str, Any]]", [theirs["position"] for theirs in everybody])
    if all(theirs == position for theirs in positions):
        workers = [theirs for _, theirs in messages]
        compare([cast("Facts", theirs["shared"]) for theirs in workers], communicator.ranks)
        return _own_file(saved, workers)
    return _furthest(engine, saved, positions, [theirs["position"] for _, theirs in messages])


def go_on(engine: Engine, saved: dict[str, Any]) -> None:
    """Resume where workers come and go: as far as this worker's file is, or as far as the run is.

    Nobody else need load. Who is less far catches up at the next mean; where the run is further than the
    file, x begins at what the others share.

    Args:
        engine: that is to resume.
        saved: by `checkpoint.save`, and fits.
    """
    if engine.communicator.load_state_dict(saved["elastic"]):
        engine.load_state_dict(saved)
    else:
        engine.begin_at_shared()


def _refuse_together(
    refusals: Sequence[object], ranks: Sequence[int], own: Exception | None
) -> None:
    if own is not None:
        raise own
    for rank, text in zip(ranks, refusals, strict=False):
        if text is not None:
            raise ValueError(f"rank {rank} cannot load its state: {text}")


def _text(error: Exception) -> str:
    """Of a ValueError, which says all, its message; of others also what kind of error it is."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _own_file(saved: dict[str, Any], workers: Sequence[Facts]) -> dict[str, Any]:
    """The state, where all load one file as one of nobody's if some of it is a worker's own.

    Raises:
        ValueError: on every worker, if some load another's.
    """
    others = [w for w in workers if w["file"] not in (None, w["rank"])]
    if saved["workers"] != len(workers) or not others:
        return saved
    own = checkpoint.keeps_residual(saved)
    if len({w["file"] for w in workers}) == 1:
        warnings.warn(
            f"all {len(workers)} workers load the state of rank {saved['rank']}: the others' own"
            + (" parts, and what their codes have lost, are dropped" if own else " parts are lost"),
            RuntimeWarning,
            # The caller of load_state_dict(); no_grad is a frame too.
            stacklevel=5,
        )
        return {**saved, "workers": 0} if own else saved
    if own:
        first = others[0]
        raise ValueError(
            f"rank {first['rank']} loads the state of rank {first['file']}, in which is what that "
            "worker's codes have lost: allowed is the own state, or one for all workers"
        )
    return saved


def _furthest(
    engine: Engine,
    saved: dict[str, Any],
    everybody: Sequence[dict[str, Any]],
    positions: Sequence[Any],
) -> dict[str, Any]:
    """The state of the worker that is furthest."""
    furthest = positions.index(max(positions, key=checkpoint.progress))
    steps = [position["step"] for position in everybody]
    logger.warning(
        "workers saved different rounds (local steps %d to %d): all go on from rank %d's, at a new "
        "round",
        min(steps),
        max(steps),
        furthest,
    )
    with engine.reducer.guard():
        theirs = _from(engine.communicator, saved, furthest)
    # As one of nobody's: of no number of workers that there could be.
    return {**theirs, "step": max(steps), "workers": 0}


def _from(communicator: Communicator, saved: dict[str, Any], source: int) -> dict[str, Any]:
    """Rank `source`'s saved state, on the CPU."""
    file = io.BytesIO()
    if communicator.rank == source:
        torch.save(saved, file)
    sizes = communicator.all_gather_json(file.getbuffer().nbytes, what="size of a state")
    nbytes = cast("list[int]", sizes)[source]
    message = torch.frombuffer(bytearray(file.getvalue() or nbytes), dtype=torch.uint8)
    communicator.broadcast(message, source)
    whole = io.BytesIO(message.numpy().tobytes())
    theirs: dict[str, Any] = torch.load(whole, map_location="cpu", weights_only=True)
    return theirs


def compare(everybody: Sequence[Facts], ranks: Sequence[int]) -> None:
    """Whether all workers say the same.

    Args:
        everybody: what each says.
        ranks: what the message calls them.

    Raises:
        ValueError: naming the first fact that differs, the two ranks and both values.
    """
    reference = everybody[0]
    for rank, theirs in zip(ranks, everybody, strict=False):
        for key in {**reference, **theirs}:
            ours = reference.get(key)
            other = theirs.get(key)
            if ours != other:
                raise ValueError(
                    f"workers disagree on {key}: rank {ranks[0]} has {_short(ours, other)}, "
                    f"rank {rank} has {_short(other, ours)}"
                )


def _plain(value: object) -> object:
    """As JSON can hold it; objects as they are made."""
    return value if isinstance(value, bool | int | float | str | list | None) else repr(value)


def _short(value: object, other: object, width: int = 160) -> str:
    """The value as text, long ones from a little before the place where the two part."""
    text = str(value)
    against = str(other)
    if len(text) <= width:
        return text
    pairs = enumerate(zip(text, against, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), len(against))
    start = max(0, same - width // 2)
    return f"...{text[start : start + width]}..."
