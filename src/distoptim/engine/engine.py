"""Time: when to launch, when to merge, what is in flight. The only place that counts local steps."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.profiler import record_function

from distoptim.comm import Communicator, FinishedHandle, Handle, MeanLost
from distoptim.comm.codecs import Coding
from distoptim.engine.clock import Clock
from distoptim.engine.fragment_sync import FragmentSync, PendingMean, Unheard
from distoptim.engine.identity import SIZE, Identity, Kind, Weighing, identify
from distoptim.engine.likeness import Likeness
from distoptim.engine.module_statistics import ModuleStatistics
from distoptim.engine.reducer import Reducer, is_finite, mark_finite
from distoptim.engine.stats import Counters
from distoptim.engine.weights import Weights
from distoptim.fragments import Flat, Fragment
from distoptim.rule import Average, Mean, Rule
from distoptim.watch import Watch

logger = logging.getLogger("distoptim")


class QuarantineWarning(RuntimeWarning):
    """This worker's parameters were not finite: left out of a mean and replaced."""


@final
@dataclass(frozen=True)
class Inner:
    """What the engine asks of the inner optimizer.

    Attributes:
        optimizer: makes the local steps.
        reset_at_merge: forget its state at every merge.
    """

    optimizer: torch.optim.Optimizer
    reset_at_merge: bool = False

    def lr(self, group: int) -> float:
        """The learning rate of a param group now."""
        lr = self.optimizer.param_groups[group].get("lr")
        # Optimizers without one (relative steps): any constant says that it did not change.
        return 1.0 if lr is None else float(lr)

    def forget(self, params: Sequence[Tensor]) -> None:
        """Clear its state of these parameters."""
        for p in params:
            self.optimizer.state.pop(p, None)


def tick_together(
    engines: Sequence[Engine], *, before_launch: Callable[[], object] | None = None
) -> None:
    """One local step of one worker, or of several virtual ones in lockstep.

    Merges come before launches: at delay = tau a fragment's mean is merged before its next payload is
    formed. Among virtual workers every part is done for all before the next, since a mean is there only
    when all have launched, and its second stage only when all have had their first.

    Args:
        engines: of the workers in this process.
        before_launch: called between merges and launches, at every step.

    Raises:
        CommunicationError: of a failure, now or before.
    """
    due = False
    if engines[0].clock.timed and len(engines) > 1:
        for engine in engines:
            # Who has come to the end of its round waits there for the others.
            if not engine.waits:
                engine.count()
        due = all(engine.waits for engine in engines)
    else:
        for engine in engines:
            due = engine.count() or due
    if not due and before_launch is None:
        return
    _do_due(engines, before_launch)
    if len(engines) > 1:
        for engine in engines:
            engine.poll()
    for engine in engines:
        if engine.clock.delay == 0:
            engine.merge_due()
            engine.plan()
        engine.counters.ticked_at = engine.communicator.now()


def tick_again(engine: Engine, steps: int) -> None:
    """What is due in local steps that this worker has made already, of which the others launch meanwhile.

    Of the last step the merges alone: it is being ticked, so that its launches come next.

    Args:
        engine: of this worker, at the step from which on it goes along with the others.
        steps: that it has made since.
    """
    for _ in range(steps):
        if engine.waits:
            _do_due((engine,), None)
        engine.step += 1
    if engine.waits:
        engine.merge_due()


def _do_due(engines: Sequence[Engine], before_launch: Callable[[], object] | None) -> None:
    """The merges, then the launches of a local step that has been counted."""
    for engine in engines:
        engine.merge_due()
    if before_launch is not None:
        before_launch()
    for engine in engines:
        engine.launch_due()


