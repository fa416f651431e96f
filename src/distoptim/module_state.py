"""What of a module is averaged, what is a worker's own, and what must be equal on all workers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from distoptim import spectral_norm
from distoptim.comm import Communicator
from distoptim.comm.mesh import WorkerMesh
from distoptim.comm.mesh import local as shard_of
from distoptim.fragments import unfit

Names = str | Iterable[str] | None
_STATISTIC = "statistic"
_LOCAL = "local"
# An attribute, not a table beside the modules: it goes along when a module is copied or pickled.
_DECLARED = "_distoptim_roles"


def statistics(module: torch.nn.Module, names: Names = None) -> None:
    """Declare buffers or frozen parameters that `averaged()` is to average, as batch norm's are.

    Args:
        module: holds them, itself or in its submodules.
        names: theirs, dotted for a submodule's; None: all that can be averaged.

    Raises:
        ValueError: there is none of that name, or it is not a dense floating-point or complex tensor.
    """
    _declare(module, names, _STATISTIC)


def local(module: torch.nn.Module, names: Names = None) -> None:
    """Declare buffers or parameters that are a worker's own: they may differ, and stay as they are.

    Args:
        module: holds them, itself or in its submodules.
        names: theirs, dotted for a submodule's; None: all.

    Raises:
        ValueError: there is none of that name.
    """
    _declare(module, names, _LOCAL)


def _declare(module: torch.nn.Module, names: Names, role: str) -> None:
    known = {
        name: (owner, leaf, tensor) for name, owner, leaf, tensor in _tensors(module, lazy=True)
    }
    if names is None:
        fit = (
            n for n, (*_, t) in known.items() if role == _LOCAL or (t is not None and not unfit(t))
        )
        names = list(fit)
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise ValueError(
                f"{name!r} is no buffer or parameter of {type(module).__name__}; allowed are "
                f"{', '.join(known) or 'none, since it has none'}"
            )
        owner, leaf, tensor = known[name]
        why = tensor is not None and role == _STATISTIC and unfit(tensor)
        if why:
            raise ValueError(f"{name!r} cannot be averaged: {why}")
        vars(owner).setdefault(_DECLARED, {})[leaf] = role


def _tensors(
    module: torch.nn.Module, *, lazy: bool = False
) -> Iterator[tuple[str, torch.nn.Module, str, Tensor | None]]:
    """(name, owner, its name there, tensor) of all parameters and buffers.

    With `lazy` also of those that are None yet.
    """
    for path, owner in module.named_modules():
        tables: tuple[Mapping[str, Tensor | None], ...] = (
            owner._parameters,  # noqa: SLF001  # named_parameters() leaves out what is None
            owner._buffers,  # noqa: SLF001
        )
        for table in tables:
            for leaf, tensor in table.items():
                if lazy or tensor is not None:
                    yield (f"{path}.{leaf}" if path else leaf), owner, leaf, tensor


def _role(owner: torch.nn.Module, leaf: str, tensor: Tensor) -> str | None:
    """What the owner's kind, or the user, says of a tensor; None: nothing."""
    declared = cast("dict[str, str]", vars(owner).get(_DECLARED, {}))
    if leaf in declared:
        return declared[leaf]
    if isinstance(owner, _NormBase):
        return {
            "running_mean": _STATISTIC,
            "running_var": _STATISTIC,
            "num_batches_tracked": _LOCAL,
        }.get(leaf)
    own = spectral_norm.is_vector(owner, leaf) or _is_generator_state(tensor)
    return _LOCAL if own else None


def _is_generator_state(tensor: Tensor) -> bool:
    """Whether it can only be what torch.Generator.get_state() returns on the CPU."""
    return tensor.dtype == torch.uint8 and tensor.shape == torch.get_rng_state().shape


@final
@dataclass(frozen=True)
class Parts:
    """A module's tensors beside an optimizer's own, by name and by what happens to them.

    Attributes:
        statistics: averaged in `averaged()`.
        equal: neither averaged nor a worker's own.
        trained: those that require a gradient and are not the optimizer's.
    """

    statistics: dict[str, Tensor] = field(default_factory=dict)
    equal: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)

    @property
    def compared(self) -> bool:
        """Whether there is something that workers have to compare."""
        return bool(self.statistics or self.equal)


