"""What the engine asks of a communicator, and the one for a worker that is alone."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from distoptim.comm.handles import CatchUp, FinishedHandle, Handle, Stages
from distoptim.comm.link import Link


class CommunicationError(RuntimeError):
    """A collective failed or did not end in time.

    Local parameters and anchors are valid and can be saved.
    """


def unlike_calls(where: str) -> str:
    """What workers that are in unlike calls are told.

    Args:
        where: who is in which call.
    """
    return (
        f"workers are not in the same call: {where}. All must call average() equally often, and "
        "averaged(), flush() and the like together; nothing of this was merged"
    )


class Member(ABC):
    """What a communicator whose workers come and go asks of whoever sends means over it."""

    @abstractmethod
    def position(self, buffer: Tensor) -> dict[str, Any]:
        """Where this worker is, as JSON; asked at every launch, in the training thread.

        Args:
            buffer: what it launches.
        """

    @abstractmethod
    def give(self) -> dict[str, Any]:
        """What all workers share, for one that is behind; asked while a mean is on its way."""

    @abstractmethod
    def listen(self, given: CatchUp, workers: Communicator) -> Tensor:
        """Take part in a mean with nothing, being behind; it comes as from the giver's launch.

        Args:
            given: by one that is not behind.
            workers: among whom the mean is made.
        """

    @abstractmethod
    def hurry(self, launch: Handle) -> None:
        """A launch has come with what this worker was behind by: take it over soon."""


class MeanLost(CommunicationError):
    """A mean will never come, since a worker was lost on its way; the others go on with the next."""


class Communicator(ABC):
    """Moves bytes between workers.

    Calls come from the training thread, in the same order on all ranks. To write one of your own,
    subclass it, set `rank` and `size`, and write `all_reduce`, `broadcast` and `all_gather_json`;
    with `all_gather` and `all_to_all` it carries codes (`codec=`) too.

    Attributes:
        rank: of this worker, in [0, size).
        size: the number of workers.
        in_lockstep: whether one thread drives all workers through the same calls (a simulator), so
            that none can be elsewhere.
        elastic: whether workers come and go.
        joins: whether this worker has still to take over what the others share.
        name: of a worker that comes and goes.
        now: the clock of this worker, in seconds; a simulator has its own.
    """

    rank: int
    size: int
    in_lockstep: bool = False
    elastic: bool = False
    joins: bool = False
    name: str = ""
    # Not a method around it: asked twice at every local step.
    now: Callable[[], float] = time.perf_counter

    @property
    def carries_host_memory(self) -> bool:
        """Whether buffers may be in host memory; by default yes."""
        return True

    def enter(self, facts: object, *, what: str) -> list[object]:
        """Find the other workers: everybody's facts, in rank order. Blocks.

        Args:
            facts: what must be equal on all, as `all_gather_json` takes it.
            what: the call that asks.
        """
        return self.all_gather_json(facts, what=what)

    def attach(self, member: Member) -> None:  # noqa: B027  # most have nothing to ask
        """Begin to send means for `member`; by default nothing."""

    @property
    def ranks(self) -> list[int]:
        """What messages to people call the workers: their ranks among all processes of the program."""
        return list(range(self.size))

    @cached_property
    def stages(self) -> Stages:
        """The order in which two-stage means go on; one for all that travel over this communicator."""
        return Stages()

    @property
    def events(self) -> Sequence[Any]:
        """What has happened to the members so far (`distoptim.comm.roll.Event`), where they come and go."""
        return ()

    def tally(self) -> dict[str, float]:
        """What is to be counted beside means, by name; by default nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a worker's file holds of it, as plain data; while nothing is in flight. By default nothing."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Be as far as that file is; returns False where the other workers are further."""
        return True

    def begin_round(self, due_in_s: float = 0.0) -> None:  # noqa: B027  # most have nothing to do
        """Settle who takes part in the mean that comes next; by default the same workers as before.

        Args:
            due_in_s: about how long after its launch the mean will be waited for. Until then a worker
                that is late has done nothing wrong: timeouts count from there.
        """

    @property
    def link(self) -> Link | None:
        """Round trip and rate as measured by `prepare`; None where nothing is."""
        return None

    def mean_s(self, nbytes: int) -> float:
        """Seconds that a mean of so many bytes should take, as the link was measured; 0: not known."""
        return 0.0

    def prepare(self, nbytes: int, *, coded: bool = False) -> None:  # noqa: B027  # as above
        """Get ready for means of so many bytes, or of codes; blocking and collective, once all workers
        hold the same parameters. By default nothing."""

    @abstractmethod
    def all_reduce(self, buffer: Tensor) -> Handle:
        """Start replacing `buffer` by its mean over the workers (torch's ReduceOp.AVG).

        Nobody may touch the buffer before `wait` on the handle.
        """

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """Start filling output[i] with worker i's `input`; nobody may touch either meanwhile.

        Args:
            output: [workers, *input.shape].
            input: what this worker sends to all.
            after: this is the second stage of a mean whose first one was that. It must travel over
                connections of its own: ranks start it at other moments, so that among other
                collectives they would not agree on what comes before it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no all_gather")

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """Start filling output[i] with row `rank` of worker i's `input`; nobody may touch either
        meanwhile.

        Args:
            output: [workers, ...].
            input: [workers, ...]; row j is for worker j.
        """
        raise NotImplementedError(f"{type(self).__name__} has no all_to_all")

    def all_reduce_by(
        self, buffer: Tensor, mean: Callable[[Communicator, Tensor, float], None]
    ) -> Handle:
        """Start a mean that a function makes of whoever is there; where workers come and go.

        Args:
            buffer: to be replaced by it.
            mean: told the workers, the buffer, and the bound of each wait in seconds.
        """
        raise NotImplementedError(f"{type(self).__name__} has no all_reduce_by")

    @abstractmethod
    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Replace `buffer` by that of rank `source`. Blocks."""

    @abstractmethod
    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Everybody's message, in rank order; small control data, as JSON (a tuple comes back as a
        list). Blocks.

        Args:
            message: None, bool, int, float, str, and lists and dictionaries of them.
            what: the call that asks, for error messages; equal on all workers.

        Raises:
            CommunicationError: workers are in different calls, or one did not come in time.
        """

    def close(self) -> None:  # noqa: B027  # not abstract: most have nothing to leave
        """Finish or abandon what is in flight and leave. Twice is fine. By default nothing."""

    @property
    def carries_codes(self) -> bool:
        """Whether it has `all_gather` and `all_to_all`, by which codes travel."""
        mine = type(self)
        return not (
            mine.all_gather is Communicator.all_gather or mine.all_to_all is Communicator.all_to_all
        )


class SingleWorker(Communicator):
    """The communicator of one worker: the mean is its own value."""

    rank = 0
    in_lockstep = True
    size = 1

    def all_reduce(self, buffer: Tensor) -> Handle:
        """The mean of one is there at once."""
        return FinishedHandle(buffer)

    def all_gather(self, output: Tensor, input: Tensor, *, after: Handle | None = None) -> Handle:
        """Only this worker's input, at once."""
        output[0].copy_(input)
        return FinishedHandle(output)

    def all_to_all(self, output: Tensor, input: Tensor) -> Handle:
        """The row that this worker has for itself, at once."""
        output.copy_(input)
        return FinishedHandle(output)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """The buffer stays: nobody else has one."""

    def all_gather_json(self, message: object, *, what: str = "") -> list[object]:
        """Only this worker's message, as it would have come over a wire."""
        return [json.loads(json.dumps(message))]
