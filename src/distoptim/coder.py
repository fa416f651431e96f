"""Coded means: what a fragment's workers send through a codec, the difference to a value that all of them share.

One all-gather of codes: everybody receives all codes and adds them up in float32, in rank order, the own one too,
so that all means are equal bit for bit. For m workers and a code of B bytes each sends (m - 1) B on a ring. A
reduce-scatter of codes and an all-gather of the coded sums would send 2 (m - 1) / m B, less beyond two workers, but
lose to rounding twice, and its second half can start only when the first has ended: at a moment that differs
from rank to rank, while collectives must be launched in one order. A float32 all-reduce sends 2 (m - 1) / m 4 N:
int8 codes send less up to 7 workers, 4-bit ones up to 15, and 2-bit ones up to 30.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distoptim.comm.codec import Coding, ErrorFeedback
from distoptim.comm.communicator import Communicator, Gathering, Handle
from distoptim.fragments import Fragment


class Coder:
    """Codes one fragment's payloads and keeps what that needs: the shared reference, and the residual.

    A code is preceded by the worker's weight (all the buffer holds behind the parameters) in float32, exactly.

    Args:
        codec: of the difference; with `ErrorFeedback` what it loses is added to the next one.
        communicator: gathers the codes.
        fragment: whose payloads; its values now are equal on all workers.
        extra: elements behind the parameters in the communication buffer.
        shared: what all workers share while a mean is in flight, if the rule has it (the anchor); else the last mean
            is kept for it.

    Raises:
        ValueError: the communicator cannot gather, or the fragment is not float32 on the CPU.
    """

    def __init__(self, codec: Coding, communicator: Communicator, fragment: Fragment, *,
                 extra: int,
                 shared: Tensor | None) -> None:
        if not isinstance(communicator, Gathering):
            raise ValueError(f"codec={codec!r}: {communicator!r} has no launch_gather, by which codes travel")
        if fragment.dtype != torch.float32 or fragment.device.type != "cpu":
            raise ValueError(f"codec={codec!r}: parameters are averaged in {fragment.dtype} on {fragment.device}; "
                             "allowed is float32 on the CPU, and half precision or complex64, which are averaged in it")
        self.codec = codec.codec if isinstance(codec, ErrorFeedback) else codec
        self.communicator, self.numel, self.extra = communicator, fragment.numel, extra
        self._keeps = shared is None
        if shared is None:
            start = fragment.flat()
            fragment.read(start)
            shared = start.tensor
        self.reference = shared
        self.residual = torch.zeros(self.numel) if isinstance(codec, ErrorFeedback) else None
        # A multiple of 4, so that every row can be read as float32.
        self.nbytes = 4 * extra + -(-self.codec.nbytes(self.numel) // 4) * 4
        self._codes = torch.zeros(communicator.size, self.nbytes, dtype=torch.uint8)
        self._own = torch.zeros(self.nbytes, dtype=torch.uint8)

    def launch(self, buffer: Tensor) -> Handle:
        """Code a weighted payload and start gathering; the handle's mean will be in `buffer`.

        Args:
            buffer: payload and weight; a payload of weight 0 is 0.
        """
        # Before the buffer becomes the difference: elementwise, without a host's look at the weight.
        weight = buffer[-1]
        difference = buffer[: self.numel].sub_(self.reference * weight)
        if self.residual is not None:
            difference.add_(self.residual.mul_(weight))
        tail, code = self._split(self._own)
        tail.copy_(buffer[self.numel:])
        self.codec.encode(difference, code)
        if self.residual is not None:
            self.residual.copy_(difference)
            self.codec.add_decoded(code, self.residual, weight=-1.0)
        return CodedHandle(self, self.communicator.launch_gather(self._own, self._codes), buffer)

    def decode(self, buffer: Tensor) -> None:
        """Buffer <- mean of the weighted payloads, from the codes of all workers."""
        buffer.zero_()
        for row in self._codes:
            tail, code = self._split(row)
            buffer[self.numel:].add_(tail)
            self.codec.add_decoded(code, buffer[: self.numel])
        buffer.div_(len(self._codes))
        buffer[: self.numel].addcmul_(self.reference, buffer[-1])

    def merging(self, mean: Tensor) -> None:
        """Remember a mean, which is about to be merged, where the rule has nothing that all workers share."""
        if self._keeps:
            self.reference.copy_(mean[: self.numel])

    def save(self) -> dict[str, Any]:
        """Reference, unless the rule's state holds it, and residual (not copied)."""
        return {"reference": self.reference if self._keeps else None, "residual": self.residual}

    def load(self, saved: dict[str, Any], *, same_workers: bool) -> None:
        """Take saved values in place; a residual belongs to its worker, and is dropped where the workers are others."""
        if self._keeps:
            self.reference.copy_(saved["reference"])
        if self.residual is not None:
            self.residual.zero_()
            if same_workers:
                self.residual.copy_(saved["residual"])

    def _split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return row[: 4 * self.extra].view(torch.float32), row[4 * self.extra:]


class CodedHandle(Handle):
    """A mean whose codes are in flight; it is in the buffer after `wait`."""

    def __init__(self, coder: Coder, gathered: Handle, buffer: Tensor) -> None:
        super().__init__(buffer, now=gathered.launched_at)
        self._coder, self._gathered, self._decoded = coder, gathered, False

    @property
    def seconds(self) -> float:
        """Of the gathering."""
        return self._gathered.seconds

    def poll(self) -> None:
        """Note the end."""
        self._gathered.poll()
        self.finished_at, self.waited_s = self._gathered.finished_at, self._gathered.waited_s

    def wait(self, timeout_s: float) -> None:
        """Block until all codes are there, and decode them, once."""
        self._gathered.wait(timeout_s)
        self.finished_at, self.waited_s = self._gathered.finished_at, self._gathered.waited_s
        if not self._decoded:
            self._coder.decode(self.buffer)
            self._decoded = True
