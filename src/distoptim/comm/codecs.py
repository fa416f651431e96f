"""Codecs: float32 numbers in fewer bits.

The built-in ones work in blocks of 256 with a scale of their own. A code is a row of bytes: the
blocks' scales, then the numbers. Rounding is deterministic. Work goes through scratch memory of the
size of a cache, so that main memory is read and written once; what bounds a codec is how often it
passes over that memory (docs/compression.md).
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distoptim import checks

BLOCK = 256
# Blocks that are coded at a time: their numbers and as much scratch memory fit a core's own cache,
# and torch's calls, two microseconds each, cost little beside the work.
STEP = 2**17 // BLOCK
# Of how many numbers a sparse code takes the largest, and of how many times that at a time.
_WIDE = 4096
_ROWS = 2**17 // _WIDE
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

    Attributes:
        gathered: whether everybody takes everybody's codes as they are, because a mean of them would
            not go into one (sparse codes); the way with fewer bytes is taken otherwise.
    """

    gathered: bool = False

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
        scale: dtype of a block's scale; None: it has none.
        word: dtype in which numbers are written.
    """

    bits: int
    scale: torch.dtype | None
    word: torch.dtype

    def nbytes(self, numel: int) -> int:
        """Scales and numbers of whole blocks, ceil(numel/256) (bytes of a scale + 32 bits)."""
        blocks = -(-numel // BLOCK)
        return blocks * (self._scale_bytes + BLOCK * self.bits // 8)

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

    @property
    def _scale_bytes(self) -> int:
        return 0 if self.scale is None else self.scale.itemsize

    def _parts(self, x: Tensor, code: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of x with their scales [blocks, 1] and numbers [blocks, words]."""
        blocks = -(-x.numel() // BLOCK)
        if not blocks:
            return iter(())
        end = blocks * self._scale_bytes
        scales = (
            code[:end].view(self.scale or torch.uint8).view(blocks, int(self.scale is not None))
        )
        numbers = code[end : self.nbytes(x.numel())].view(self.word).view(blocks, -1)
        if blocks <= STEP:
            return iter(((x, scales, numbers),))
        chunks = [torch.split(x, STEP * BLOCK), *(torch.split(t, STEP) for t in (scales, numbers))]
        return zip(*chunks, strict=True)

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
    scale = None
    word = torch.bfloat16

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        largest = torch.finfo(torch.bfloat16).max
        numbers.copy_(torch.clamp(x, -largest, largest, out=_scratch.of(x).floats))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        out.add_(_scratch.of(out).floats.copy_(numbers), alpha=weight)


@dataclass(frozen=True)
class Int8(BlockCodec):
    """Integers from -127 to 127 times scale = max |x| / 127; an error of at most scale / 2."""

    bits = 8
    scale = torch.float32
    word = torch.int8

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        work = _scratch.of(x).floats
        # Not below the normal numbers: the reciprocal of one would be infinite.
        torch.amax(torch.abs(x, out=work), 1, keepdim=True, out=scales).clamp_(max=_HUGE).div_(
            127
        ).clamp_(min=_TINY)
        torch.mul(x, scales.reciprocal(), out=work).round_().clamp_(-127, 127)
        numbers.copy_(work)

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        out.addcmul_(_scratch.of(out).floats.copy_(numbers), scales, value=weight)


@dataclass(frozen=True)
class E3M0(BlockCodec):
    """4 bits: a sign and one of 0, 2^-6, ..., 1/2, 1, times a power of two, the block's largest |x| rounded.

    Powers of two change at 1.5 times the lower one, the middle; below 3/4 of the smallest comes 0.
    One bit pattern per sign is the zero, so that what has no exponent costs none. Neighbours share
    a byte.
    """

    bits = 4
    scale = torch.uint8
    word = torch.uint8

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        scratch = _scratch.of(x)
        work = scratch.floats
        codes = work.view(torch.int32)
        # The exponent of 4/3 |x| is that of |x| rounded.
        largest = torch.abs(x, out=work).amax(1, keepdim=True)
        top = largest.mul_(4 / 3).view(torch.int32).bitwise_right_shift_(_23).clamp_(8, 254)
        scales.copy_(top)
        # Times 4/3 and the power of two that makes 2^8 of the top: exponents from 128 on, whose low
        # bits are the code.
        unit = torch.sub(_TO_2_8, top.bitwise_left_shift_(_23), out=top).view(torch.float32)
        work.mul_(unit).clamp_(2.0, _BELOW_512)
        exponents = scratch.bytes.copy_(codes.bitwise_right_shift_(_23))
        torch.bitwise_right_shift(x.view(torch.int32), _31, out=codes)
        signs = scratch.more_bytes.copy_(codes)
        pairs = exponents.sub_(signs, alpha=8).view(torch.int16).bitwise_and_(_NIBBLES)
        numbers.copy_(pairs.mul_(_JOIN_2).bitwise_right_shift_(_8))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        scratch = _scratch.of(out)
        unit = scales.to(torch.int32).bitwise_left_shift_(_23).view(torch.float32)
        values = scratch.floats.view(torch.float64).view(-1)
        torch.index_select(_E3M0, 0, scratch.index(numbers), out=values)
        out.addcmul_(scratch.floats, unit.mul_(weight))


@dataclass(frozen=True)
class TwoBit(BlockCodec):
    """2 bits: -1.5, -0.5, 0.5 or 1.5 times scale = 2 mean |x|; zero is exact only where the whole block is zero.

    To be used with `ErrorFeedback`, which chose the scale. 1.25 mean |x| loses least of a normal law, but what it cuts
    off builds up in the residual and comes late, and an outer momentum of 0.9 does not bear that;
    well above 2 the residuals no longer shrink (docs/compression.md). Neighbours share a byte.
    """

    bits = 2
    scale = torch.float32
    word = torch.uint8

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        scratch = _scratch.of(x)
        work = scratch.floats
        torch.sum(torch.abs(x, out=work), 1, keepdim=True, out=scales).mul_(2 / BLOCK).clamp_(
            max=_HUGE
        )
        torch.mul(x, scales.clamp(min=_TINY).reciprocal_(), out=work).floor_().clamp_(-2, 1)
        fours = scratch.bytes.copy_(work).view(torch.int32).bitwise_and_(_CRUMBS)
        numbers.copy_(fours.mul_(_JOIN_4).bitwise_right_shift_(_24))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        _look_up(numbers, _TWO_BIT, out, scales * (weight / 2))


@dataclass(frozen=True)
class OneBit(BlockCodec):
    """1 bit: the sign, times scale = mean |x|; zero is exact only where the whole block is zero, and positive elsewhere.

    No other scale loses less of the block's squares: what is lost is sum x^2 - (sum |x|)^2 / 256, never more than
    was there. To be used with `ErrorFeedback` (Karimireddy et al., 1901.09847). Eight neighbours share a byte.
    """

    bits = 1
    scale = torch.float32
    word = torch.uint8

    def _encode(self, x: Tensor, scales: Tensor, numbers: Tensor) -> None:
        scratch = _scratch.of(x)
        work = scratch.floats
        torch.mean(torch.abs(x, out=work), 1, keepdim=True, out=scales).clamp_(max=_HUGE)
        # Floats 0 and 1, and bytes of them: torch compares six times as fast to floats as to bools.
        eights = scratch.bytes.copy_(torch.lt(x, _0, out=work)).view(torch.int64)
        numbers.copy_(eights.mul_(_JOIN_8).bitwise_right_shift_(_56))

    def _add(self, scales: Tensor, numbers: Tensor, out: Tensor, weight: float) -> None:
        _look_up(numbers, _ONE_BIT, out, scales * weight)


@dataclass(frozen=True)
class TopK(Codec):
    """The k largest |x| of each 4,096 numbers, and 0 for the others, as in SparseLoCo (2508.15706): 12 bits for
    where a number stands, one for its sign, and one for which of two sizes it has, the mean of those
    above the k's mean or that of the others.

    To be used with `ErrorFeedback`, for SparseLoCo with decay=0.95.

    Args:
        k: a multiple of 4 in [4, 4096]; 64 are 1.6 % of the numbers, in 1/137 of float32's bytes.

    Raises:
        ValueError: k is anything else.
    """

    k: int
    gathered = True

    def __post_init__(self) -> None:
        """Check k."""
        if not isinstance(self.k, int) or self.k % 4 or not 4 <= self.k <= _WIDE:
            raise ValueError(f"k={self.k!r}: allowed is a multiple of 4 in [4, {_WIDE}]")

    def nbytes(self, numel: int) -> int:
        """Two sizes in float32 and k indices and numbers of whole chunks, ceil(numel/4096) (8 + 7/4 k)."""
        return -(-numel // _WIDE) * (8 + 7 * self.k // 4)

    def encode(self, x: Tensor, code: Tensor) -> None:
        """code <- x; infinities count as about the largest number there is."""
        sizes, indices, numbers = self._cut(x.numel(), code)
        for first in range(0, len(sizes), _ROWS):
            rows = slice(first, first + _ROWS)
            wide = x[first * _WIDE : (first + _ROWS) * _WIDE]
            if wide.numel() % _WIDE:
                wide = torch.cat([wide, wide.new_zeros(-wide.numel() % _WIDE)])
            self._encode(wide.view(-1, _WIDE), sizes[rows], indices[rows], numbers[rows])

    def add_decoded(self, code: Tensor, out: Tensor, *, weight: float = 1.0) -> None:
        """out <- out + weight decode(code), in float32."""
        sizes, indices, numbers = self._cut(out.numel(), code)
        if not len(sizes):
            return
        pairs = torch.zeros(len(sizes), self.k // 2, 4, dtype=torch.uint8)
        pairs[..., :3] = indices.view(len(sizes), -1, 3)
        pair = pairs.view(torch.int32).squeeze(-1)
        where = torch.stack((pair % _WIDE, pair // _WIDE), -1).view(len(sizes), self.k)
        where = (where + torch.arange(len(sizes), dtype=torch.int32)[:, None] * _WIDE).view(-1)
        kinds = _KINDS[numbers.view(-1).int()].view(torch.int8).view(len(sizes), self.k).long()
        values = torch.cat([sizes, -sizes], 1).mul_(weight).gather(1, kinds).view(-1)
        # What stands behind the end of a last, shorter chunk is 0.
        inside = where < out.numel()
        out.index_add_(0, where[inside], values[inside])

    def _encode(self, x: Tensor, sizes: Tensor, indices: Tensor, numbers: Tensor) -> None:
        where = _largest(x.abs(), self.k)
        values = x.gather(1, where)
        size = values.abs().clamp_(max=_HUGE)
        large = size > size.mean(1, keepdim=True)
        for column, kind in ((0, ~large), (1, large)):
            count = kind.sum(1).clamp_(min=1)
            sizes[:, column] = ((size * kind) / count[:, None]).sum(1).clamp_(max=_HUGE)
        pairs = where.view(len(x), -1, 2).int()
        pair = pairs[..., 0] + _WIDE * pairs[..., 1]
        triples = pair.contiguous().view(torch.uint8).view(len(x), -1, 4)[..., :3]
        indices.copy_(triples.reshape(len(x), -1))
        kinds = large.to(torch.int8).add_((values < 0).to(torch.int8), alpha=2)
        numbers.copy_(kinds.view(torch.int32).mul_(_JOIN_4).bitwise_right_shift_(_24))

    def _cut(self, numel: int, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A code's sizes [chunks, 2], indices [chunks, 3 k/2 bytes] and numbers [chunks, k/4 bytes]."""
        chunks = -(-numel // _WIDE)
        split = [chunks * n for n in (8, 3 * self.k // 2, self.k // 4)]
        sizes, indices, numbers = torch.split(code[: sum(split)], split)
        return (
            sizes.view(torch.float32).view(chunks, 2),
            indices.view(chunks, 3 * self.k // 2),
            numbers.view(chunks, self.k // 4),
        )


@dataclass(frozen=True)
class ErrorFeedback:
    """What a codec loses is kept, and added to what is coded next (Seide et al. 2014; Karimireddy
    et al., 1901.09847).

    Args:
        codec: any codec.
        decay: how much of it is still there at the next mean, in (0, 1]; 1 loses nothing in the sum.

    Raises:
        ValueError: it is no codec, a name, or has error feedback already, or decay is anything else.
    """

    codec: Codec
    decay: float = 1.0

    def __repr__(self) -> str:
        """As it was written; checkpoints of before there was a decay have it, too."""
        decay = "" if self.decay == 1 else f", decay={self.decay!r}"
        return f"ErrorFeedback(codec={self.codec!r}{decay})"

    def __post_init__(self) -> None:
        """Check both."""
        checks.number("decay", self.decay, 0, 1, open_low=True)
        if not isinstance(self.codec, Codec):
            raise ValueError(
                f"ErrorFeedback({self.codec!r}): allowed is a Codec; of a name, say codec='name+ef'"
            )


@dataclass(frozen=True)
class ResidualInParameters:
    """What a worker's own code loses stays in its parameters, and so in the next difference.

    For rules that correct the parameters by what was sent as the others read it
    (`CompressedMean.add_sent`). What codes of means lose is kept and added to the next ones, as with
    `ErrorFeedback`.

    Args:
        codec: any codec.
    """

    codec: Codec


Coding = Codec | ErrorFeedback | ResidualInParameters


def _largest(size: Tensor, k: int) -> Tensor:
    """Where the k largest of each row stand, [rows, k], in any order.

    The k largest are in the k columns of 8 that have the largest maxima: torch takes half as long to
    find these, and then k among 8 k.
    """
    columns = size.view(len(size), 8, -1)
    if columns.shape[-1] <= k:
        return torch.topk(size, k, 1, sorted=False)[1]
    found = torch.topk(columns.amax(1), k, 1, sorted=False)[1]
    among = columns.gather(2, found[:, None].expand(-1, 8, -1)).view(len(size), -1)
    best = torch.topk(among, k, 1, sorted=False)[1]
    return best // k * columns.shape[-1] + found.gather(1, best % k)


def _look_up(numbers: Tensor, table: Tensor, out: Tensor, unit: Tensor) -> None:
    """out <- out + unit table[byte], whose entry is all the numbers of a byte, side by side in one wide integer."""
    scratch = _scratch.of(out)
    values = scratch.bytes.view(table.dtype).view(-1)
    torch.index_select(table, 0, scratch.index(numbers), out=values)
    out.addcmul_(scratch.floats.copy_(scratch.bytes), unit)


def _table(values: Tensor, bits: int, wide: torch.dtype) -> Tensor:
    """All bytes' numbers, the lowest bits first, as one wide number each."""
    index = [[byte >> shift & 2**bits - 1 for shift in range(0, 8, bits)] for byte in range(256)]
    return values[torch.tensor(index)].view(wide).view(-1)


@dataclass(frozen=True)
class _Room:
    """Memory to work in: numbers of some blocks in floats and in bytes, and what is looked up with."""

    floats: Tensor
    bytes: Tensor
    more_bytes: Tensor
    integers: Tensor

    def index(self, numbers: Tensor) -> Tensor:
        """Bytes as torch takes them for an index."""
        return self.integers.view(-1)[: numbers.numel()].copy_(numbers.view(-1))


class _Scratch(threading.local):
    """A room of each thread: two may code at a time."""

    def __init__(self) -> None:
        self._whole = _Room(
            torch.empty(STEP, BLOCK),
            torch.empty(STEP, BLOCK, dtype=torch.int8),
            torch.empty(STEP, BLOCK, dtype=torch.int8),
            torch.empty(STEP, BLOCK // 2, dtype=torch.int32),
        )
        self._last = self._whole

    def of(self, x: Tensor) -> _Room:
        """As much of it as x [blocks, 256] needs."""
        blocks = x.shape[0]
        if self._last.floats.shape[0] != blocks:
            whole = self._whole
            # Kept: messages of a run have few sizes.
            self._last = _Room(
                whole.floats[:blocks],
                whole.bytes[:blocks],
                whole.more_bytes[:blocks],
                whole.integers[:blocks],
            )
        return self._last


_scratch = _Scratch()
# Of no dimensions: torch's calls take half as long with them as with Python's numbers.
_0 = torch.tensor(0.0)
_8 = torch.tensor(8, dtype=torch.int16)
_23 = torch.tensor(23, dtype=torch.int32)
_24 = torch.tensor(24, dtype=torch.int32)
_31 = torch.tensor(31, dtype=torch.int32)
_56 = torch.tensor(56)
# In 32 bits, where 262 << 23 wraps around.
_TO_2_8 = torch.tensor(0x2AAAAB + (262 << 23) - 2**32, dtype=torch.int32)
_NIBBLES = torch.tensor(0x0F0F, dtype=torch.int16)
_CRUMBS = torch.tensor(0x03030303, dtype=torch.int32)
# A wide number times this has the low bits of all its bytes, side by side, in its highest byte.
_JOIN_2 = torch.tensor(2**8 + 2**4, dtype=torch.int16)
_JOIN_4 = torch.tensor(2**24 + 2**18 + 2**12 + 2**6, dtype=torch.int32)
_JOIN_8 = torch.tensor(sum(2 ** (56 - 7 * k) for k in range(8)))
_E3M0 = _table(
    torch.tensor([s * (2.0 ** (k - 7) if k else 0.0) for s in (1, -1) for k in range(8)]),
    4,
    torch.float64,
)
_KINDS = _table(torch.arange(4, dtype=torch.int8), 2, torch.int32)
_TWO_BIT = _table(torch.tensor([1, 3, -3, -1], dtype=torch.int8), 2, torch.int32)
_ONE_BIT = _table(torch.tensor([1, -1], dtype=torch.int8), 1, torch.int64)
CODECS: dict[str, Codec] = {
    "bf16": BF16(),
    "int8": Int8(),
    "e3m0": E3M0(),
    "2bit": TwoBit(),
    "1bit": OneBit(),
    "top64": TopK(64),
}


def register_codec(name: str, codec: Codec) -> None:
    """Let `codec=name`, and with "+ef" behind it, mean this codec; on all workers, before the
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
    """The codec meant by an object, a name, or a name with "+ef" or "+ef0.95" (a decay) behind it.

    Raises:
        ValueError: it is none.
    """
    if codec is None or isinstance(codec, Coding):
        return codec
    if isinstance(codec, str):
        name, plus, rest = codec.partition("+")
        if name in CODECS and not plus:
            return CODECS[name]
        named = re.fullmatch(r"ef(1|0?\.\d*[1-9]\d*)?", rest)
        if name in CODECS and named is not None:
            return ErrorFeedback(CODECS[name], decay=float(named[1] or 1))
    raise ValueError(
        f"codec={codec!r}: allowed is a Codec, an ErrorFeedback, None, or one of {', '.join(CODECS)}, "
        'each also with "+ef" behind it, or "+ef0.95", of which so much is left at the next mean'
    )
