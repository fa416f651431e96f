"""Parameters -> fragments -> one flat buffer each, with views shaped like the parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from distoptim.chunks import chunked
from distoptim.comm import mesh
from distoptim.inner_state import StateCopies

Partition = Sequence[Sequence[int]]
Fragments = int | Sequence[Sequence[Tensor] | torch.nn.Module]
SEQUENTIAL, STRIDED = "sequential", "strided"

_WORK_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Flat:
    """One contiguous tensor and views of it, one per parameter, in the parameter's own memory order."""

    tensor: Tensor
    views: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel() * self.tensor.element_size()


class Fragment:
    """Parameters of one device and one working dtype that are averaged together, as one message.

    Parameters are read and written in place and never rebound. Half-precision parameters are held,
    averaged and merged in float32; a non-contiguous one keeps its memory order in the flat buffer
    (so channels_last costs no permutation), and a complex one counts as pairs of reals. Of a
    DTensor, this rank's shard is meant.

    Args:
        params: the parameters, in the order of the optimizer's param groups.
        groups: for each parameter, the index of its param group (ascending).
        part: which part of how many it is of; part k of n starts floor(k tau / n) local steps late.
        copies: of the parameters in the inner optimizer's state; they travel behind them.
        offload: whether buffers are in host memory, wherever the parameters are.

    Attributes:
        device: of the buffers.
        numel: elements of all that travels.
        params_numel: of the parameters, which come first.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        groups: Sequence[int],
        part: tuple[int, int] = (0, 1),
        copies: StateCopies | None = None,
        offload: bool = False,
    ) -> None:
        self.params = list(params)
        self._copies = copies if copies is not None and copies.names else None
        self.part = part
        self.device = torch.device("cpu") if offload else self.params[0].device
        # So that the device reads and writes it itself.
        self._pinned = self.device != self.params[0].device
        self.dtype = _WORK_DTYPE[self.params[0].dtype]
        self._mesh = mesh.WorkerMesh(self.params)
        self.sharded = any(mesh.is_sharded(p) for p in self.params)
        plain = not self.sharded and not any(p.is_complex() for p in self.params)
        self._direct = plain and self._copies is None
        each = 1 + (len(self._copies.names) if self._copies else 0)
        local = self.local()[: len(self.params)]
        # Copies are of any dtype that is averaged in this one.
        same_dtype = each == 1 and all(x.dtype == self.dtype for x in local)
        # All at once; not where a device would need another copy of all for it.
        self._foreach = same_dtype and not offload
        self.params_numel = sum(x.numel() for x in local)
        self.numel = each * self.params_numel
        self._shapes = each * [(x.shape, _dense_stride(x)) for x in local]
        self.segments = _segments(each * [x.numel() for x in local], each * list(groups))

    def local(self) -> list[Tensor]:
        """The parameters, and their copies behind them, as real tensors.

        Views are made anew at each call, since `.data` may be rebound.
        """
        if self._direct:
            return self.params
        copies = [] if self._copies is None else self._copies.of(self.params)
        shards = [mesh.local(p) for p in [*self.params, *copies]]
        return [torch.view_as_real(x) if x.is_complex() else x for x in shards]

    def fingerprint(self) -> int:
        """Equal for parameters of equal bits, on whatever device; of a DTensor, of this rank's shard."""
        params = self.local()[: len(self.params)]
        bits = [x.detach().view(_BITS[x.element_size()]) for x in params]
        return sum(torch.stack([x.sum(dtype=torch.int64) for x in bits]).tolist())

    def finite_everywhere(self, finite: Tensor) -> Tensor:
        """Whether a flag is true on all ranks that are one worker together; collective among them."""
        # What joins these ranks may not reach host memory.
        return self._mesh.everywhere(finite.to(self.params[0].device)).to(finite.device)

    def offset_at(self, tau: int) -> int:
        """Local steps by which its rounds are shifted, in [0, tau)."""
        return self.part[0] * tau // self.part[1]

    def flat(self, *, extra: int = 0) -> Flat:
        """Allocate a zeroed flat buffer, with `extra` elements behind the parameters'."""
        tensor = torch.zeros(
            self.numel + extra, dtype=self.dtype, device=self.device, pin_memory=self._pinned
        )
        views = []
        start = 0
        for shape, stride in self._shapes:
            views.append(tensor.as_strided(shape, stride, start))
            start += shape.numel()
        return Flat(tensor, views)

    def read(self, out: Flat) -> None:
        """out <- x."""
        torch._foreach_copy_(out.views, self.local())

    def write(self, value: Flat) -> None:
        """x <- value."""
        torch._foreach_copy_(self.local(), value.views)

    def add(self, value: Flat, *, weight: float = 1.0) -> None:
        """x <- x + weight value."""
        if self._foreach:
            torch._foreach_add_(self.local(), value.views, alpha=weight)
        else:
            for whole in zip(self.local(), value.views, strict=True):
                for x, v in chunked(*whole):
                    x.add_(v.to(x.device), alpha=weight)

    def pull(self, towards: Flat, weight: float) -> None:
        """x <- (1 - weight) x + weight towards."""
        if self._foreach:
            # Backwards: z's end was written last and is still in the cache; then x's start is, for
            # who reads it next.
            torch._foreach_lerp_(self.local()[::-1], towards.views[::-1], weight)
        else:
            for whole in zip(self.local(), towards.views, strict=True):
                for x, z in chunked(*whole):
                    x.copy_(x.to(z.dtype).lerp_(z.to(x.device), weight))

    def signature(self) -> str:
        """What must agree on all workers and with a checkpoint: dtype, shapes, memory order, copies."""
        shapes = [
            f"{p.dtype}{list(mesh.local(p).shape)}{_order(x)}"
            for p, x in zip(self.params, self.local(), strict=False)
        ]
        copies = [] if self._copies is None else [f"and {name}" for name in self._copies.names]
        return " ".join([*shapes, *copies]).replace("torch.", "")


