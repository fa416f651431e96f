"""Codecs: float32 numbers in fewer bits.

The built-in ones work in blocks of 256 with a scale of their own. A code is a row of bytes: the
blocks' scales, then the numbers. Rounding is deterministic. Work goes through scratch memory of the
size of a cache, so that main memory is read and written once.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distoptim.chunks import CHUNK

BLOCK = 256
# What is larger counts as this: a little under the largest float32, so that rounding up does not
# overflow.
_HUGE = 3e38
_TINY = torch.finfo(torch.float32).tiny
_BELOW_512 = 512 * (1 - 2**-24)


class Codec(ABC):
    """Writes float32 numbers as bytes and adds them to others again.

    To write one of your own, subclass it, and pass an object as `codec=` or register it by name. An
    object must give the same bytes on all workers; its `repr` is compared between them, so it should
    name the settings (a frozen dataclass does).
    """

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Size of the code of so many numbers, in bytes."""

    @abstractmethod
    def encode(self, x: Tensor, code: Tensor) -> None:
        """code <- x.

        Args:
            x: [numel], float32, contiguous, on the CPU, finite.
            code: [nbytes(numel)], uint8, at an address divisible by 4.
        """

    @abstractmethod
    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        """out <- out + weight decode(code), in float32, equal bit for bit on all workers."""

    def __repr__(self) -> str:
        """Equal on all workers, as the default with its address is not."""
        return f"{type(self).__name__}()"


