"""Codecs: float32 numbers in fewer bits, in blocks of 256 with a scale of their own.

A code is a row of bytes: the blocks' scales, then the numbers. Rounding is deterministic. Work goes through
scratch memory of the size of a cache, so that main memory is read and written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
CHUNK = 256 * BLOCK
# What is larger counts as this: a little under the largest float32, so that rounding up does not overflow.
_TINY, _HUGE = torch.finfo(torch.float32).tiny, 3e38


class Codec(ABC):
    """Writes float32 numbers as bytes and adds them to others again; subclasses say how a run of whole blocks is coded.

    Attributes:
        bits: of one number.
        scale_bytes: of one block's scale.
    """

    bits: int
    scale_bytes: int

    def nbytes(self, numel: int) -> int:
        """Size of a code: scales and numbers of whole blocks, ceil(numel/256) (scale_bytes + 32 bits)."""
        blocks = -(-numel // BLOCK)
        return blocks * (self.scale_bytes + BLOCK * self.bits // 8)

    def encode(self, x: Tensor, code: Tensor) -> None:
        """code <- x; infinities count as about the largest number there is.

        Args:
            x: [numel], float32, contiguous.
            code: [nbytes(numel)], uint8, at an address divisible by 4.
        """
        for part, scales, numbers in self._parts(x, code):
            whole = part
            if part.numel() % BLOCK:
                # Neither the largest nor the mean of the last block's |x| is changed by what fills it up.
                filling = part[-(part.numel() % BLOCK):].abs().mean()
                whole = filling.repeat(len(numbers) * BLOCK)
                whole[: part.numel()] = part
            self._encode(whole.view(-1, BLOCK), scales, numbers)

    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        """out <- out + weight decode(code), in float32."""
        for part, scales, numbers in self._parts(out, code):
            if part.numel() % BLOCK:
                whole = torch.zeros(len(numbers), BLOCK)
                self._add(scales, numbers, whole, weight)
                part.add_(whole.view(-1)[: part.numel()])
            else:
                self._add(scales, numbers, part.view(-1, BLOCK), weight)

    def _parts(self, x: Tensor, code: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of x with their scales [blocks, scale_bytes] and numbers [blocks, bytes], as bytes."""
        blocks = -(-x.numel() // BLOCK)
        scales = code[: blocks * self.scale_bytes].view(blocks, self.scale_bytes)
        numbers = code[blocks * self.scale_bytes: self.nbytes(x.numel())].view(blocks, BLOCK * self.bits // 8)
        step = CHUNK // BLOCK
        return [(x[i * BLOCK: (i + step) * BLOCK], scales[i: i + step], numbers[i: i + step])
                for i in range(0, blocks, step)]

    @abstractmethod
    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        """Code whole blocks."""

    @abstractmethod
    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        """Out <- out + weight decoded, whole blocks."""


@dataclass(frozen=True)
class BF16(Codec):
    """The upper half of a float32: 8 bits of precision, no scale."""

    bits, scale_bytes = 16, 0

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        largest = torch.finfo(torch.bfloat16).max
        numbers.view(torch.bfloat16).copy_(torch.clamp(x, -largest, largest, out=_floats(len(x))))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        out.add_(_floats(len(out)).copy_(numbers.view(torch.bfloat16)), alpha=weight)


@dataclass(frozen=True)
class Int8(Codec):
    """Integers from -127 to 127 times scale = max |x| / 127; an error of at most scale / 2."""

    bits, scale_bytes = 8, 4

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work, scale = _floats(len(x)), scales.view(torch.float32)
        # Not below the normal numbers: the reciprocal of one would be infinite.
        torch.amax(torch.abs(x, out=work), 1, keepdim=True, out=scale).clamp_(max=_HUGE).div_(127).clamp_(min=_TINY)
        torch.mul(x, scale.reciprocal(), out=work).round_().clamp_(-127, 127)
        numbers.view(torch.int8).copy_(work)

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        work = _floats(len(out)).copy_(numbers.view(torch.int8))
        out.addcmul_(work, scales.view(torch.float32), value=weight)


@dataclass(frozen=True)
class E3M0(Codec):
    """4 bits: a sign and one of 0, 2^-6, ..., 1/2, 1, times a power of two, the block's largest |x| rounded.

    Powers of two change at 1.5 times the lower one, the middle; below 3/4 of the smallest comes 0. One bit pattern
    per sign is the zero, so that what has no exponent costs none. Two numbers of a block share a byte, 128 places
    apart, which keeps memory contiguous.
    """

    bits, scale_bytes = 4, 1

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        raw, work = x.view(torch.int32), _integers(len(x))
        torch.bitwise_and(raw, 0x7FFFFFFF, out=work)
        # Half of the mantissa's range carries into the exponent: rounding.
        work.clamp_(max=0x7F7FFFFF).add_(0x400000).bitwise_right_shift_(23).clamp_(max=254)
        top = work.amax(1, keepdim=True).clamp_(min=7)
        scales.copy_(top)
        work.sub_(top.sub_(7)).clamp_(min=0)
        work.add_(torch.bitwise_right_shift(raw, 31, out=_integers(len(x), 1)), alpha=-8)
        numbers.copy_(torch.add(work[:, :128], work[:, 128:], alpha=16))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        # Of 16 values, k < 8: 0 or 2^(k - 7), the others negative.
        unit = torch.bitwise_left_shift(scales.to(torch.int32), 23).view(torch.float32).mul_(weight)
        _look_up(numbers, _E3M0, out, unit, 4)


@dataclass(frozen=True)
class TwoBit(Codec):
    """2 bits: -1.5, -0.5, 0.5 or 1.5 times scale = 1.25 mean |x|, near the best uniform four levels of a normal law.

    Zero is coded exactly only where the whole block is zero; use it with `ErrorFeedback`.
    """

    bits, scale_bytes = 2, 4

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work, scale = _floats(len(x)), scales.view(torch.float32)
        torch.abs(x, out=work).clamp_(max=_HUGE).mul_(1.25 / BLOCK)
        torch.sum(work, 1, keepdim=True, out=scale)
        torch.mul(x, scale.clamp(min=_TINY).reciprocal_(), out=work).floor_().clamp_(-2, 1).add_(2)
        four = work.view(-1, 4, BLOCK // 4)
        packed = four[:, 0] + four[:, 1] * 4
        numbers.copy_(packed.add_(four[:, 2], alpha=16).add_(four[:, 3], alpha=64))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        _look_up(numbers, _TWO_BIT, out, scales.view(torch.float32) * weight, 2)


@dataclass(frozen=True)
class ErrorFeedback:
    """What a codec loses is kept, and added to what is coded next (Seide et al. 2014; Karimireddy et al., 1901.09847).

    Args:
        codec: any codec.
    """

    codec: Codec


Coding = Codec | ErrorFeedback


def _look_up(numbers: Tensor, table: Tensor, out: Tensor, unit: Tensor, bits: int) -> None:
    """Out <- out + unit table[number]; the numbers of a byte lie in equal parts of the block."""
    width = numbers.shape[1]
    bytes_ = numbers.to(torch.int32)
    for i in range(8 // bits):
        index = (bytes_ >> (i * bits)).bitwise_and_(2**bits - 1)
        values = table.index_select(0, index.view(-1)).view(index.shape)
        out[:, i * width: (i + 1) * width].addcmul_(values, unit)


@cache
def _scratch(slot: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(CHUNK // BLOCK, BLOCK, dtype=dtype)


def _floats(blocks: int) -> Tensor:
    return _scratch(0, torch.float32)[:blocks]


def _integers(blocks: int, slot: int = 0) -> Tensor:
    return _scratch(slot, torch.int32)[:blocks]


_E3M0 = torch.tensor([sign * (2.0 ** (k - 7) if k else 0.0) for sign in (1, -1) for k in range(8)])
_TWO_BIT = torch.tensor([-1.5, -0.5, 0.5, 1.5])
CODECS: dict[str, Codec] = {"bf16": BF16(), "int8": Int8(), "e3m0": E3M0(), "2bit": TwoBit()}


def find(codec: object) -> Coding | None:
    """The codec meant by an object, a name, or a name with "+ef" behind it.

    Raises:
        ValueError: it is none.
    """
    if codec is None or isinstance(codec, Coding):
        return codec
    if isinstance(codec, str):
        name, plus, rest = codec.partition("+")
        if name in CODECS and (not plus or rest == "ef"):
            return ErrorFeedback(CODECS[name]) if plus else CODECS[name]
    raise ValueError(f"codec={codec!r}: allowed is a Codec, an ErrorFeedback, None, or one of {', '.join(CODECS)}, "
                     'each also with "+ef" behind it')