def _dense_stride(x: Tensor) -> tuple[int, ...]:
    """The stride of x where it covers its memory without gaps or overlap, else the contiguous one."""
    dims = sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=x.stride)
    expected = 1
    for d in dims:
        if x.stride(d) != expected:
            return torch.empty(x.shape, device="meta").stride()
        expected *= x.shape[d]
    return x.stride() if x.numel() else torch.empty(x.shape, device="meta").stride()


def _order(x: Tensor) -> str:
    """Empty for the usual memory order, otherwise the dimensions from slowest to fastest."""
    stride = _dense_stride(x)
    dims = [d for d in range(x.dim()) if x.shape[d] > 1]
    ranked = sorted(dims, key=lambda d: -stride[d])
    return "" if ranked == dims else f"@{ranked}"


def _segments(sizes: Sequence[int], groups: Sequence[int]) -> list[tuple[int, slice]]:
    """(param group, its range in the flat buffer) for each run of one group."""
    out: list[tuple[int, slice]] = []
    start = 0
    for size, group in zip(sizes, groups, strict=True):
        if out and out[-1][0] == group:
            out[-1] = (group, slice(out[-1][1].start, start + size))
        else:
            out.append((group, slice(start, start + size)))
        start += size
    return out


def is_fsdp1(x: Tensor) -> bool:
    """Whether it is a shard, in either of the two ways in which FSDP1 holds parameters."""
    # By name, since importing it takes long.
    return bool(getattr(x, "_is_flat_param", False) or getattr(x, "_fsdp_flattened", False))


