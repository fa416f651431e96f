"""Coded means: what workers send through a codec, the difference to a value that all of them share.

Of two ways the one with fewer bytes is taken, and of equal ones that with fewer roundings. m
workers, B bytes a code:

- One all-gather of codes, (m - 1) B bytes sent by each: for two workers, or very few blocks.
- Two stages, 2 (m - 1)/m B bytes: everybody sends each worker the code of that one's m-th part, the
  parts are added up, and their means are coded once more and gathered, as in DeepSpeed's 1-bit Adam
  (Tang et al., arXiv 2102.02888). A float32 all-reduce of N numbers sends 2 (m - 1)/m 4 N.

Either way codes are added up in float32, in rank order, the own one too, and all take the coded
means, who made them too: means are equal bit for bit.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, final

import torch
from torch import Tensor

from distoptim.comm.codecs import BLOCK, Codec, Coding, ErrorFeedback, ResidualInParameters
from distoptim.comm.communicator import Communicator
from distoptim.comm.handles import Handle, TwoStageHandle


def check_codable(codec: Coding, dtype: torch.dtype, device: torch.device) -> None:
    """Whether parameters that are averaged in this dtype on this device can be coded.

    Raises:
        ValueError: they are not float32 on the CPU.
    """
    if dtype != torch.float32 or device.type != "cpu":
        raise ValueError(
            f"codec={codec!r}: parameters are averaged in {dtype} on {device}; allowed is float32 on "
            "the CPU, and half precision or complex64, which are averaged in it; for parameters on a GPU "
            "with offload=True"
        )


class CompressedMean:
    """Codes payloads of one size and keeps what that needs: the shared reference, and what codes
    have lost.

    A code is preceded by the worker's weight (all the buffer holds behind the payload) in float32,
    exactly.

    Args:
        codec: of the difference; with `ErrorFeedback` what it loses is added to the next one, and
            what the code of a part's mean loses to that part's next mean; with
            `ResidualInParameters` the latter alone.
        communicator: carries the codes.
        numel: of the payload.
        extra: elements behind the payload in the communication buffer, >= 1; the last is the weight.
        start: [numel], float32, values that are equal on all workers; kept, and replaced by each
            mean (`merging`).
        shared: [numel], float32, instead of `start`: what all workers share while a mean is in
            flight (the anchor); whoever owns it changes it, alike on all workers.

    Attributes:
        nbytes: size of the payload whose all-reduce sends as many bytes.
        two_stages: which of the two ways is taken.
        worked_s: seconds of coding that no handle has taken over yet.
        residual: [numel], what the worker's own codes have lost; None without error feedback.
        mean_residual: what the codes of its part's means have lost; None where there is no such
            part.
        sent: the own codes and their weight, until the next are sent, where a rule needs them for a
            mean in flight; else None.

    Raises:
        ValueError: the communicator cannot carry codes.
    """

    def __init__(
        self,
        codec: Coding,
        communicator: Communicator,
        *,
        numel: int,
        extra: int,
        start: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> None:
        if not communicator.carries_codes:
            raise ValueError(
                f"codec={codec!r}: {type(communicator).__name__} has no all_gather or no all_to_all, "
                "by which codes travel"
            )
        # Where workers come and go each mean is made by those that are there, in another thread.
        self._launch = communicator.all_reduce_by if communicator.elastic else None
        reference = start if shared is None else shared
        if reference is None:
            raise ValueError("neither start nor shared: allowed is either")
        self.codec: Codec = codec if isinstance(codec, Codec) else codec.codec
        self.communicator = communicator
        self.numel = numel
        self.extra = extra
        self.reference = reference
        self._keeps = shared is None
        self._feeds_back = not isinstance(codec, Codec)
        self._keeps_sent = isinstance(codec, ResidualInParameters)
        self._lay_out(communicator)
        self.residual: Tensor | None = None
        self._decay = codec.decay if isinstance(codec, ErrorFeedback) else 1.0
        if isinstance(codec, ErrorFeedback):
            self.residual = torch.zeros(numel)
        self.worked_s = 0.0
        # Of the last mean that was lost: residuals, and what they were when their codes had been sent.
        self._unheard: list[tuple[Tensor, Tensor]] = []

    def _part_size(self, workers: int) -> int:
        """Numbers in the part of one worker, or in all where one stage sends less."""
        blocks = -(-self.numel // BLOCK)
        part = -(-blocks // workers) * BLOCK
        fewer = 2 * self.codec.nbytes(part) < self.codec.nbytes(self.numel)
        self.two_stages = fewer and not self.codec.gathered
        return part if self.two_stages else self.numel

    def _lay_out(self, workers: Communicator) -> None:
        """Allocate the messages among these workers: rows of weight and code."""
        self._laid_out_for = (workers.rank, workers.size)
        m = workers.size
        size = self._part_size(m)
        # A multiple of 4, so that every row can be read as float32.
        code = -(-self.codec.nbytes(size) // 4) * 4
        row = 4 * self.extra + code
        starts = [min(i * size, self.numel) for i in range(m + 1)]
        self._spans = [slice(*ends) for ends in itertools.pairwise(starts)]
        self._mine = self._spans[workers.rank]
        self.mean_residual: Tensor | None = None
        if self.two_stages and self._feeds_back:
            self.mean_residual = torch.zeros(self._mine.stop - self._mine.start)
        self._sent = torch.zeros(m if self.two_stages else 1, row, dtype=torch.uint8)
        self.sent = self._sent if self._keeps_sent else None
        self._received = torch.zeros(m, row, dtype=torch.uint8)
        self._mean = torch.zeros(code, dtype=torch.uint8)
        self._means = torch.zeros(m if self.two_stages else 0, code, dtype=torch.uint8)
        # A worker that is alone sends nothing; its messages count as one of two workers'.
        self.nbytes = max(2, m) * (4 * self.extra + code * (1 + self.two_stages)) // 2

    def start(self, buffer: Tensor) -> Handle:
        """Code a weighted payload and start its mean; the handle's mean will be in `buffer`.

        Args:
            buffer: [numel + extra], payload and weight; a payload of weight 0 is 0.
        """
        if self._launch is not None:
            return self._launch(buffer, self._among)
        return self._start(buffer, self.communicator)

    def _start(self, buffer: Tensor, workers: Communicator) -> Handle:
        self._code(buffer)
        if not self.two_stages:
            carried = workers.all_gather(self._received, self._sent[0])
            return CodedHandle(self, carried, buffer)

        def go_on(first: Handle) -> Handle:
            self._code_mean(buffer)
            return workers.all_gather(self._means, self._mean, after=first)

        first = workers.all_to_all(self._received, self._sent)
        return CodedHandle(self, TwoStageHandle(first, go_on, workers.stages), buffer)

    def _among(self, workers: Communicator, buffer: Tensor, timeout_s: float) -> None:
        """The mean over whoever is there; where it is lost, residuals are as before it."""
        self._be_among(workers)
        residuals = [r for r in (self.residual, self.mean_residual) if r is not None]
        before = [residual.clone() for residual in residuals]
        try:
            self._start(buffer, workers).wait(timeout_s)
        except RuntimeError:
            self._unheard = [(residual, residual.clone()) for residual in residuals]
            for residual, value in zip(residuals, before, strict=True):
                residual.copy_(value)
            raise

    def was_heard(self) -> None:
        """The last mean that was lost here has come to others: what its codes have lost is to be made up for."""
        for residual, value in self._unheard:
            residual.copy_(value)
        self._unheard = []

    def _be_among(self, workers: Communicator) -> None:
        """Lay messages out for these workers, if they are others; parts are others then, too."""
        if (workers.rank, workers.size) != self._laid_out_for:
            self._lay_out(workers)

    def listen(
        self, workers: Communicator, buffer: Tensor, reference: Tensor, timeout_s: float
    ) -> None:
        """Take part in a mean with nothing; what codes have lost so far is left alone.

        Args:
            workers: those that are there.
            buffer: [numel + extra], 0 but for what is uncoded; the mean will be in it.
            reference: of the others, to which their codes are the difference.
            timeout_s: bound of each wait, in seconds.
        """
        self._be_among(workers)
        own = self.reference
        residual = self.residual
        self.reference = reference
        self.residual = None
        try:
            self._start(buffer, workers).wait(timeout_s)
        finally:
            self.reference = own
            self.residual = residual

    def start_empty(self, tail: Tensor) -> Handle:
        """Start a message of the same form that carries nothing but what is behind the payload.

        What codes have lost so far is left alone, and so is a mean in flight.

        Args:
            tail: [extra]; its mean will be in the handle's `tails`.
        """
        sent = torch.zeros_like(self._sent)
        received = torch.zeros_like(self._received)
        for row in sent:
            self._split(row)[0].copy_(tail)
        if not self.two_stages:
            return EmptyHandle(self, self.communicator.all_gather(received, sent[0]), received)

        def go_on(first: Handle) -> Handle:
            means = torch.zeros_like(self._means)
            return self.communicator.all_gather(means, torch.zeros_like(self._mean), after=first)

        first = self.communicator.all_to_all(received, sent)
        carried = TwoStageHandle(first, go_on, self.communicator.stages)
        return EmptyHandle(self, carried, received)

    def tail_of(self, rows: Tensor) -> Tensor:
        """The mean of what is behind the payload, the weight last."""
        total = torch.zeros(self.extra)
        for row in rows:
            total.add_(self._split(row)[0])
        return total.div_(len(rows))

    def decode(self, buffer: Tensor) -> None:
        """buffer <- mean of the weighted payloads, from what has been received."""
        start = time.perf_counter()
        if self.two_stages:
            # Codecs add to what is there, which is the own difference that was coded in place.
            for span, code in zip(self._spans, self._means, strict=True):
                self._add_decoded(code, buffer[span].zero_())
        else:
            self._add_up(buffer[: self.numel])
        # The mean weight first, by which the reference counts.
        buffer[self.numel :] = self.tail_of(self._received)
        buffer[: self.numel].addcmul_(self.reference, buffer[-1])
        self.worked_s += time.perf_counter() - start

    def codes_are_equal(self) -> bool:
        """Whether all workers' last codes are, as far as this one has got them (all, or its part)."""
        mine = self._mine if self.two_stages else slice(0, self.numel)
        codes = self._received[:, 4 * self.extra :]
        return mine.stop > mine.start and bool((codes == codes[0]).all())

    def add_sent(self, out: Tensor, weight: float) -> None:
        """out <- out + weight (what this worker sent last, as the others read it, - the reference).

        Nothing where it has sent nothing yet, or nothing that counts.

        Args:
            out: [numel], float32.
            weight: any.
        """
        for row, span in zip(self._sent, self._spans, strict=False):
            tail, code = self._split(row)
            counts = float(tail[-1])
            part = out[span]
            if counts and part.numel():
                code = code[: self.codec.nbytes(part.numel())]
                self.codec.add_decoded(code, part, weight=weight / counts)

    def merging(self, mean: Tensor) -> None:
        """Remember a mean, which is about to be merged, unless a shared value is the reference."""
        if self._keeps:
            self.reference.copy_(mean[: self.numel])

    def state_dict(self) -> dict[str, Any]:
        """Reference, unless it is a shared value, residuals, and codes that are needed (not copied)."""
        out = {
            "reference": self.reference if self._keeps else None,
            "residual": self.residual,
            "mean_residual": self.mean_residual,
        }
        return out if self.sent is None else {**out, "sent": self.sent}

    def load_state_dict(
        self, saved: dict[str, Any], *, same_workers: bool, same_rank: bool
    ) -> None:
        """Take saved values in place.

        Args:
            saved: by `state_dict`.
            same_workers: whether the residual is this worker's; else it is dropped.
            same_rank: whether it has the same rank among as many; else what is laid out by that is dropped.
        """
        if self._keeps:
            self.reference.copy_(saved["reference"])
        for mine, name, is_own in (
            (self.residual, "residual", same_workers),
            (self.mean_residual, "mean_residual", same_rank),
            (self.sent, "sent", same_rank),
        ):
            if mine is not None:
                mine.zero_()
                if is_own:
                    mine.copy_(saved[name])

    def _code(self, buffer: Tensor) -> None:
        """Fill the rows to be sent."""
        weight = float(buffer[-1])
        # In place: the payload is not needed any more, and the mean will be written there.
        difference = buffer[: self.numel].sub_(
            self.reference if weight == 1 else self.reference * weight
        )
        for row, span in zip(self._sent, self._spans, strict=False):
            tail, code = self._split(row)
            tail.copy_(buffer[self.numel :])
            residual = None if self.residual is None else self.residual[span]
            self._encode(difference[span], code, weight, residual)

    def _encode(self, x: Tensor, code: Tensor, weight: float, residual: Tensor | None) -> None:
        """Code x, which has this weight, with what was lost before.

        A residual is kept as that of weight 1.
        """
        if not x.numel():
            return
        code = code[: self.codec.nbytes(x.numel())]
        if residual is None:
            self.codec.encode(x, code)
            return
        self.codec.encode(x.add_(residual, alpha=weight * self._decay), code)
        if weight == 0:
            residual.zero_()
            return
        self.codec.add_decoded(code, residual.copy_(x), weight=-1.0)
        if weight != 1:
            residual.div_(weight)

    def _code_mean(self, buffer: Tensor) -> None:
        """Code the mean of the own part."""
        start = time.perf_counter()
        mean = buffer[self._mine]
        self._add_up(mean)
        self._encode(mean, self._mean, float(self.tail_of(self._received)[-1]), self.mean_residual)
        self.worked_s += time.perf_counter() - start

    def _add_up(self, out: Tensor) -> None:
        """out <- mean of what everybody sent."""
        out.zero_()
        for row in self._received:
            self._add_decoded(self._split(row)[1], out)
        out.div_(len(self._received))

    def _add_decoded(self, code: Tensor, out: Tensor) -> None:
        if out.numel():
            self.codec.add_decoded(code[: self.codec.nbytes(out.numel())], out)

    def _split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return row[: 4 * self.extra].view(torch.float32), row[4 * self.extra :]


