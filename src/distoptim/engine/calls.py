"""What all workers call together, blocking, besides `average()`; and what they hear of one that cannot go on.

A worker that is in another call than the others sends a message of another identity in the same place, by
which all see it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch

from distoptim.comm import CommunicationError, MeanLost
from distoptim.engine.engine import Engine, tick_together
from distoptim.engine.fragment_sync import FragmentSync
from distoptim.engine.identity import Kind
from distoptim.fragments import Flat, Fragment

logger = logging.getLogger("distoptim")

# How long a worker that ends waits for the others, who may have ended without it.
_END_S = 60.0


class Calls(ABC):
    """Of the workers of one optimizer, as it sees them: of one engine, or of one with levels below it.

    Args:
        engine: the algorithm's, over all workers.
        tick: see below.

    Attributes:
        engine: as given.
        tick: called after a local step: merges and launches what is due.
    """

    def __init__(self, engine: Engine, tick: Callable[[], None]) -> None:
        self.engine = engine
        # No method, which would be one call more at every local step.
        self.tick = tick

    @abstractmethod
    def flush(self) -> None:
        """Merge what is in flight, then average the steps made since the last launch.

        A new round begins at this step; at delay = tau its end has nothing to merge yet.
        """

    @abstractmethod
    def meet(self, kind: Kind, *, limit_s: float | None = None) -> None:
        """See that all workers are in the same call.

        Args:
            kind: the call.
            limit_s: how long to wait for the others; by default the timeout.

        Raises:
            CommunicationError: on all workers, if they are not.
        """

    @abstractmethod
    def means(self, kind: Kind, *, weight: float = 1.0, may_be_empty: bool = False) -> list[Flat]:
        """The workers' means of all fragments' values now, in new buffers.

        Rounds in flight go on; what is in flight is waited for, so that a worker that is elsewhere is
        found out.

        Raises:
            CommunicationError: on all workers, if they are not all here.
        """

    @abstractmethod
    def adopt(self, means: Sequence[Flat]) -> None:
        """x <- means of now, for good: what is in flight meets the state alone, and a round begins.

        Args:
            means: of all fragments, as `means` gives them; one to which nobody added leaves x alone.
        """

    @abstractmethod
    def tell(self, error: Exception | str) -> None:
        """Tell the others, who would wait for this worker, why it does not go on; for a minute at most.

        In the place of its next message, also where a call was left in the middle of several. Where all
        have an error, all can go on.

        Args:
            error: of this worker; or a whole sentence, which says whose.
        """

    @abstractmethod
    def leave(self) -> None:
        """Leave all groups; what comes after fails."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-equal, as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a state that fits into the rounds."""

    def mean_of(self, fragment: Fragment, kind: Kind) -> Flat:
        """The workers' mean of another fragment, after `means` or `meet`."""
        engine = self.engine
        return engine.reducer.mean_of(fragment, engine.identity(kind, len(engine.syncs)))

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Around a call that may be refused on one worker."""
        try:
            yield
        except Exception as error:
            self.tell(error)
            raise

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """Go on without data until nobody has any, then take over the workers' mean.

        That all have run out is seen in a mean to which nobody has added anything, at the same step by
        all. So no message is needed beside the means; torch's Join has a blocking one at every local
        step.
        """
        engine = self.engine
        if engine.communicator.elastic:
            raise ValueError(
                "join() beside workers that come and go (Elastic): who has no data any more leaves, by "
                "close()"
            )
        weights = engine.weights
        step = engine.step
        samples = weights.total
        yield
        counted = weights.samples is not None
        made = weights.total - samples if counted else engine.step - step
        with self.telling():
            weights.left_at = engine.step
            while not engine.ended:
                self.tick()
            # The mean comes after what is in flight, which the last steps of others are in.
            engine.drain()
            self.adopt(self.means(Kind.JOIN, weight=made, may_be_empty=True))
            engine.ended = False
            weights.left_at = None
            engine.resume_at(engine.step)

    def close(self) -> None:
        """Wait for what is in flight, then leave all groups; what comes after fails.

        Raises:
            CommunicationError: workers are in unlike calls, or have made unlike numbers of steps.
        """
        reducer = self.engine.reducer
        known = reducer.mismatched
        # While the groups are there; what it finds is raised when they have been left.
        self._compare_steps()
        self.engine.settle()
        failure = reducer.failure
        self.leave()
        if reducer.mismatched and not known and failure is not None:
            raise failure

    def _compare_steps(self) -> None:
        """See that all workers end after as many local steps; not while an exception passes."""
        engine = self.engine
        if engine.reducer.failure is not None or sys.exc_info()[0] is not None:
            return
        # Where workers come and go they end when they like.
        if engine.communicator.elastic:
            return
        try:
            self.meet(Kind.CLOSE, limit_s=min(engine.reducer.timeout_s, _END_S))
        except CommunicationError as error:
            if not engine.reducer.mismatched:
                logger.warning("close(): not all have come to compare their local steps: %s", error)


@final
class EngineCalls(Calls):
    """Of the workers of one engine.

    Attributes:
        coming: the fragments whose messages are still to come in the present call, in order, before those
            of the next launches.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, partial(tick_together, (engine,)))
        self._expect([])

    def _expect(self, syncs: Sequence[FragmentSync], *, uncoded: bool = False) -> None:
        """Note the messages of a call before the first of them."""
        self.coming = list(syncs)
        self._uncoded = uncoded

    @torch.no_grad()
    def flush(self) -> None:
        """Fragment by fragment, in the order of their next launches; where workers come and go, by index."""
        engine = self.engine
        engine.check_local()
        engine.reducer.check()
        engine.watch.check()
        step = engine.step
        engine.caught_up_in = None
        engine.drain()
        if self._others_are_past(step):
            return
        order = engine.syncs if engine.communicator.elastic else engine.next_first()
        left = self._not_launched(order)
        if left[:1] != order[:1] and not engine.communicator.elastic:
            # The first message must be as long as what a worker that is elsewhere sends next.
            engine.reducer.meet(order[0], engine.identity(Kind.FLUSH, order[0].index))
        if engine.caught_up_in is not Kind.FLUSH:
            for sync in engine.syncs:
                sync.schedule(engine.step, engine.clock.tau)
        self._expect(left)
        while self.coming:
            sync = self.coming.pop(0)
            engine.caught_up_in = None
            engine.launch(sync, Kind.FLUSH)
            while not engine.merge(sync):
                engine.launch(sync, Kind.FLUSH)
            if engine.caught_up_in is not None:
                # The others' launches are this worker's now.
                self._expect([] if self._others_are_past(step) else self._not_launched(order))
        engine.begin_time()
        engine.plan()

    def _not_launched(self, order: Sequence[FragmentSync]) -> list[FragmentSync]:
        """Whose steps are in no mean yet."""
        engine = self.engine
        # Of rounds of equal time nobody knows whether others have made steps.
        return [sync for sync in order if sync.launched < engine.step or engine.clock.timed]

    def _others_are_past(self, step: int) -> bool:
        """Whether they had made a call at this local step when this worker caught up with them in it."""
        engine = self.engine
        return engine.caught_up_in is Kind.ROUND and engine.step > step

    def meet(self, kind: Kind, *, limit_s: float | None = None) -> None:
        """By one message."""
        self.engine.meet(kind, limit_s=limit_s)

    def means(self, kind: Kind, *, weight: float = 1.0, may_be_empty: bool = False) -> list[Flat]:
        """By a message a fragment, and one before them where theirs have another form than rounds'."""
        engine = self.engine
        engine.watch.check()
        if engine.communicator.elastic and (anchors := self._copied_anchors()):
            return anchors
        order = engine.next_first()
        if order[0].compressed is None or engine.communicator.elastic:
            engine.settle_now()
        else:
            # These means come uncoded; to begin with, one of the form that others would send.
            engine.meet(kind)
        self._expect(order, uncoded=True)
        found = {}
        while self.coming:
            sync = self.coming[0]
            try:
                found[sync.index] = engine.reducer.mean_of(
                    sync.fragment,
                    engine.identity(kind, sync.index),
                    extra=sync.extra,
                    weight=weight,
                    may_be_empty=may_be_empty,
                )
            except MeanLost:
                # With a worker that is gone: again, among those that are left.
                continue
            self.coming.pop(0)
        return [found[sync.index] for sync in engine.syncs]

    def _copied_anchors(self) -> list[Flat]:
        """What stands for the mean where others may have gone; none in algorithms without an anchor."""
        copies = []
        for sync in self.engine.syncs:
            anchor = self.engine.anchor(sync)
            if anchor is not None:
                copy = sync.fragment.flat(extra=1)
                copy.tensor[: sync.fragment.numel] = anchor.tensor[: sync.fragment.numel]
                copy.tensor[-1] = 1.0
                copies.append(copy)
        return copies

    @torch.no_grad()
    def adopt(self, means: Sequence[Flat]) -> None:
        """All fragments at once."""
        engine = self.engine
        engine.drain()
        for sync, mean in zip(engine.syncs, means, strict=True):
            if mean.tensor[-1]:
                sync.fragment.write(mean)
            sync.launched = engine.step
            sync.samples = engine.weights.total
            sync.schedule(engine.step, engine.clock.tau)
        engine.begin_time()
        engine.plan()

    def cause(self, error: Exception | str) -> str | None:
        """What the others are told of an error; None: there is nobody to be told."""
        communicator = self.engine.communicator
        if communicator.in_lockstep or communicator.elastic:
            return None
        if self.engine.reducer.failure is not None:
            return None
        if isinstance(error, str):
            return error
        me = communicator.ranks[communicator.rank]
        told = f"rank {me} cannot go on: {type(error).__name__}: {error}"
        logger.warning("%s; for up to %g s the other workers are told", told, _END_S)
        return told

    def tell(self, error: Exception | str) -> None:
        """In the place of the call's next message, or of the next launch."""
        cause = self.cause(error)
        if cause is None:
            return
        engine = self.engine
        reducer = engine.reducer
        coming = self.coming
        self.coming = []
        try:
            engine.settle_now()
            first = (coming or engine.next_first())[0]
            identity = replace(engine.identity(Kind.ERROR, first.index), cause=cause)
            limit_s = min(reducer.timeout_s, _END_S)
            uncoded = bool(coming) and self._uncoded
            reducer.meet(first, identity, limit_s=limit_s, uncoded=uncoded)
        except CommunicationError as silence:
            if not reducer.mismatched:
                logger.warning("the other workers could not be told of this error: %s", silence)

    def leave(self) -> None:
        """The one group."""
        self.engine.reducer.close()

    def state_dict(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Into the engine."""
        self.engine.load_state_dict(saved)