class BlockCodec(Codec):
    """Numbers of fixed size in blocks of 256, each block with a scale of its own; subclasses say how
    a run of whole blocks is coded.

    Attributes:
        bits: of one number.
        scale_bytes: of one block's scale.
    """

    bits: int
    scale_bytes: int

    def nbytes(self, numel: int) -> int:
        """Scales and numbers of whole blocks, ceil(numel/256) (scale_bytes + 32 bits)."""
        blocks = -(-numel // BLOCK)
        return blocks * (self.scale_bytes + BLOCK * self.bits // 8)

    def encode(self, x: Tensor, code: Tensor) -> None:
        """code <- x; infinities count as about the largest number there is."""
        for part, scales, numbers in self._parts(x, code):
            whole = part
            if part.numel() % BLOCK:
                # Neither the largest nor the mean of the last block's |x| is changed by what fills
                # it up.
                filling = part[-(part.numel() % BLOCK) :].abs().mean()
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
        numbers = code[blocks * self.scale_bytes : self.nbytes(x.numel())].view(
            blocks, BLOCK * self.bits // 8
        )
        step = CHUNK // BLOCK
        return [
            (x[i * BLOCK : (i + step) * BLOCK], scales[i : i + step], numbers[i : i + step])
            for i in range(0, blocks, step)
        ]

    @abstractmethod
    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        """Code whole blocks."""

    @abstractmethod
    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        """out <- out + weight decoded, whole blocks."""


@dataclass(frozen=True)
class BF16(BlockCodec):
    """The upper half of a float32: 8 bits of precision, no scale."""

    bits = 16
    scale_bytes = 0

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        largest = torch.finfo(torch.bfloat16).max
        numbers.view(torch.bfloat16).copy_(torch.clamp(x, -largest, largest, out=_floats(len(x))))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        out.add_(_floats(len(out)).copy_(numbers.view(torch.bfloat16)), alpha=weight)


@dataclass(frozen=True)
class Int8(BlockCodec):
    """Integers from -127 to 127 times scale = max |x| / 127; an error of at most scale / 2."""

    bits = 8
    scale_bytes = 4

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work = _floats(len(x))
        scale = scales.view(torch.float32)
        # Not below the normal numbers: the reciprocal of one would be infinite.
        torch.amax(torch.abs(x, out=work), 1, keepdim=True, out=scale).clamp_(max=_HUGE).div_(
            127
        ).clamp_(min=_TINY)
        torch.mul(x, scale.reciprocal(), out=work).round_().clamp_(-127, 127)
        numbers.view(torch.int8).copy_(work)

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        work = _floats(len(out)).copy_(numbers.view(torch.int8))
        out.addcmul_(work, scales.view(torch.float32), value=weight)


@dataclass(frozen=True)
class E3M0(BlockCodec):
    """4 bits: a sign and one of 0, 2^-6, ..., 1/2, 1, times a power of two, the block's largest |x| rounded.

    Powers of two change at 1.5 times the lower one, the middle; below 3/4 of the smallest comes 0.
    One bit pattern per sign is the zero, so that what has no exponent costs none. Neighbours share
    a byte.
    """

    bits = 4
    scale_bytes = 1

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work = _floats(len(x))
        sign = _integers(len(x))
        # The exponent of 4/3 |x| is that of |x| rounded.
        largest = torch.abs(x, out=work).amax(1, keepdim=True)
        top = largest.mul_(4 / 3).view(torch.int32).bitwise_right_shift_(23).clamp_(8, 254)
        scales.copy_(top)
        # Times 4/3 and the power of two that makes 2^8 of the top: exponents from 128 on, whose low
        # bits are the code.
        work.mul_((0x2AAAAB + (262 << 23) - (top << 23)).view(torch.float32)).clamp_(
            2.0, _BELOW_512
        )
        codes = work.view(torch.int32).bitwise_right_shift_(23)
        codes.add_(torch.bitwise_right_shift(x.view(torch.int32), 31, out=sign), alpha=-8)
        pairs = _bytes(len(x)).copy_(codes).view(torch.int16).bitwise_and_(0x0F0F)
        numbers.view(torch.int8).copy_(pairs.add_(pairs >> 4))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        unit = (scales.to(torch.int32) << 23).view(torch.float32)
        _look_up(numbers, _E3M0, out, unit.mul_(weight))


@dataclass(frozen=True)
class TwoBit(BlockCodec):
    """2 bits: -1.5, -0.5, 0.5 or 1.5 times scale = 2 mean |x|; zero is exact only where the whole block is zero.

    To be used with `ErrorFeedback`, which chose the scale. 1.25 mean |x| loses least of a normal law, but what it cuts
    off builds up in the residual and comes late, and an outer momentum of 0.9 does not bear that;
    well above 2 the residuals no longer shrink (docs/compression.md). Neighbours share a byte.
    """

    bits = 2
    scale_bytes = 4

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work = _floats(len(x))
        scale = scales.view(torch.float32)
        torch.sum(torch.abs(x, out=work), 1, keepdim=True, out=scale).mul_(2 / BLOCK).clamp_(
            max=_HUGE
        )
        torch.mul(x, scale.clamp(min=_TINY).reciprocal_(), out=work).floor_().clamp_(-2, 1)
        fours = _bytes(len(x)).copy_(work).view(torch.int32).bitwise_and_(0x03030303)
        fours.add_(fours >> 6)
        numbers.view(torch.int8).copy_(fours.add_(fours >> 12))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        _look_up(numbers, _TWO_BIT, out, scales.view(torch.float32) * weight)


@dataclass(frozen=True)
class ErrorFeedback:
    """What a codec loses is kept, and added to what is coded next (Seide et al. 2014; Karimireddy
    et al., 1901.09847).

    Args:
        codec: any codec.

    Raises:
        ValueError: it is none, a name, or has error feedback already.
    """

    codec: Codec

    def __post_init__(self) -> None:
        """Check that it is one."""
        if not isinstance(self.codec, Codec):
            raise ValueError(
                f"ErrorFeedback({self.codec!r}): allowed is a Codec; of a name, say codec='name+ef'"
            )


Coding = Codec | ErrorFeedback


def _look_up(numbers: Tensor, table: Tensor, out: Tensor, unit: Tensor) -> None:
    """out <- out + unit table[byte], whose entry is all the numbers of a byte, side by side in one wide number."""
    index = _integers(len(out)).view(-1)[: numbers.numel()].copy_(numbers.view(-1))
    values = _floats(len(out))
    torch.index_select(table, 0, index, out=values.view(table.dtype).view(-1))
    out.addcmul_(values, unit)


def _table(values: list[float], bits: int, wide: torch.dtype) -> Tensor:
    """All bytes' numbers, the lowest bits first, as one wide number each."""
    index = [[byte >> shift & 2**bits - 1 for shift in range(0, 8, bits)] for byte in range(256)]
    return torch.tensor(values)[torch.tensor(index)].view(wide).view(-1)


class _Scratch(threading.local):
    """Memory to work in, of each thread: two may code at a time."""

    def __init__(self) -> None:
        shape = (CHUNK // BLOCK, BLOCK)
        self.floats = torch.empty(shape, dtype=torch.float32)
        self.integers = torch.empty(shape, dtype=torch.int32)
        self.bytes = torch.empty(shape, dtype=torch.int8)


_scratch = _Scratch()


def _floats(blocks: int) -> Tensor:
    return _scratch.floats[:blocks]


def _integers(blocks: int) -> Tensor:
    return _scratch.integers[:blocks]


def _bytes(blocks: int) -> Tensor:
    return _scratch.bytes[:blocks]


_E3M0 = _table(
    [sign * (2.0 ** (k - 7) if k else 0.0) for sign in (1, -1) for k in range(8)], 4, torch.float64
)
_TWO_BIT = _table([0.5, 1.5, -1.5, -0.5], 2, torch.complex128)
CODECS: dict[str, Codec] = {"bf16": BF16(), "int8": Int8(), "e3m0": E3M0(), "2bit": TwoBit()}


def register_codec(name: str, codec: Codec) -> None:
    """Let `codec=name`, and `codec=name+"+ef"`, mean this codec; on all workers, before the
    optimizers are made.

    Raises:
        ValueError: the name is taken or has a "+" in it, or it is no codec.
    """
    if not isinstance(name, str) or not name or "+" in name or name in CODECS:
        raise ValueError(
            f"name={name!r}: allowed is text without '+', other than {', '.join(CODECS)}"
        )
    if not isinstance(codec, Codec):
        raise ValueError(f"codec={codec!r}: allowed is a Codec")
    CODECS[name] = codec


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
    raise ValueError(
        f"codec={codec!r}: allowed is a Codec, an ErrorFeedback, None, or one of {', '.join(CODECS)}, "
        'each also with "+ef" behind it'
    )
