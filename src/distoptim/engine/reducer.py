"""Payloads -> their weighted mean over the workers: the finite check, bounded waits, one error.

A message is [payload, what the period measures, identity, 1]; all but the identity comes times the
worker's weight, so that the mean of the last element is the mean weight, by which the rest is divided on
arrival.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, cast, final

import torch
from torch import Tensor
from torch.profiler import record_function

from distoptim.comm import CommunicationError, Communicator, Handle, MeanLost
from distoptim.comm.codecs import Coding
from distoptim.comm.communicator import unlike_calls
from distoptim.comm.compressed import CompressedMean, check_codable
from distoptim.engine.fragment_sync import FragmentSync
from distoptim.engine.identity import SIZE, Identity
from distoptim.fragments import Flat, Fragment

logger = logging.getLogger("distoptim")

# The sum of a fragment's values up to which they count as finite: squares are, and sums over all workers, times
# the samples that they weigh.
LIMITS = {dtype: torch.finfo(dtype).max ** 0.5 for dtype in (torch.float32, torch.float64)}


@final
class Reducer:
    """A communicator that is given up for good at the first failure.

    Args:
        communicator: moves the bytes.
        timeout_s: bound of every wait, in seconds.
        codec: in which payloads travel; None: as they are.
        abandon: called at a failure, when nothing that is in flight will come any more.
        take_over: called with a message outside of rounds that has found this worker behind the others.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        timeout_s: float,
        codec: Coding | None,
        abandon: Callable[[], None],
        take_over: Callable[[Handle], None],
    ) -> None:
        self.communicator = communicator
        self.timeout_s = timeout_s
        self.codec = codec
        self.failure: CommunicationError | None = None
        # Whether the failure is that workers were in unlike calls, or that one could not go on; and what was told.
        self.mismatched = False
        self.reason = ""
        # How many messages this worker has sent; in step with the other workers'.
        self.messages = 0
        self._abandon = abandon
        self._take_over = take_over

    def code(self, sync: FragmentSync, shared: Tensor | None) -> None:
        """Give a fragment a coded mean, if there is a codec: of the difference to `shared`.

        Args:
            sync: of parameters that are equal on all workers now.
            shared: what all workers share while a mean is in flight (the anchor); None: the last mean
                is kept for it.
        """
        if self.codec is None:
            return
        fragment = sync.fragment
        check_codable(self.codec, fragment.dtype, fragment.device)
        start = None
        if shared is None:
            flat = fragment.flat()
            fragment.read(flat)
            start = flat.tensor
        mean = CompressedMean(
            self.codec,
            self.communicator,
            numel=fragment.numel,
            extra=sync.extra + SIZE + 1,
            start=start,
            shared=shared,
        )
        sync.compressed = mean
        sync.nbytes = mean.nbytes

    def check(self) -> None:
        """Whether communication still works.

        Raises:
            CommunicationError: the failure of before.
        """
        if self.failure is not None:
            raise self.failure

    def start(
        self,
        sync: FragmentSync,
        finite: Tensor,
        weight: float,
        extras: Sequence[Tensor | float],
        identity: Identity,
    ) -> Handle:
        """Send a payload that `mark_finite` has looked at.

        Args:
            sync: whose buffer holds it.
            finite: the mark; a payload that is not finite is sent as 0 of weight 0.
            weight: of this worker.
            extras: numbers that travel with it, which the period has measured.
            identity: of the message.
        """
        fragment = sync.fragment
        buffer = sync.buffer.tensor
        numel = fragment.numel
        if fragment.device.type == "cpu" and not finite:
            buffer.zero_()
        for i, value in enumerate(extras):
            buffer[numel + i] = value
        if extras:
            # By 0 or 1: who is left out of the mean has measured nothing either.
            buffer[numel : numel + len(extras)].mul_(buffer[-1])
        if weight != 1:
            buffer.mul_(weight)
        # Last, since it carries no weight.
        buffer[-1 - SIZE : -1] = identity.code
        # As `_send`, written out on the path of every round.
        self.messages += 1
        try:
            if sync.compressed is not None:
                return sync.compressed.start(buffer)
            return self.communicator.all_reduce(buffer)
        except RuntimeError as error:
            self._fail(sync.name, 0.0, error)

    def finish(self, sync: FragmentSync, *, may_be_empty: bool) -> tuple[float, Tensor]:
        """Wait for a fragment's mean and weigh it.

        Returns: the mean weight, and the weighted mean of the extras, on the host.

        Raises:
            CommunicationError: it failed, did not come within the timeout, or is of something else.
            FloatingPointError: the weight is 0, which it may not be.
        """
        pending = sync.pending
        assert pending is not None
        self._wait(pending.handle, sync.name, pending.identity)
        # It has come, also where it is refused below.
        sync.pending = None
        tails = pending.handle.tails(sync.extra + SIZE + 1)
        # In a new tensor: dividing the buffer divides these on the host, and does not on another device.
        extras = tails[: sync.extra] / (tails[-1] or 1.0) if sync.extra else tails[:0]
        return _normalise(sync.buffer.tensor, tails, sync.name, may_be_empty), extras

    @torch.no_grad()
    def mean_of(
        self,
        fragment: Fragment,
        identity: Identity,
        *,
        extra: int = 0,
        weight: float = 1.0,
        may_be_empty: bool = False,
    ) -> Flat:
        """The workers' weighted mean of a fragment's values now, in a new buffer.

        Blocking and collective. Its last element is 1, or 0 where all weights are and that may be.

        Args:
            fragment: of which parameters.
            identity: of the message.
            extra: elements that make the message as long as one of the fragment's rounds.
            weight: of this worker.
            may_be_empty: whether all weights may be 0.

        Raises:
            MeanLost: a worker was lost on its way; or this one was behind, and the others are past this call:
                what it has taken over has no mean of these values.
        """
        self.check()
        flat = fragment.flat(extra=extra + SIZE + 1)
        fragment.read(flat)
        mark_finite(flat.tensor, fragment)
        if weight != 1:
            flat.tensor.mul_(weight)
        name = "all parameters"
        flat.tensor[-1 - SIZE : -1] = identity.code
        handle = self._send(self.communicator.all_reduce, flat.tensor, name)
        self._wait(handle, name, identity)
        if (caught_up := handle.caught_up) is not None:
            # That of the others' latest round stands for it.
            heard = handle.buffer
            self._take_over(handle)
            if caught_up.position["fragment"] != identity.fragment:
                raise MeanLost(
                    f"{name}: this worker was behind, and the others are past {identity}"
                )
            flat.tensor.copy_(heard)
        _normalise(flat.tensor, handle.tails(1), name, may_be_empty)
        return flat

    def meet(
        self,
        sync: FragmentSync,
        identity: Identity,
        *,
        limit_s: float | None = None,
        uncoded: bool = False,
    ) -> None:
        """See that all workers are in the same call, by a message of a round's form without payload.

        Whoever is elsewhere sends the next fragment's mean of its round: of the same length, so the two
        pair and both sides see it. (gloo ends the process where lengths differ.)

        Args:
            sync: the fragment that would be launched next.
            identity: of the message.
            limit_s: how long to wait for the others; by default the timeout.
            uncoded: in the form of `mean_of`, which has no codec.

        Raises:
            CommunicationError: on all workers, if they are not.
        """
        if self.communicator.in_lockstep:
            return
        self.check()
        empty = torch.zeros_like(sync.buffer.tensor)
        empty[-1 - SIZE : -1] = identity.code
        name = str(identity)
        if sync.compressed is None or uncoded:
            handle = self._send(self.communicator.all_reduce, empty, name)
        else:
            tail = empty[sync.fragment.numel :]
            handle = self._send(sync.compressed.start_empty, tail, name)
        self._wait(handle, name, identity, limit_s)
        if handle.caught_up is not None:
            self._take_over(handle)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around messages that are no means: their failure, too, is one for good."""
        try:
            yield
        except CommunicationError as error:
            self._leave(error)
            raise

    def settle(self, syncs: Iterable[FragmentSync]) -> list[FragmentSync]:
        """Wait for what is in flight without merging it; returns what was lost with a worker.

        A failure is kept for the next step, not raised.
        """
        lost = []
        for sync in syncs:
            # None if an earlier one of them has failed.
            if sync.pending is not None:
                try:
                    self._wait(sync.pending.handle, sync.name, sync.pending.identity)
                except MeanLost:
                    lost.append(sync)
                except CommunicationError:
                    logger.warning("a mean in flight is lost: %s", self.failure)
                    break
        return lost

    def close(self) -> None:
        """Leave the communicator; what comes after fails."""
        self.communicator.close()
        self.failure = self.failure or CommunicationError("the optimizer has been closed")

    def _send(self, launch: Callable[[Tensor], Handle], message: Tensor, name: str) -> Handle:
        self.messages += 1
        try:
            return launch(message)
        except RuntimeError as error:
            self._fail(name, 0.0, error)

    def _wait(
        self,
        handle: Handle,
        name: str,
        identity: Identity | None,
        limit_s: float | None = None,
    ) -> None:
        """Wait, and see that it is the mean of what all workers meant."""
        try:
            with record_function("distoptim::wait"):
                handle.wait(self.timeout_s if limit_s is None else limit_s)
        except MeanLost:
            raise
        except RuntimeError as error:
            self._fail(name, self.communicator.now() - handle.launched_at, error)
        # Who has caught up has sent the others' identity, not its own.
        if identity is not None and handle.caught_up is None:
            found = handle.tails(SIZE + 1)[:SIZE]
            workers = handle.workers or self.communicator.size
            # Not exactly, as `differs`, which is not on the path of every round.
            if bool((found - identity.code).abs().max() > 0.25 / workers) and identity.differs(
                found, workers
            ):
                self._mismatch(identity)

    def _mismatch(self, identity: Identity) -> NoReturn:
        """Tell who is where; all workers that took part in the mean come here."""
        self.mismatched = True
        raise self.give_up(self._where(identity))

    def _where(self, identity: Identity) -> str:
        """Who is in which call, or why one cannot go on."""
        elsewhere = f"this worker in {identity}, another one elsewhere"
        # Of virtual workers each hears itself alone.
        if self.communicator.in_lockstep:
            return unlike_calls(elsewhere)
        try:
            answers = self.communicator.all_gather_json(
                [str(identity), identity.cause, list(identity.lr)], what="where the workers are"
            )
        except RuntimeError as error:
            return unlike_calls(f"{elsewhere} ({error})")
        told = cast("list[tuple[str, str, list[float]]]", answers)
        causes = dict.fromkeys(cause for _, cause, _ in told if cause)
        if causes:
            return "; ".join(causes)
        ranks = self.communicator.ranks
        if all(place == str(identity) for place, *_ in told):
            rates = ", ".join(f"rank {r} has {lr}" for r, (*_, lr) in zip(ranks, told, strict=True))
            return (
                f"workers have other learning rates, which this algorithm's momentum follows: {rates} in {identity}; "
                "allowed are equal ones at every launch"
            )
        places = zip(ranks, told, strict=True)
        return unlike_calls(", ".join(f"rank {r} in {place}" for r, (place, *_) in places))

    def _fail(self, name: str, seconds: float, error: Exception) -> NoReturn:
        """Give up communication for good, keeping parameters and state."""
        failure = self.give_up(
            f"mean of {name} failed {seconds:.1f} s after its launch (timeout {self.timeout_s:g} s): "
            f"{error}"
        )
        raise failure from error

    def give_up(self, why: str) -> CommunicationError:
        """Leave the communicator for good; returns the failure, which is to be raised."""
        self.reason = why
        failure = CommunicationError(
            f"rank {self.communicator.ranks[self.communicator.rank]}: {why}. Parameters and anchor are valid: save them, and "
            "restart with the workers that are left"
        )
        self._leave(failure)
        return failure

    def _leave(self, failure: CommunicationError) -> None:
        self.failure = failure
        # Before the groups are left: peers hear of it only when nobody holds the handles any more.
        self._abandon()
        self.communicator.close()


def mark_finite(buffer: Tensor, fragment: Fragment) -> Tensor:
    """Set the last element to 1 if all are finite, else everything to 0; returns which.

    What is so large that the workers' sum may not be finite (see `LIMITS`) counts as not finite. All ranks
    of a worker's mesh decide alike: a worker of which one shard were missing would be torn apart.

    Returns: on the host; on another device valid only once the collective has ended, since reading it
        here would stop host and device.
    """
    buffer[fragment.numel :] = 0
    # By the sum, the fastest pass there is; it hides none but huge numbers that cancel to seven digits.
    total = buffer.sum()
    limit = LIMITS[buffer.dtype]
    if buffer.device.type == "cpu":
        finite = torch.tensor(abs(float(total)) <= limit)
        if fragment.sharded:
            finite = fragment.finite_everywhere(finite)
        if not finite:
            buffer.zero_()
        buffer[-1] = finite
        return finite
    finite = total.abs() <= limit
    if fragment.sharded:
        finite = fragment.finite_everywhere(finite)
    buffer.copy_(torch.where(finite, buffer, 0.0))
    buffer[-1] = finite
    # The flag follows the payload through the stream.
    return finite.to("cpu", non_blocking=True)


def is_finite(fragment: Fragment) -> bool:
    """Whether a worker's values are, as `mark_finite` says; all ranks of its mesh ask, and hear the same."""
    values = fragment.flat()
    fragment.read(values)
    finite = values.tensor.sum().abs() <= LIMITS[fragment.dtype]
    return bool(fragment.finite_everywhere(finite) if fragment.sharded else finite)


def _normalise(buffer: Tensor, tails: Tensor, name: str, may_be_empty: bool) -> float:
    """Mean of weighted payloads -> weighted mean; returns the mean weight, the last of these."""
    weight = float(tails[-1])
    if weight == 0 and not may_be_empty:
        raise FloatingPointError(
            f"{name}: no worker has finite values (and samples to weigh them by, where they are "
            "given); the anchor is as it was"
        )
    if weight not in (0, 1):
        buffer.div_(weight)
    return weight