def unfit(x: Tensor) -> str:
    """Why a tensor cannot be averaged in place, and what can; empty where it can."""
    if is_lazy(x):
        return "it is not initialised; make a forward pass first"
    if x.is_meta:
        return "it is on the meta device and holds no values; load or initialise the model first"
    if is_fsdp1(x):
        return (
            "it is a shard of FullyShardedDataParallel (FSDP1), whose ranks hold one model together; "
            "allowed is FSDP2 (fully_shard) with device_mesh="
        )
    if x.dtype not in _WORK_DTYPE or x.layout is not torch.strided:
        return (
            f"it is of dtype {x.dtype} and layout {x.layout}; allowed are dense ones of "
            f"{[str(d) for d in _WORK_DTYPE]}"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return (
            f"it is expanded to {list(x.shape)}, with several elements at one place in memory; "
            "allowed is one that holds each (clone())"
        )
    return ""


def trainable(param_groups: Sequence[dict[str, object]]) -> tuple[list[Tensor], list[int]]:
    """The parameters to be averaged, each once, with their param group: those that require a
    gradient.

    Raises:
        ValueError: nothing to train, a parameter that is `unfit`, or two in one place in memory.
    """
    params: list[Tensor] = []
    groups: list[int] = []
    seen: set[int] = set()
    for index, group in enumerate(param_groups):
        members = group["params"]
        assert isinstance(members, list)
        for p in members:
            if not p.requires_grad or id(p) in seen:
                continue
            if why := unfit(p):
                raise ValueError(f"cannot average a parameter: {why}")
            seen.add(id(p))
            params.append(p)
            groups.append(index)
    if not params:
        raise ValueError("no parameter requires a gradient: there is nothing to average")
    _check_apart(params)
    return params, groups


def _check_apart(params: Sequence[Tensor]) -> None:
    """Whether no two lie in the same memory, where a mean would be merged twice."""
    places = sorted(
        (str(p.device), x.data_ptr(), x.data_ptr() + x.nbytes, list(p.shape))
        for p in params
        # Of one with gaps nobody can tell at a look; of a subclass neither.
        if type(x := mesh.local(p).detach()) is Tensor and x.numel() and _span(x) == x.numel()
    )
    for (device, _, end, shape), (other, start, _, others_shape) in itertools.pairwise(places):
        if device == other and start < end:
            raise ValueError(
                f"cannot average a parameter of shape {others_shape}: it lies in the memory of another one, of "
                f"shape {shape}, as where .data is shared; allowed is to tie them by one Parameter in "
                "both places"
            )


def _span(x: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def names(param_groups: Sequence[dict[str, object]]) -> list[str]:
    """The names of the trainable parameters, of those groups that were made of (name, parameter) pairs."""
    out: dict[int, str] = {}
    for group in param_groups:
        members, known = group["params"], group.get("param_names", [])
        assert isinstance(members, list)
        assert isinstance(known, list)
        out.update(
            {id(p): name for p, name in zip(members, known, strict=False) if p.requires_grad}
        )
    return list(out.values())


def partition(
    fragments: Fragments, params: Sequence[Tensor], tau: int, pattern: str = SEQUENTIAL
) -> list[list[int]]:
    """Which parameters, by index, each fragment holds.

    Args:
        fragments: how many, or the parts themselves: modules or lists of parameters.
        params: all trainable ones.
        tau: local steps in a round.
        pattern: of a number: "sequential" cuts the list into runs of near equal size, "strided"
            deals it out one by one, parameter i to fragment i mod n.

    Raises:
        ValueError: more fragments than local steps in a round (two would share a step) or than
            parameters, or parts that do not hold every trainable parameter exactly once.
    """
    if pattern not in (SEQUENTIAL, STRIDED):
        raise ValueError(f"pattern={pattern!r}: allowed is {SEQUENTIAL!r} or {STRIDED!r}")
    if isinstance(fragments, int):
        if isinstance(fragments, bool) or not 1 <= fragments <= min(tau, len(params)):
            raise ValueError(
                f"fragments={fragments!r}: allowed is an integer from 1 to "
                f"min(tau={tau}, {len(params)} parameters)"
            )
        if pattern == STRIDED:
            return [list(range(k, len(params), fragments)) for k in range(fragments)]
        return list(_runs([p.numel() for p in params], fragments))
    if pattern != SEQUENTIAL:
        raise ValueError(
            f"pattern={pattern!r} is for a number of fragments; these are given one by one"
        )
    index = {id(p): i for i, p in enumerate(params)}
    try:
        members = [
            list(part.parameters() if isinstance(part, torch.nn.Module) else part)
            for part in fragments
        ]
        parts = [[index[id(p)] for p in part if p.requires_grad] for part in members]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "fragments: each must be a module or a list of parameters of this optimizer"
        ) from error
    if sorted(i for part in parts for i in part) != list(range(len(params))) or not all(parts):
        raise ValueError(
            "fragments: together they must hold every trainable parameter exactly once, none empty"
        )
    if len(parts) > tau:
        raise ValueError(
            f"fragments: {len(parts)} of them, but tau={tau} local steps to place them in"
        )
    return [sorted(part) for part in parts]


def _runs(sizes: Sequence[int], count: int) -> Iterator[list[int]]:
    """Cut range(len(sizes)) into `count` non-empty runs whose totals are near equal."""
    total = sum(sizes)
    done = 0
    start = 0
    for k in range(1, count + 1):
        stop = start
        last = len(sizes) - (count - k)
        while stop == start or (
            stop < last and (k == count or done + sizes[stop] / 2 <= total * k / count)
        ):
            done += sizes[stop]
            stop += 1
        yield list(range(start, stop))
        start = stop


def build(
    params: Sequence[Tensor],
    groups: Sequence[int],
    parts: Partition,
    copies: StateCopies | None = None,
    *,
    offload: bool = False,
) -> list[Fragment]:
    """One fragment per part, device and working dtype."""
    out = []
    for k, part in enumerate(parts):
        by_kind: dict[tuple[str, torch.dtype], list[int]] = {}
        for i in part:
            by_kind.setdefault((str(params[i].device), _WORK_DTYPE[params[i].dtype]), []).append(i)
        for members in by_kind.values():
            out.append(
                Fragment(
                    [params[i] for i in members],
                    groups=[groups[i] for i in members],
                    part=(k, len(parts)),
                    copies=copies,
                    offload=offload,
                )
            )
    return out