def parts_of(modules: Sequence[torch.nn.Module], own: Collection[int]) -> Parts:
    """What is in the modules beside the parameters with these ids; what is a worker's own left out."""
    out = Parts()
    seen = set(own)
    for k, module in enumerate(modules):
        prefix = f"[{k}]." if len(modules) > 1 else ""
        for name, owner, leaf, tensor in _tensors(module):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            role = _role(owner, leaf, tensor)
            if role == _STATISTIC:
                out.statistics[prefix + name] = tensor
            elif role is None:
                kind = out.trained if tensor.requires_grad else out.equal
                kind[prefix + name] = tensor
    return out


# ---- what must be equal ---------------------------------------------------------------------------


def look(tensor: Tensor) -> str:
    """Type and shape, for comparisons; of what is not dense, or of a class of its own, also that."""
    if is_lazy(tensor):
        return "not initialised"
    shard = shard_of(tensor).detach()
    kind = "" if _is_plain(shard) else f" {shard.layout} {type(shard).__name__}"
    return f"{shard.dtype}{list(shard.shape)}{kind}".replace("torch.", "")


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """Equal for tensors of equal type, shape and bytes; of a DTensor, of this rank's shard."""
    if is_lazy(tensor) or tensor.is_meta:
        return look(tensor)
    value = shard_of(tensor).detach().cpu()
    if _is_plain(value):
        content = _as_bytes(value).numpy().data
    else:
        # Sparse, quantised, or of a class of its own: as it is saved.
        file = io.BytesIO()
        torch.save(value, file)
        content = file.getbuffer()
    return f"{look(tensor)} {hashlib.sha256(content).hexdigest()[:32]}"


def _is_plain(value: Tensor) -> bool:
    return type(value) is Tensor and value.layout is torch.strided and not value.is_quantized


def _as_bytes(value: Tensor) -> Tensor:
    # A copy: one number that is expanded counts as contiguous, but cannot be viewed as bytes.
    dense = value.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8)


def differences(everybody: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, int]:
    """Name -> the first worker that has it otherwise than worker 0; in the order of the names.

    Args:
        everybody: of each worker, what each of its ranks says by name.
    """
    found: dict[str, int] = {}
    for rank, theirs in enumerate(everybody):
        for reference, other in zip(everybody[0], theirs, strict=True):
            for name in {**reference, **other}:
                if reference.get(name) != other.get(name):
                    found.setdefault(name, rank)
    order = [name for reference in everybody[0] for name in reference]
    return {name: found[name] for name in dict.fromkeys([*order, *found]) if name in found}


@torch.no_grad()
def make_equal(
    communicator: Communicator, mesh: WorkerMesh, tensors: Mapping[str, Tensor], *, sync: bool
) -> None:
    """Give everybody rank 0's values of what differs; blocking and collective.

    One message with digests; then only what differs is sent.

    Args:
        communicator: to the other workers.
        mesh: of this worker, whose ranks find the same differences.
        tensors: by name; names, types and shapes are equal on all workers.
        sync: False: only compare.

    Raises:
        ValueError: on all workers, naming the first that differs: it is only to be compared, or it is
            of a kind that cannot be overwritten in place.
    """
    if not tensors or communicator.size == 1:
        return
    own = mesh.all_gather_json({name: digest(t) for name, t in tensors.items()})
    messages = cast(
        "list[tuple[int, list[dict[str, str]]]]",
        communicator.all_gather_json([communicator.rank, own], what="construction"),
    )
    # Virtual workers are made one after the other and hear only themselves: all is sent.
    heard = [rank for rank, _ in messages] == list(range(communicator.size))
    differing = (
        differences([theirs for _, theirs in messages]) if heard else dict.fromkeys(tensors, 0)
    )
    ranks = communicator.ranks
    for name, worker in differing.items():
        if not sync:
            raise ValueError(
                f"workers disagree on {name!r}: rank {ranks[0]} and rank {ranks[worker]} hold other values; load the "
                "same on all workers, or leave sync_module=True, with which all get rank 0's"
            )
        _overwrite(communicator, name, shard_of(tensors[name]).detach())


def _overwrite(communicator: Communicator, name: str, value: Tensor) -> None:
    """value <- rank 0's, in place."""
    if not _is_plain(value) or value.is_meta:
        raise ValueError(
            f"{name!r} differs between workers and is a {value.layout} {value.dtype} "
            f"{type(value).__name__}, which cannot be made equal in place; load the same on all "
            f"workers, or declare distoptim.local(model, {name!r})"
        )
    for d, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[d] > 1:
            # Expanded: all its elements along this dimension are one in memory.
            value = value.narrow(d, 0, 1)
    message = _as_bytes(value)
    if not message.numel():
        return
    communicator.broadcast(message)
    with torch.inference_mode(value.is_inference()):
        value.copy_(message.view(value.dtype).view(value.shape))
