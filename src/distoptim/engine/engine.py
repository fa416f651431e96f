"""Time: when to launch, when to merge, what is in flight.

The only place that counts local steps.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from distoptim.algorithms.rules import Adopt
from distoptim.comm.codecs import Coding
from distoptim.comm.communicator import Communicator
from distoptim.comm.compressed import CompressedMean, check_codable
from distoptim.comm.handles import Handle
from distoptim.engine import packing
from distoptim.engine.clock import Pace
from distoptim.engine.fragment_sync import Flight, QuarantineWarning, Slot
from distoptim.engine.reducer import Collectives
from distoptim.engine.stats import Counters
from distoptim.fragments import Fragment
from distoptim.periods import Tau
from distoptim.rule import Mean, Rule

logger = logging.getLogger("distoptim")


class Engine(Collectives):
    """Keeps the rounds of all fragments.

    A fragment is launched at local steps offset, offset + tau, ... (tau, 2 tau, ... for offset 0)
    and merged `delay` local steps later. At delay = tau, merge and next launch fall together, and
    round 0 counts as in
    flight from the start: all workers "sent" the same x0, so its mean is known without
        communication.

    Args:
        fragments: in the order in which all ranks launch them.
        rule: what is sent and how it is merged.
        communicator: moves the bytes.
        tau: local steps in a round, >= 1, or what chooses them.
        delay: local steps from launch to merge, in [0, tau].
        timeout_s: bound of every wait, in seconds.
        inner_lr: param group -> its learning rate now.
        forget: clears the inner optimizer's state of the given parameters.
        reset_inner: forget at every merge too.
        codec: in which payloads travel; None: as they are.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        rule: Rule,
        communicator: Communicator,
        *,
        tau: Tau,
        delay: Tau,
        timeout_s: float,
        inner_lr: Callable[[int], float],
        forget: Callable[[Sequence[Tensor]], None],
        reset_inner: bool = False,
        codec: Coding | None = None,
    ) -> None:
        super().__init__(communicator, timeout_s)
        self.rule, self.pace = rule, Pace(tau, delay)
        self.step, self.counters = 0, Counters()
        self._inner_lr, self._forget, self._reset_inner = inner_lr, forget, reset_inner
        self.ended = self.may_be_empty = False
        self.slots = [
            Slot(i, f, rule.start(f), f.flat(extra=1 + extra), 0, extra=extra)
            for i, f in enumerate(fragments)
            for extra in [0 if i else len(self.pace.period.measures)]
        ]
        self._codec = codec
        self._code()
        self._begin()

    @property
    def tau(self) -> int:
        """Local steps in the present round."""
        return self.pace.tau

    @property
    def delay(self) -> int:
        """Local steps from launch to merge at present."""
        return self.pace.delay

    @property
    def _active(self) -> Rule:
        return Adopt() if self.pace.synchronous else self.rule

    def _code(self) -> None:
        """Make the coders.

        In the synchronous phase what all workers share is the last mean, not the anchor.
        """
        if self._codec is not None:
            for slot in self.slots:
                fragment = slot.fragment
                check_codable(self._codec, fragment.dtype, fragment.device)
                start = fragment.flat()
                fragment.read(start)
                slot.coder = CompressedMean(
                    self._codec,
                    self.communicator,
                    numel=fragment.numel,
                    extra=1 + slot.extra,
                    start=start.tensor,
                    shared=None if self.pace.synchronous else slot.shared,
                )

    def _begin(self) -> None:
        """Begin the algorithm's first round, from parameters that all workers share."""
        for slot in self.slots:
            self.place(slot)
            if self.delay == self.tau:
                finite = self._pack(slot, start=True)
                self._take_off(
                    slot, Handle(slot.buffer.tensor), finite, launched=slot.next_launch - self.tau
                )
        self._plan()

    def place(self, slot: Slot) -> None:
        """Begin a slot's rounds anew at this step."""
        slot.next_launch = self.step + (slot.fragment.offset_at(self.tau) or self.tau)

    def tick(self) -> None:
        """One local step is done: merge and launch what is due."""
        self.count()
        if self.step >= self._next_event:
            self.finish_due()
            self.launch_due()
            if self.delay == 0:
                self.finish_due()
            self.counters.tick(self.communicator.now())

    def count(self) -> None:
        """The first part of `tick`, before anything is merged.

        A simulator calls the parts for all workers in turn.
        """
        self._check()
        self.counters.tick(self.communicator.now())
        self.step += 1
        self.poll()

    def poll(self) -> None:
        """Let what is in flight go on, without waiting."""
        for flight in self._flights:
            flight.handle.poll()

    @torch.no_grad()
    def launch_due(self) -> None:
        """Launch the fragments whose round ends at this step.

        The first one may change the length of the rounds.
        """
        first = self.slots[0]
        if first.next_launch <= self.step and self.pace.change(self.step):
            # Nothing may be in flight when rounds begin anew.
            self.drain()
            for slot in self.slots:
                if slot.fragment.offset_at(self.tau):
                    self.place(slot)
        for slot in self.slots:
            if slot.next_launch <= self.step:
                self._launch(slot)
                slot.next_launch = self.step + self.tau
        self._plan()

    @torch.no_grad()
    def finish_due(self) -> None:
        """Merge, in order of launch, the means that are due at this step."""
        for slot in list(self._flying):
            # None if its merge has just failed.
            if slot.flight is not None and slot.flight.due <= self.step:
                self._finish(slot)
        self._plan()
        if self.pace.synchronous and self.slots[0].launched == self.step >= self.pace.period.start:
            self._end_synchronous_phase()

    @torch.no_grad()
    def flush(self) -> None:
        """Merge what is in flight, then average the steps made since the last launch, blocking.

        A new round begins at this step; at delay = tau its end has nothing to merge yet.
        """
        self._check()
        self.drain()
        for slot in self.slots:
            if slot.launched < self.step:
                self._launch(slot)
                self._finish(slot)
            self.place(slot)
        self._plan()

    def drain(self) -> None:
        """Merge all that is in flight, blocking."""
        for slot in list(self._flying):
            self._finish(slot)

    def resume_at(self, step: int) -> None:
        """Go on from a local step with what the slots hold."""
        self.step = step
        synchronous = step < self.pace.period.start
        if synchronous != self.pace.synchronous:
            self.pace.synchronous = synchronous
            self._code()
        self._plan()

    def _end_synchronous_phase(self) -> None:
        self.pace.synchronous = False
        logger.info(
            "local step %d: tau 1 -> %d: the synchronous phase is over", self.step, self.tau
        )
        for slot in self.slots:
            slot.state = self.rule.start(slot.fragment)
        self._code()
        self._begin()

    def _plan(self) -> None:
        self._flying = sorted(
            (s for s in self.slots if s.flight is not None), key=lambda s: s.launched
        )
        self._flights = [slot.flight for slot in self._flying if slot.flight is not None]
        self._next_event = min(
            [slot.next_launch for slot in self.slots] + [flight.due for flight in self._flights]
        )

    def _launch(self, slot: Slot) -> None:
        start = time.perf_counter()
        with record_function("distoptim::launch"):
            finite = self._pack(slot)
            handle = self._start(slot.buffer.tensor, slot)
        self.counters.overhead_s += time.perf_counter() - start
        self.counters.bytes += slot.nbytes
        self._take_off(slot, handle, finite, launched=self.step)

    def _take_off(self, slot: Slot, handle: Handle, finite: Tensor, *, launched: int) -> None:
        lr = [self._inner_lr(group) for group, _ in slot.fragment.segments]
        slot.flight = Flight(handle, finite, launched + self.delay, lr)
        slot.launched = launched

    def _pack(self, slot: Slot, *, start: bool = False) -> Tensor:
        pace = self.pace
        weight = (
            1.0
            if start
            else pace.weight(step=self.step, since=max(0, slot.launched), samples=slot.samples)
        )
        extra: list[Tensor | float] = []
        if slot.extra and not start:
            extra = pace.measure(
                step=self.step,
                lr=self._inner_lr(0),
                computed_s=self.communicator.now() - self.counters.collect(),
                communication_s=sum(s.seconds for s in self.slots),
            )
        slot.samples = pace.samples or 0.0
        return packing.pack(self._active, slot, weight, extra, self._heal)

    def _heal(self, slot: Slot) -> None:
        """Send a worker whose parameters are not finite back to a value that is, without its inner state."""
        self.counters.quarantined += 1
        warnings.warn(
            f"rank {self.communicator.rank}: parameters of {packing.name_of(slot)} are not finite at local step "
            f"{self.step}: left out of this mean and replaced",
            QuarantineWarning,
            stacklevel=2,
        )
        fallback = self._active.fallback(slot.state)
        if fallback is not None:
            slot.fragment.write(fallback)
        self._forget(slot.fragment.params)

    def _finish(self, slot: Slot) -> None:
        flight = slot.flight
        assert flight is not None
        self._wait(flight.handle, slot)
        slot.flight = None
        self.counters.waited(flight.handle)
        slot.seconds = flight.handle.seconds
        start = time.perf_counter()
        with record_function("distoptim::merge"):
            buffer = slot.buffer.tensor
            weight = packing.normalise(
                buffer,
                flight.handle,
                packing.name_of(slot),
                self.may_be_empty or self.pace.left_at is not None,
            )
            if weight == 0:
                self.ended = True
                return
            workers = self.pace.share(weight) * self.communicator.size
            if slot.extra:
                self.pace.told(
                    [flight.handle.tail(i - 1 - slot.extra) / weight for i in range(slot.extra)]
                )
            if slot.fragment.device.type != "cpu" and not flight.finite:
                self._heal(slot)
            if slot.coder is not None:
                slot.coder.merging(buffer)
            self._active.merge(slot.fragment, slot.state, Mean(slot.buffer, workers, flight.lr))
            slot.merges += 1
            if self._reset_inner and not self.pace.synchronous:
                self._forget(slot.fragment.params)
        self.counters.merged(self.step - slot.launched, time.perf_counter() - start)
