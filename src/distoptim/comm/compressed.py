"""Coded means: what a fragment's workers send through a codec, the difference to a value that all
of them share.

Of two ways the one with fewer bytes is taken, and of equal ones that with fewer roundings. m
workers, B bytes a code:

- One all-gather of codes, (m - 1) B bytes sent by each: for two workers, or a fragment of very few
  blocks.
- Two stages, 2 (m - 1)/m B bytes: everybody sends each worker the code of that one's m-th part, the
  parts are added up, and their means are coded once more and gathered. A float32 all-reduce of N
  numbers sends 2 (m - 1)/m 4 N.

Either way codes are added up in float32, in rank order, the own one too, and all take the coded
means, who made them
too: means are equal bit for bit.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distoptim.comm.codecs import BLOCK, Coding, ErrorFeedback
from distoptim.comm.communicator import Communicator, Gathering, Handle
from distoptim.comm.relay import Relay
from distoptim.fragments import Fragment


class Coder:
    """Codes one fragment's payloads and keeps what that needs: the shared reference, and what codes
    have lost.

    A code is preceded by the worker's weight (all the buffer holds behind the parameters) in
    float32, exactly.

    Args:
        codec: of the difference; with `ErrorFeedback` what it loses is added to the next one, and
            what the code of a part's mean loses to that part's next mean.
        communicator: carries the codes.
        fragment: whose payloads; its values now are equal on all workers.
        extra: elements behind the parameters in the communication buffer.
        shared: what all workers share while a mean is in flight, if the rule has it (the anchor);
            else the last mean is kept for it.

    Raises:
        ValueError: the communicator cannot carry codes, or the fragment is not float32 on the CPU.
    """

    def __init__(
        self,
        codec: Coding,
        communicator: Communicator,
        fragment: Fragment,
        *,
        extra: int,
        shared: Tensor | None,
    ) -> None:
        if not isinstance(communicator, Gathering):
            raise ValueError(
                f"codec={codec!r}: {communicator!r} lacks launch_gather or launch_relay, by which codes "
                "travel"
            )
        if fragment.dtype != torch.float32 or fragment.device.type != "cpu":
            raise ValueError(
                f"codec={codec!r}: parameters are averaged in {fragment.dtype} on {fragment.device}; "
                "allowed is float32 on the CPU, and half precision or complex64, which are averaged in it"
            )
        self.codec = codec.codec if isinstance(codec, ErrorFeedback) else codec
        self.communicator, self.numel, self.extra = communicator, fragment.numel, extra
        self._keeps = shared is None
        if shared is None:
            start = fragment.flat()
            fragment.read(start)
            shared = start.tensor
        self.reference = shared

        m = communicator.size
        blocks = -(-self.numel // BLOCK)
        part = -(-blocks // m)
        self.two_stages = 2 * part < blocks
        size = part * BLOCK if self.two_stages else self.numel
        self._spans = [
            slice(min(i, self.numel), min(i + size, self.numel)) for i in range(0, size * m, size)
        ]
        self._mine = self._spans[communicator.rank]
        self.residual = self.mean_residual = None
        if isinstance(codec, ErrorFeedback):
            self.residual = torch.zeros(self.numel)
            self.mean_residual = self.residual[self._mine].clone() if self.two_stages else None

        # A multiple of 4, so that every row can be read as float32.
        code = -(-self.codec.nbytes(size) // 4) * 4
        self._sent = torch.zeros(m if self.two_stages else 1, 4 * extra + code, dtype=torch.uint8)
        self._received = torch.zeros(m, 4 * extra + code, dtype=torch.uint8)
        self._mean = torch.zeros(code, dtype=torch.uint8)
        self._means = torch.zeros(m if self.two_stages else 0, code, dtype=torch.uint8)
        self.worked_s = 0.0
        # A worker that is alone sends nothing; its messages count as one of two workers'.
        self.nbytes = max(2, m) * (4 * extra + code * (1 + self.two_stages)) // 2

    def launch(self, buffer: Tensor) -> Handle:
        """Code a weighted payload and start its mean; the handle's mean will be in `buffer`.

        Args:
            buffer: payload and weight; a payload of weight 0 is 0.
        """
        weight = float(buffer[-1])
        difference = buffer[: self.numel].sub_(
            self.reference if weight == 1 else self.reference * weight
        )
        for row, span in zip(self._sent, self._spans, strict=False):
            tail, code = self._split(row)
            tail.copy_(buffer[self.numel :])
            self._encode(
                difference[span],
                code,
                weight,
                None if self.residual is None else self.residual[span],
            )
        if not self.two_stages:
            return CodedHandle(
                self, self.communicator.launch_gather(self._sent[0], self._received), buffer
            )
        relay = Relay(
            self._sent, self._received, partial(self._between, buffer), self._mean, self._means
        )
        return CodedHandle(self, self.communicator.launch_relay(relay), buffer)

    def decode(self, buffer: Tensor) -> None:
        """Buffer <- mean of the weighted payloads, from what has been received."""
        start = time.perf_counter()
        if self.two_stages:
            for span, code in zip(self._spans, self._means, strict=True):
                self.codec.add_decoded(code, buffer[span].zero_())
        else:
            self._add_up(buffer[: self.numel])
        buffer[self.numel :] = self._tail()
        buffer[: self.numel].addcmul_(self.reference, buffer[-1])
        self.worked_s += time.perf_counter() - start

    def merging(self, mean: Tensor) -> None:
        """Remember a mean, which is about to be merged, where the rule has nothing that all workers share."""
        if self._keeps:
            self.reference.copy_(mean[: self.numel])

    def save(self) -> dict[str, Any]:
        """Reference, unless the rule's state holds it, and residuals (not copied)."""
        return {
            "reference": self.reference if self._keeps else None,
            "residual": self.residual,
            "mean_residual": self.mean_residual,
        }

    def load(self, saved: dict[str, Any], *, same_workers: bool) -> None:
        """Take saved values in place.

        Residuals belong to their worker, and are dropped where workers are others.
        """
        if self._keeps:
            self.reference.copy_(saved["reference"])
        for mine, theirs in (
            (self.residual, saved["residual"]),
            (self.mean_residual, saved["mean_residual"]),
        ):
            if mine is not None:
                mine.zero_()
                if same_workers:
                    mine.copy_(theirs)

    def _encode(self, x: Tensor, code: Tensor, weight: float, residual: Tensor | None) -> None:
        """Code x, which has this weight, with what was lost before.

        A residual is kept as that of weight 1.
        """
        if residual is None:
            self.codec.encode(x, code)
            return
        self.codec.encode(x.add_(residual, alpha=weight), code)
        if weight == 0:
            residual.zero_()
            return
        self.codec.add_decoded(code, residual.copy_(x), weight=-1.0)
        if weight != 1:
            residual.div_(weight)

    def _between(self, buffer: Tensor) -> None:
        """Code the mean of the own part."""
        start = time.perf_counter()
        mean = buffer[self._mine]
        self._add_up(mean)
        self._encode(mean, self._mean, float(self._tail()[-1]), self.mean_residual)
        self.worked_s += time.perf_counter() - start

    def _add_up(self, out: Tensor) -> None:
        """Out <- mean of what everybody sent."""
        out.zero_()
        for row in self._received:
            self.codec.add_decoded(self._split(row)[1], out)
        out.div_(len(self._received))

    def _tail(self) -> Tensor:
        """The mean of what is behind the parameters, the weight last."""
        total = torch.zeros(self.extra)
        for row in self._received:
            total.add_(self._split(row)[0])
        return total.div_(len(self._received))

    def _split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return row[: 4 * self.extra].view(torch.float32), row[4 * self.extra :]


class CodedHandle(Handle):
    """A mean whose codes are in flight; it is in the buffer after `wait`.

    Args:
        coder: decodes it.
        carried: the codes.
        buffer: for the mean.
    """

    def __init__(self, coder: Coder, carried: Handle, buffer: Tensor) -> None:
        super().__init__(buffer, now=carried.launched_at)
        self._coder, self.carried, self._decoded = coder, carried, False

    @property
    def seconds(self) -> float:
        """Of the codes' way."""
        return self.carried.seconds

    def poll(self) -> None:
        """Go on; note the end."""
        self.carried.poll()
        self.finished_at, self.waited_s = self.carried.finished_at, self.carried.waited_s

    def wait(self, timeout_s: float) -> None:
        """Block until all codes are there, and decode them, once."""
        self.carried.wait(timeout_s)
        self.finished_at, self.waited_s = self.carried.finished_at, self.carried.waited_s
        if not self._decoded:
            self._coder.decode(self.buffer)
            self._decoded = True
            self.worked_s, self._coder.worked_s = self._coder.worked_s, 0.0