@final
class Engine:
    """Keeps the rounds of all fragments.

    A fragment is launched at local steps offset, offset + tau, ... (tau, 2 tau, ... for offset 0) and
    merged `delay` local steps later. At delay = tau, merge and next launch fall together, and round 0
    counts as in flight from the start: all workers "sent" the same x0, so its mean is known without
    communication.

    Args:
        fragments: in the order in which all ranks launch them; equal on all workers now.
        rule: what is sent and how it is merged.
        clock: tau and delay.
        communicator: moves the bytes.
        inner: of the inner optimizer.
        watch: over the parameters.
        timeout_s: bound of every wait, in seconds.
        codec: in which payloads travel; None: as they are.
        statistics: of the module, to travel along where workers come and go; None: nothing does.
        weights, counters: shared with another engine of the same worker; default new ones.
        may_be_empty: whether a mean to which no worker has added anything is no error.
    """

    # Where workers come and go, what takes over what the others share; see `catching_up`.
    catch_up: Callable[[FragmentSync | None, Handle, float], None] | None = None
    # The call in which the others were with whom this worker has caught up last; whoever asks clears it.
    caught_up_in: Kind | None = None

    def __init__(
        self,
        fragments: Sequence[Fragment],
        rule: Rule,
        clock: Clock,
        communicator: Communicator,
        *,
        inner: Inner,
        watch: Watch,
        timeout_s: float,
        codec: Coding | None = None,
        statistics: ModuleStatistics | None = None,
        weights: Weights | None = None,
        counters: Counters | None = None,
        may_be_empty: bool = False,
    ) -> None:
        self.rule = rule
        self.clock = clock
        self.communicator = communicator
        by = None if clock.period.round_s is None else clock.period.weigh
        self.weights = Weights(by) if weights is None else weights
        self._counts_steps = counters is None
        self.counters = counters or Counters(virtual=communicator.in_lockstep)
        self.reducer = Reducer(
            communicator,
            timeout_s=timeout_s,
            codec=codec,
            abandon=self._abandon,
            take_over=self._take_over,
        )
        self.step = 0
        # Inside averaged(), where parameters are the workers' mean.
        self.evaluating = False
        self.watch = watch
        self._inner = inner
        self._may_be_empty = may_be_empty
        # In `join`, whether all workers have run out of data.
        self.ended = False
        self._activate()
        self._measured = len(clock.period.measures)
        self.statistics = statistics
        extra = self._measured + (0 if self.statistics is None else self.statistics.numel)
        # Groups of a level may well hold the same.
        compares = communicator.size > 1 and not may_be_empty
        self.syncs = [
            self._sync(index, fragment, extra=0 if index else extra, compares=compares)
            for index, fragment in enumerate(fragments)
        ]
        self._code()
        clock.expect(sum(communicator.mean_s(sync.nbytes) for sync in self.syncs))
        self._begin()

    def _sync(self, index: int, fragment: Fragment, *, extra: int, compares: bool) -> FragmentSync:
        """A fragment's state and buffer; with a buffer more for what is in flight, where workers come and go."""
        sync = FragmentSync(
            index,
            fragment,
            self.rule.start(fragment),
            fragment.flat(extra=extra + SIZE + 1),
            extra=extra,
            likeness=Likeness() if index == 0 and compares else None,
        )
        if self.communicator.elastic:
            sync.kept = fragment.flat(extra=1)
        return sync

    # ---- one round, from top to bottom ------------------------------------------------------------

    def count(self) -> bool:
        """Count a local step; whether something is to be merged or launched after it."""
        if self.evaluating:
            self.check_local()
        if self.reducer.failure is not None:
            raise self.reducer.failure
        # Levels have the same counters.
        if self._counts_steps:
            self.counters.tick(self.communicator.now())
        self.step += 1
        # Second stages begin here, at every step: one that began at the merge would be waited for.
        for pending in self._pending:
            pending.handle.poll()
        if self.clock.timed:
            self._keep_time()
        due = self.step >= self._next_event
        if due:
            self.watch.check()
        return due

    def _keep_time(self) -> None:
        """Let the round end with this local step if its time is up, else with the next at the earliest."""
        clock = self.clock
        # Who has no data any more makes no steps that take time.
        over = self.weights.left_at is not None or clock.time_is_up(self.step, self._computed_s())
        end = self.step if over else self.step + 1
        for sync in self.syncs:
            sync.next_launch = end
            if sync.pending is not None:
                sync.pending.due = end
        self.plan()

    @torch.no_grad()
    def merge_due(self) -> None:
        """Merge, in order of launch, the means that are due at this step."""
        for sync in list(self._in_flight):
            # None if an earlier merge has just failed.
            if sync.pending is not None and sync.pending.due <= self.step:
                self.merge(sync)
        # Here, since the algorithm begins at the mean that has just been merged, launched at this step.
        if self.clock.synchronous and self.synchronous_phase_is_over:
            self._end_synchronous_phase()

    def merge(self, sync: FragmentSync) -> bool:
        """Wait for the mean, if it is not there yet, and let it meet state and parameters.

        Returns: whether it has come; not where a worker was lost on its way.
        """
        pending = sync.pending
        assert pending is not None
        left = self.weights.left_at is not None
        try:
            weight, extras = self.reducer.finish(
                sync, may_be_empty=self._may_be_empty or left or self.clock.timed
            )
        except MeanLost:
            self._lose(sync)
            return False
        handle = pending.handle
        self.counters.waited(handle, sync.index)
        if handle.caught_up is not None and self.catch_up is not None:
            self.catch_up(sync, handle, pending.samples)
            return True
        sync.seconds = handle.seconds
        start = time.perf_counter()
        with record_function("distoptim::merge"):
            if weight == 0:
                self.ended = left
                return True
            # Who gives to one that is behind looks at it from another thread.
            sync.merging = True
            if sync.extra:
                self._hear(extras)
            workers = float(handle.workers or self.communicator.size)
            workers *= 1.0 if weight == 1 else self.weights.share(weight)
            # Not twice, if another fragment's merge has replaced this one's since it was launched.
            if (
                sync.fragment.device.type != "cpu"
                and not pending.finite
                and sync.replaced < sync.launched
            ):
                self._quarantine(sync)
            # These two before the rule, which may overwrite the mean.
            if sync.likeness is not None and sync.merges > 2:
                sync.compare(workers)
            if sync.compressed is not None:
                sync.compressed.merging(sync.buffer.tensor)
            self.active.merge(
                sync.fragment,
                sync.state,
                Mean(sync.buffer, workers, pending.lr, sync.compressed),
            )
            sync.merges += 1
            sync.merging = False
            sync.unheard = None
            if self._inner.reset_at_merge and not self.clock.synchronous:
                self._inner.forget(sync.fragment.params)
        self.counters.merged(self.step - sync.launched, sync.index, time.perf_counter() - start)
        return True

    def _hear(self, extras: Tensor) -> None:
        """Take what came with the first fragment's mean: what the period measures, and statistics."""
        self.clock.told(extras[: self._measured].tolist())
        if self.statistics is not None:
            self.statistics.mean = extras[self._measured :]

    @torch.no_grad()
    def launch_due(self) -> None:
        """Launch the fragments whose round ends at this step.

        The first one may change the length of the rounds.
        """
        clock = self.clock
        round_ends = self.syncs[0].next_launch <= self.step and not clock.fixed
        if round_ends and clock.expected_s:
            self._expect()
        if round_ends and clock.advance(self.step):
            # Nothing may be in flight when rounds begin anew.
            self.drain()
            for sync in self.syncs:
                if sync.fragment.offset_at(clock.tau):
                    sync.schedule(self.step, clock.tau)
        for sync in self.syncs:
            if sync.next_launch <= self.step:
                self.launch(sync)
                sync.next_launch = self.step + clock.tau
        if round_ends and clock.timed:
            clock.begin_time(self.step, self._computed_s(), anew=False)
        self.plan()

    def launch(self, sync: FragmentSync, kind: Kind = Kind.ROUND) -> None:
        """Form the payload and start its mean, without waiting."""
        start = time.perf_counter()
        with record_function("distoptim::launch"):
            finite = self._form(sync)
            # Not in the first rounds, in which delayed algorithms have not yet moved x.
            if sync.likeness is not None and sync.merges > 2:
                sync.likeness.look(sync.buffer.tensor[: sync.fragment.numel])
            weight = 1.0
            weighing = Weighing.ALIKE
            extras: list[Tensor | float] = []
            weights = self.weights
            if self.clock.timed:
                weighing = weights.weighing
                weight = self._weight_of_time(sync)
            elif weights.samples is not None or weights.left_at is not None:
                weighing = weights.weighing
                since = max(0, sync.launched)
                weight = weights.weight(step=self.step, since=since, samples=sync.samples)
            if sync.extra:
                extras = self._measure()
            # Before it is sent: what is wrong with it can be told in the place of this message.
            lr = [self._inner.lr(group) for group, _ in sync.fragment.segments]
            # As `identity`, written out on the path of every round.
            identity = identify(
                kind,
                sync.index,
                self.reducer.messages,
                self.step,
                weighing,
                alike=not self.clock.timed,
                # One for all says nothing of how param groups are cut, which may differ.
                lr=lr[: None if len(set(lr)) > 1 else 1] if self._follows_lr else (),
            )
            # For so long who comes late has done nothing wrong.
            self.communicator.begin_round(self.clock.delay * self.counters.step_s)
            handle = self.reducer.start(sync, finite, weight, extras, identity)
        self.counters.launched(sync.index, sync.nbytes, time.perf_counter() - start)
        self._note_launch(sync, handle, finite, lr, launched=self.step, identity=identity)

    def _weight_of_time(self, sync: FragmentSync) -> float:
        return self.weights.weight_of_time(
            step=self.step,
            since=max(0, sync.launched),
            samples=sync.samples,
            usual=self.clock.memory.get("steps"),
        )

    def _measure(self) -> list[Tensor | float]:
        """What this worker sends along for the period."""
        return self.clock.measure(
            step=self.step,
            lr=self._inner.lr(0),
            computed_s=self._computed_s(),
            communication_s=sum(sync.seconds for sync in self.syncs),
            has_data=self.weights.left_at is None,
        )

    def _form(self, sync: FragmentSync) -> Tensor:
        """Write the payload into the buffer; whether it is finite."""
        rule = self.active
        fragment = sync.fragment
        rule.payload(fragment, sync.state, sync.buffer)
        finite = mark_finite(sync.buffer.tensor, fragment)
        # On other devices the host does not know yet; see `merge`.
        if fragment.device.type == "cpu" and not finite:
            self._quarantine(sync)
            # Of what it was put back to, for `sent` below; nothing of it is sent (`Reducer.start`).
            rule.payload(fragment, sync.state, sync.buffer)
        if self.statistics is not None and sync.index == 0 and finite:
            start = fragment.numel + self._measured
            self.statistics.write(sync.buffer.tensor[start : fragment.numel + sync.extra])
        if sync.kept is not None:
            sync.keep()
        # After the payload was read: rules that move x at the launch send what it was before.
        rule.sent(fragment, sync.state, sync.buffer)
        return finite

    def _note_launch(
        self,
        sync: FragmentSync,
        handle: Handle,
        finite: Tensor,
        lr: list[float],
        *,
        launched: int,
        identity: Identity | None = None,
    ) -> None:
        due = launched + self.clock.delay
        sync.pending = PendingMean(handle, finite, due, lr, identity, sync.samples)
        sync.launched = launched
        sync.samples = self.weights.samples or 0.0

    def plan(self) -> None:
        """Note what is in flight, in order of launch, and the next step at which something is due."""
        in_flight = [sync for sync in self.syncs if sync.pending is not None]
        self._in_flight = sorted(in_flight, key=lambda sync: sync.launched)
        self._pending = [sync.pending for sync in self._in_flight if sync.pending is not None]
        events = [sync.next_launch for sync in self.syncs]
        events += [pending.due for pending in self._pending]
        self._next_event = min(events)

    # ---- where rounds begin -----------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin the algorithm's first round, from parameters that all workers share."""
        # The first use of it imports a module of torch, for which the first launch is not to wait.
        with record_function("distoptim::begin"):
            for sync in self.syncs:
                sync.schedule(self.step, self.clock.tau)
                if self.clock.delay == self.clock.tau:
                    self._begin_in_flight(sync)
        self.begin_time()
        self.plan()

    def _begin_in_flight(self, sync: FragmentSync) -> None:
        """As if a mean of the parameters, which all workers share, had been launched a round ago."""
        finite = self._form(sync)
        lr = [self._inner.lr(group) for group, _ in sync.fragment.segments]
        launched = sync.next_launch - self.clock.tau
        self._note_launch(sync, FinishedHandle(sync.buffer.tensor), finite, lr, launched=launched)

    def begin_time(self) -> None:
        """A round of equal time begins at this step, if rounds are."""
        if self.clock.timed:
            self.clock.begin_time(self.step, self._computed_s())

    def _expect(self) -> None:
        """Agree on how long a local step takes, at the end of the first round; blocks."""
        # Whoever is elsewhere does not come for the message below.
        self.meet(Kind.ROUND)
        with self.reducer.guard():
            everybody: list[Any] = self.communicator.all_gather_json(
                self.counters.step_s, what="average(), the first round"
            )
        self.clock.expected(sum(everybody) / len(everybody))

    @property
    def synchronous_phase_is_over(self) -> bool:
        """Whether its last mean has been launched."""
        clock = self.clock
        return clock.synchronous and self.syncs[0].launched == self.step >= clock.period.start

    def _end_synchronous_phase(self) -> None:
        self.clock.synchronise(False)
        self._activate()
        tau = self.clock.tau
        logger.info("local step %d: tau 1 -> %d: the synchronous phase is over", self.step, tau)
        for sync in self.syncs:
            sync.state = self.rule.start(sync.fragment)
        self._code()
        self._begin()

    def _activate(self) -> None:
        """The rule; in the synchronous phase x <- mean, and the rule's state stays as it is."""
        self.active = Average(carry=False) if self.clock.synchronous else self.rule
        # Where workers come and go, who is behind takes the others' rates.
        self._follows_lr = self.active.follows_lr and not self.communicator.elastic

    def _code(self) -> None:
        """Make the coded means.

        In the synchronous phase what all workers share is the last mean, not the anchor.
        """
        for sync in self.syncs:
            anchor = None if self.clock.synchronous else self.anchor(sync)
            self.reducer.code(sync, None if anchor is None else anchor.tensor)

    def resume_at(self, step: int) -> None:
        """Go on from a local step with what the fragments hold."""
        self.step = step
        synchronous = step < self.clock.period.start
        if synchronous != self.clock.synchronous:
            self.clock.synchronise(synchronous)
            self._activate()
            self._code()
        self.plan()

    # ---- what does not come, or is not finite -----------------------------------------------------

    def _quarantine(self, sick: FragmentSync) -> None:
        """Send a worker whose parameters are not finite back to values that are.

        The inner state of what was not finite is forgotten. All fragments are replaced at once: the next
        forward pass would carry NaN from one that is not to those that are.

        Args:
            sick: whose payload is not finite.
        """
        replaced = [s for s in self.syncs if s is sick or not is_finite(s.fragment)]
        names = ", ".join(sync.name for sync in replaced)
        self.counters.quarantined += 1
        rank = self.communicator.ranks[self.communicator.rank]
        warnings.warn(
            f"rank {rank}: parameters of {names} are not finite at local step "
            f"{self.step}: left out of this mean and replaced",
            QuarantineWarning,
            stacklevel=2,
        )
        for sync in replaced:
            fallback = self.active.fallback(sync.state)
            if fallback is None and sync is not sick and sync.pending is None:
                # A rule that writes the mean over x: its last one is still in the buffer.
                fallback = sync.buffer
            if fallback is not None:
                sync.fragment.write(fallback)
            self._inner.forget(sync.fragment.params)
            sync.replaced = self.step

    def _lose(self, sync: FragmentSync) -> None:
        """A mean will not come; local steps go on, and the next launch is as any other."""
        if sync.kept is not None and sync.kept.tensor[-1]:
            sync.unheard = Unheard(sync.kept.tensor[:-1].clone(), sync.samples)
        self.give_up(sync)
        # What is in the buffer is nobody's mean, to which a worker could go back.
        sync.fragment.read(sync.buffer)
        self.counters.lose(sync.index)

    def give_up(self, sync: FragmentSync) -> None:
        """Be as if the last launch had not been; the next one weighs as many samples as are in it."""
        if sync.pending is not None:
            sync.samples = sync.pending.samples
        sync.pending = None
        self.active.abandoned(sync.fragment, sync.state, sync.kept)

    def _abandon(self) -> None:
        """Nothing that is in flight will come any more."""
        for sync in self.syncs:
            if sync.pending is not None:
                self.give_up(sync)
        self.plan()

    def _take_over(self, handle: Handle) -> None:
        """What the others share, which a message outside of rounds has brought."""
        assert self.catch_up is not None
        self.catch_up(None, handle, 0.0)

    # ---- for calls of all workers (`calls`) -------------------------------------------------------

    def drain(self) -> None:
        """Merge all that is in flight, blocking."""
        for sync in list(self._in_flight):
            if sync.pending is not None:
                self.merge(sync)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for what is in flight without merging it; a failure comes up at the next step.

        What this worker was found to be behind by is taken over.
        """
        for sync in self.reducer.settle(list(self._in_flight)):
            self._lose(sync)
        for sync in list(self._in_flight):
            if sync.pending is not None and sync.pending.handle.caught_up is not None:
                self.merge(sync)
        self.plan()

    def settle_now(self) -> None:
        """Wait for what is in flight; a failure is raised here, before anything more is sent."""
        self.reducer.check()
        self.settle()
        self.reducer.check()

    def meet(self, kind: Kind, *, limit_s: float | None = None) -> None:
        """See by one message that all workers are in the same call; see `calls.Calls.meet`."""
        self.settle_now()
        first = self.next_first()[0]
        self.reducer.meet(first, self.identity(kind, first.index), limit_s=limit_s)

    def next_first(self) -> list[FragmentSync]:
        """The fragments in the order of their next launches, which is the same on all workers.

        The first message of whatever is no regular launch must be of the first one's length: see
        `Reducer.meet`.
        """
        return sorted(self.syncs, key=lambda sync: (sync.next_launch, sync.index))

    def identity(self, kind: Kind, fragment: int) -> Identity:
        """Of the next message."""
        # Workers that load may come from anywhere: their steps are equal afterwards.
        alike = not self.clock.timed and kind is not Kind.LOAD
        return identify(
            kind, fragment, self.reducer.messages, self.step, self.weights.weighing, alike=alike
        )

    def check_local(self) -> None:
        """Whether parameters are the worker's own.

        Raises:
            RuntimeError: they are the workers' mean, and what is done to them would be lost.
        """
        if self.evaluating:
            raise RuntimeError(
                "inside averaged() parameters are the workers' mean, and local again after it; train "
                "outside of the block"
            )

    # ---- for whoever looks on: simulators, other threads, algorithms ------------------------------

    @property
    def waits(self) -> bool:
        """Whether this step's merges and launches are still to come."""
        return self.step >= self._next_event

    @property
    def idle(self) -> int:
        """How many local steps from here on have nothing due after them, and may be counted at once."""
        # A timed round asks the clock at every step, and the first step is where seconds are counted from.
        if self.clock.timed or self.counters.started_at is None:
            return 0
        return max(0, self._next_event - self.step - 1)

    def skip(self, steps: int) -> None:
        """Count so many of the `idle` local steps."""
        self.step += steps
        self.counters.ticks += steps

    def look_soon(self) -> None:
        """Look after the next local step whether something is due; from whatever thread."""
        self._next_event = 0

    def poll(self) -> None:
        """Let what is in flight do what can be done without waiting (second stages, times)."""
        for pending in self._pending:
            pending.handle.poll()

    def lr(self, group: int) -> float:
        """The inner learning rate of a param group now."""
        return self._inner.lr(group)

    def _computed_s(self) -> float:
        """Seconds that this worker has not waited for communication."""
        return self.communicator.now() - self.counters.collect()

    def anchor(self, sync: FragmentSync) -> Flat | None:
        """What is equal on all workers while a mean is in flight; None where a rule has no such thing."""
        anchor = self.rule.shared(sync.state).get("anchor")
        return anchor if isinstance(anchor, Flat) else None

    def shared_state(self) -> list[dict[str, Any]]:
        """Of each fragment, what is equal on all workers: anchor and outer state; live."""
        return [dict(self.rule.shared(sync.state)) for sync in self.syncs]

    # ---- saving and resuming ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-equal; what is in flight is waited for, saved as its mean.

        A mean that cannot be had because a peer is gone is left out: the failure comes up at the next
        `average()`.
        """
        self.settle()
        members = self.communicator.state_dict()
        return {
            **({"elastic": members} if members else {}),
            "rule": type(self.rule).__name__,
            "workers": self.communicator.size,
            "rank": self.communicator.rank,
            "step": self.step,
            "tau": self.clock.tau,
            "delay": self.clock.delay,
            "clock": self.clock.state_dict(),
            **self._time_state(),
            "weights": self.weights.state_dict(),
            "fragments": [sync.state_dict() for sync in self.syncs],
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a state that fits (see `saved.check_rounds`) into the engine.

        With period, delay and number of workers unchanged the run goes on as if it had never stopped.
        Otherwise what was in flight is dropped and a new round begins; at another number of workers
        every worker starts from the anchor, where there is one.
        """
        elastic = self.communicator.elastic
        same_rank = saved["workers"] == self.communicator.size and (
            not elastic or saved["rank"] == self.communicator.rank
        )
        # Where workers come and go it is not their number by which they are the same.
        same_workers = same_rank or elastic
        goes_on = same_workers and self.clock.load_state_dict(saved["clock"])
        if goes_on:
            self.weights.load_state_dict(saved["weights"])
        self.resume_at(saved["step"])
        at = (self.clock.tau, self.clock.delay)
        goes_on = goes_on and (saved["tau"], saved["delay"]) == at
        for sync, record in zip(self.syncs, saved["fragments"], strict=True):
            sync.load_state_dict(record, same_workers=same_workers, same_rank=same_rank)
            sync.launched = saved["step"]
            sync.samples = self.weights.total
            sync.schedule(self.step, self.clock.tau)
            if goes_on:
                sync.resume(record, workers=saved["workers"])
            anchor = self.anchor(sync)
            if not same_workers and anchor is not None:
                sync.fragment.write(anchor)
        self.resume_at(saved["step"])
        if self.clock.timed:
            if goes_on and "time" in saved:
                self.clock.load_time(saved["time"], self._computed_s())
            else:
                self.begin_time()

    @torch.no_grad()
    def begin_at_shared(self) -> None:
        """x <- what the others share: of one that has loaded a file, and joined a run that is further."""
        for sync in self.syncs:
            fallback = self.active.fallback(sync.state)
            # A rule that writes the mean over x: its last one is still in the buffer.
            sync.fragment.write(sync.buffer if fallback is None else fallback)

    def _time_state(self) -> dict[str, Any]:
        return {"time": self.clock.time_state(self._computed_s())} if self.clock.timed else {}
