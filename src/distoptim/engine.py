"""Time: when to launch, when to merge, what is in flight. The only place that counts local steps."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.profiler import record_function

from distoptim.algorithms.rule import Mean, Rule
from distoptim.coder import Coder
from distoptim.comm.codec import Coding
from distoptim.comm.communicator import CommunicationError, Communicator, Handle
from distoptim.fragments import Flat, Fragment
from distoptim.slot import Flight, QuarantineWarning, Slot, weigh
from distoptim.stats import Counters

logger = logging.getLogger("distoptim")


class Engine:
    """Keeps the rounds of all fragments.

    A fragment is launched at local steps offset, offset + tau, ... (tau, 2 tau, ... for offset 0) and merged
    `delay` local steps later. At delay = tau, merge and next launch fall together, and round 0 counts as in
    flight from the start: all workers "sent" the same x0, so its mean is known without communication.

    Args:
        fragments: in the order in which all ranks launch them.
        rule: what is sent and how it is merged.
        communicator: moves the bytes.
        tau: local steps in a round, >= 1.
        delay: local steps from launch to merge, in [0, tau].
        timeout_s: bound of every wait, in seconds.
        inner_lr: param group -> its learning rate now.
        forget: clears the inner optimizer's state of the given parameters.
        reset_inner: forget at every merge too.
        codec: in which payloads travel; None: as they are.
    """

    def __init__(self, fragments: Sequence[Fragment], rule: Rule, communicator: Communicator, *, tau: int,
                 delay: int, timeout_s: float, inner_lr: Callable[[int], float],
                 forget: Callable[[Sequence[Tensor]], None], reset_inner: bool = False,
                 codec: Coding | None = None) -> None:
        self.rule, self.communicator = rule, communicator
        self.tau, self.delay, self.timeout_s = tau, delay, timeout_s
        self.step = 0
        self.counters = Counters()
        self.failure: CommunicationError | None = None
        self._inner_lr, self._forget, self._reset_inner = inner_lr, forget, reset_inner
        self.slots = [Slot(i, f, rule.start(f), f.flat(extra=1), f.offset or tau) for i, f in enumerate(fragments)]
        if codec is not None:
            for slot in self.slots:
                slot.coder = Coder(codec, communicator, slot.fragment, extra=1, shared=slot.shared)
        if delay == tau:
            for slot in self.slots:
                finite = self._pack(slot)
                self._take_off(slot, Handle(slot.buffer.tensor), finite, launched=slot.next_launch - tau)
        self._plan()

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
        """The first part of `tick`, before anything is merged; a simulator calls the parts for all workers in turn."""
        self._check()
        self.counters.tick(self.communicator.now())
        self.step += 1
        for flight in self._flights:
            flight.handle.poll()

    @torch.no_grad()
    def launch_due(self) -> None:
        """Launch the fragments whose round ends at this step."""
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

    @torch.no_grad()
    def flush(self) -> None:
        """Merge what is in flight, then average the steps made since the last launch, blocking.

        A new round begins at this step; at delay = tau its end has nothing to merge yet.
        """
        self._check()
        for slot in list(self._flying):
            self._finish(slot)
        for slot in self.slots:
            if slot.launched < self.step:
                self._launch(slot)
                self._finish(slot)
            slot.next_launch = self.step + (slot.fragment.offset or self.tau)
        self._plan()

    @torch.no_grad()
    def mean_of(self, fragment: Fragment) -> Flat:
        """The workers' mean of a fragment's values now, in a new buffer; blocking and collective."""
        self._check()
        flat = fragment.flat(extra=1)
        fragment.read(flat)
        weigh(flat.tensor, fragment)
        handle = self._start(flat.tensor)
        self._wait(handle)
        self._normalise(flat.tensor, handle)
        return flat

    def close(self) -> None:
        """Wait for what is in flight, then leave the communicator; what comes after fails."""
        self.settle()
        self.communicator.close()
        self.failure = self.failure or CommunicationError("the optimizer has been closed")

    def settle(self) -> None:
        """Wait for what is in flight without merging it. A failure is kept for the next step, not raised."""
        for slot in list(self._flying):
            if slot.flight is not None:
                try:
                    self._wait(slot.flight.handle, slot)
                except CommunicationError:
                    logger.warning("a mean in flight is lost: %s", self.failure)
                    return

    def resume_at(self, step: int) -> None:
        """Go on from a local step with what the slots hold."""
        self.step = step
        self._plan()

    def _plan(self) -> None:
        self._flying = sorted((s for s in self.slots if s.flight is not None), key=lambda s: s.launched)
        self._flights = [slot.flight for slot in self._flying if slot.flight is not None]
        self._next_event = min([slot.next_launch for slot in self.slots] + [flight.due for flight in self._flights])

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

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

    def _pack(self, slot: Slot) -> Tensor:
        """Form the payload and its weight: 1, or 0 (and the payload with it) where it is not finite."""
        fragment, buffer = slot.fragment, slot.buffer
        self.rule.payload(fragment, slot.state, buffer)
        if fragment.device.type != "cpu":
            # The flag follows the payload through the stream; reading it here would stop host and device.
            finite = weigh(buffer.tensor, fragment).to("cpu", non_blocking=True)
            self.rule.launched(fragment, slot.state, buffer)
            return finite
        finite = weigh(buffer.tensor, fragment)
        if not finite:
            self._heal(slot)
            self.rule.payload(fragment, slot.state, buffer)
        self.rule.launched(fragment, slot.state, buffer)
        if not finite:
            buffer.tensor.zero_()
        return finite

    def _heal(self, slot: Slot) -> None:
        """Send a worker whose parameters are not finite back to a value that is, without its inner state."""
        self.counters.quarantined += 1
        warnings.warn(
            f"rank {self.communicator.rank}: parameters of {_name(slot)} are not finite at local step "
            f"{self.step}: left out of this mean and replaced", QuarantineWarning, stacklevel=2)
        fallback = self.rule.fallback(slot.state)
        if fallback is not None:
            slot.fragment.write(fallback)
        self._forget(slot.fragment.params)

    def _start(self, buffer: Tensor, slot: Slot | None = None) -> Handle:
        try:
            if slot is not None and slot.coder is not None:
                return slot.coder.launch(buffer)
            return self.communicator.launch_mean(buffer)
        except RuntimeError as error:
            self._fail(slot, 0.0, error)

    def _wait(self, handle: Handle, slot: Slot | None = None) -> None:
        try:
            with record_function("distoptim::wait"):
                handle.wait(self.timeout_s)
        except RuntimeError as error:
            self._fail(slot, self.communicator.now() - handle.launched_at, error)

    def _finish(self, slot: Slot) -> None:
        flight = slot.flight
        assert flight is not None
        self._wait(flight.handle, slot)
        slot.flight = None
        self.counters.waited(flight.handle)
        start = time.perf_counter()
        with record_function("distoptim::merge"):
            buffer = slot.buffer.tensor
            workers = self._normalise(buffer, flight.handle, slot)
            if slot.fragment.device.type != "cpu" and not flight.finite:
                self._heal(slot)
            if slot.coder is not None:
                slot.coder.merging(buffer)
            self.rule.merge(slot.fragment, slot.state, Mean(slot.buffer, workers, flight.lr))
            if self._reset_inner:
                self._forget(slot.fragment.params)
        self.counters.merged(self.step - slot.launched, time.perf_counter() - start)

    def _normalise(self, buffer: Tensor, handle: Handle, slot: Slot | None = None) -> float:
        """Mean of weighted payloads -> weighted mean; returns the sum of the weights."""
        weight = handle.tail()
        if weight == 0:
            raise FloatingPointError(f"{_name(slot)}: no worker has finite values at local step {self.step}; "
                                     "the anchor is as it was")
        if weight != 1:
            buffer.div_(weight)
        return weight * self.communicator.size

    def _fail(self, slot: Slot | None, seconds: float, error: Exception) -> NoReturn:
        """Give up communication for good, keeping parameters and state; peers see our groups close."""
        self.failure = CommunicationError(
            f"rank {self.communicator.rank}: mean of {_name(slot)} failed {seconds:.1f} s after its launch "
            f"(timeout {self.timeout_s:g} s): {error}. Parameters and anchor are valid: save them, and restart "
            "with the workers that are left")
        for other in self.slots:
            other.flight = None
        self._plan()
        self.communicator.close()
        raise self.failure from error


def _name(slot: Slot | None) -> str:
    return "all parameters" if slot is None else f"fragment {slot.index}"