@final
class CodedHandle(Handle):
    """A mean whose codes are in flight; it is in the buffer after `wait`.

    Args:
        mean: decodes it.
        carried: the codes.
        buffer: for the mean.
    """

    def __init__(self, mean: CompressedMean, carried: Handle, buffer: Tensor) -> None:
        super().__init__(buffer, now=carried.launched_at)
        self.carried = carried
        self._mean = mean
        self._decoded = False

    @property
    def seconds(self) -> float:
        """How long the codes travelled, without coding and decoding."""
        return self.carried.seconds

    def poll(self) -> None:
        """Go on; note the end."""
        self.carried.poll()
        self._note()

    def wait(self, timeout_s: float) -> None:
        """Block until all codes are there, and decode them, once."""
        self.carried.wait(timeout_s)
        self._note()
        if not self._decoded:
            self._mean.decode(self.buffer)
            self._decoded = True
            self.worked_s = self._mean.worked_s
            self._mean.worked_s = 0.0

    def _note(self) -> None:
        self.finished_at = self.carried.finished_at
        self.waited_s = self.carried.waited_s


@final
class EmptyHandle(Handle):
    """A message without payload in flight; after `wait` its `tails` are the mean.

    Args:
        mean: whose form it has.
        carried: the codes.
        received: [workers, bytes], the rows of all workers.
    """

    def __init__(self, mean: CompressedMean, carried: Handle, received: Tensor) -> None:
        super().__init__(carried.buffer, now=carried.launched_at)
        self._mean = mean
        self._carried = carried
        self._received = received

    def wait(self, timeout_s: float) -> None:
        """Block until all have sent theirs."""
        self._carried.wait(timeout_s)
        self.buffer = self._mean.tail_of(self._received)
        self.waited_s = self._carried.waited_s
        self.finished_at = self._carried.finished_at
