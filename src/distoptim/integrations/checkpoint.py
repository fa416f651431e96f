"""Averaging optimizers in torch's distributed checkpoints (`torch.distributed.checkpoint`, DCP).

DCP takes one name for one thing, so that workers' parameters, which differ, would be mixed. Here names say
whose a value is:

- "mean.NAME": the model's state dict inside `averaged()`: what is published; written once.
- "shared.PATH": anchors and outer states, equal on all workers; written once.
- "worker3.model.NAME", "worker3.optimizer.PATH": a worker's own, and "worker3.plain", its numbers.

Where workers are FSDP2 islands, "mean" holds DTensors, which DCP cuts anew for other islands; "shared" and
"worker3" are followed by the coordinates of the shard in its island, ".shard0".
"""

from __future__ import annotations

import io
import itertools
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from distoptim import module_state, spectral_norm
from distoptim.comm import mesh
from distoptim.comm.mesh import WorkerMesh
from distoptim.engine import saved
from distoptim.engine.checkpoint import KEY
from distoptim.optimizer import AveragingOptimizer

Path = tuple[int | str, ...]
_PLAIN = re.compile(r"(?:(?P<outer>.+)\.)?worker(?P<worker>\d+)(?P<shard>\.shard[\d-]+)?\.plain")


@final
class AveragingState(Stateful):
    """A model and its averaging optimizer as one value of the state that DCP saves and loads.

    `dcp.save({"local": AveragingState(model, optimizer)}, checkpoint_id=FOLDER)`, `dcp.async_save` and
    `dcp.load` as always, on all ranks. A run resumed on as many workers is bit-equal to one that never
    stopped, also with a mean in flight. On another number of workers all start from the anchor, or from the
    mean in an algorithm without one; worker i of m goes on with the momentum of worker i mod n of n saved
    ones.

    Saving takes one mean of the model, as `averaged()` does, and is collective.

    Args:
        model: that is trained; of several optimizers, the part that this one trains.
        optimizer: that trains it. When loading, make it first.
        checkpoint_id: to load: where from, as `dcp.load` is told. What is there is then looked up first;
            without it as many workers must load as have saved, and the inner optimizer must be one of
            torch's, whose memory is known before its first step.
        storage_reader: to load from something else than a folder.
        key: this state's name in what is saved ("local" above); needed to load where there are several.

    Raises:
        ValueError: the optimizer is none of distoptim's, or nothing fit to load is there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: AveragingOptimizer,
        *,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_reader: StorageReader | None = None,
        key: str | None = None,
    ) -> None:
        if not isinstance(optimizer, AveragingOptimizer):
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: allowed is an optimizer of distoptim; save others "
                "by torch's own get_optimizer_state_dict()"
            )
        self._model = model
        self._optimizer = optimizer
        self._key = key
        # Until something was loaded from it.
        self._source = _reader(checkpoint_id, storage_reader)
        engine = optimizer.engine
        params = [p for sync in engine.syncs for p in sync.fragment.params]
        coordinates = itertools.chain.from_iterable(WorkerMesh(params).coordinates)
        shard = "-".join(map(str, coordinates))
        self._shard = f".shard{shard}" if shard else ""
        self._shared = f"shared{self._shard}."

    def state_dict(self) -> dict[str, Any]:
        """What is there to save; or, with `checkpoint_id`, what is to be loaded. For DCP to call."""
        return self._present() if self._source is None else self._wanted(self._source)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put what DCP has loaded into model and optimizer; collective. For DCP to call.

        Raises:
            ValueError: it does not fit, on all workers; as `AveragingOptimizer.load_state_dict`.
        """
        # What was asked for without looking are the live tensors themselves.
        loaded: dict[str, Any] = {
            name: value.clone() if self._source is None and isinstance(value, Tensor) else value
            for name, value in state_dict.items()
        }
        (plain,) = [name for name in loaded if _PLAIN.fullmatch(name)]
        own = plain.removesuffix("plain")

        def look_up(path: Path) -> Tensor:
            name = self._name(path, own)
            if name not in loaded:
                raise ValueError(
                    f"{name!r} is in the checkpoint, and the optimizer did not know that it would need it: "
                    "allowed is AveragingState(model, optimizer, checkpoint_id=...), which looks"
                )
            tensor: Tensor = loaded[name]
            return tensor

        tree = _join(torch.load(io.BytesIO(loaded[plain]), weights_only=True), (), look_up)
        values = _below("mean.", loaded)
        if tree[KEY]["workers"] == self._optimizer.engine.communicator.size:
            values |= _below(f"{own}model.", loaded)
        self._load_model(values)
        self._optimizer.load_state_dict(self._sharded(tree))
        self._source = None

    # ---- saving -----------------------------------------------------------------------------------

    def _present(self) -> dict[str, Any]:
        optimizer = self._optimizer
        optimizer.engine.check_local()
        out: dict[str, Any] = {}
        with optimizer.averaged(self._model):
            for name, value in self._model.state_dict().items():
                out[f"mean.{name}"] = value.clone() if isinstance(value, Tensor) else value
        own = f"worker{optimizer.engine.communicator.rank}{self._shard}."
        for name, value in self._own_values().items():
            out[f"{own}model.{name}"] = value
        tensors = self._to_come()
        plain = _split(optimizer.state_dict(), (), tensors)
        out |= {self._name(path, own): tensor for path, tensor in tensors.items()}
        file = io.BytesIO()
        torch.save(plain, file)
        # As bytes, since DCP would take a dictionary apart.
        out[f"{own}plain"] = file.getvalue()
        return out

    def _own_values(self) -> dict[str, Any]:
        """Of the model's state dict, what may differ between workers; of DTensors, this rank's shard."""
        trained = {id(p) for sync in self._optimizer.engine.syncs for p in sync.fragment.params}
        parts = module_state.parts_of([self._model], trained)
        equal = {id(tensor) for tensor in parts.equal.values()}
        values = self._model.state_dict(keep_vars=True)
        return {
            name: mesh.local(value.detach()) if isinstance(value, Tensor) else value
            for name, value in values.items()
            if id(value) not in equal
        }

    def _to_come(self) -> dict[Path, Tensor]:
        """What there may be in a checkpoint and is not here yet: DCP loads only what there is already.

        That is what optimizers remember after their first step, and means in flight.
        """
        out: dict[Path, Tensor] = {
            (KEY, "fragments", sync.index, "pending", "mean"): sync.buffer.tensor
            for sync in self._optimizer.engine.syncs
        }
        for path, optimizer in self._optimizers():
            for number, state in saved.to_come(optimizer).items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dim():
                        where = (*path, "state", number, name)
                        out[where] = torch.zeros(value.shape, dtype=value.dtype)
        return out

    def _optimizers(self) -> list[tuple[Path, torch.optim.Optimizer]]:
        """The inner optimizer and the outer ones, and where their states are."""
        out: list[tuple[Path, torch.optim.Optimizer]] = [((), self._optimizer.inner)]
        for sync in self._optimizer.engine.syncs:
            for name, value in vars(sync.state).items():
                if isinstance(value, torch.optim.Optimizer):
                    out.append(((KEY, "fragments", sync.index, "state", name), value))
        return out

    def _name(self, path: Path, own: str) -> str:
        """In the checkpoint, of a tensor of the optimizer's state dict."""
        if path[:2] == (KEY, "fragments") and path[3] == "state":
            index: Any = path[2]
            sync = self._optimizer.engine.syncs[index]
            if path[4] in self._optimizer.engine.rule.shared(sync.state):
                return self._shared + ".".join(map(str, path[1:]))
        return f"{own}optimizer." + ".".join(map(str, path))

    # ---- loading ----------------------------------------------------------------------------------

    def _wanted(self, source: StorageReader) -> dict[str, Any]:
        """Values to be overwritten by what is in the checkpoint, and no others."""
        found = _Found.of(source.read_metadata(), self._key)
        communicator = self._optimizer.engine.communicator
        own = f"worker{communicator.rank % found.workers}{self._shard}."
        if f"{own}plain" not in found.entries:
            raise ValueError(
                f"the checkpoint has no {own}plain: its workers were islands of another shape; allowed is "
                f"one like those of {sorted(n for n in found.entries if _PLAIN.fullmatch(n))}"
            )
        # Else parameters come with the workers' own, and what is equal on all from the mean.
        all_means = found.workers != communicator.size
        live = self._model.state_dict()
        out: dict[str, Any] = {}
        for name, entry in found.entries.items():
            kind, _, rest = name.partition(".")
            if kind == "mean" and (all_means or f"{own}model.{rest}" not in found.entries):
                out[name] = _room(entry, live.get(rest))
            elif name.startswith((own, self._shared)):
                out[name] = _room(entry)
        return out

    @torch.no_grad()
    def _load_model(self, values: Mapping[str, Any]) -> None:
        live = self._model.state_dict(keep_vars=True)
        if values.keys() != live.keys():
            raise ValueError(
                f"checkpoint has the values {sorted(values.keys() - live.keys())}, which the model has "
                f"not, and not its {sorted(live.keys() - values.keys())}"
            )
        tensors = {name: mesh.local(x) for name, x in live.items() if isinstance(x, Tensor)}
        shards = {name: mesh.local(values[name]) for name in tensors}
        for name, mine in tensors.items():
            if shards[name].shape != mine.shape:
                raise ValueError(
                    f"checkpoint has {name!r} of shape {list(shards[name].shape)}, the model "
                    f"{list(mine.shape)}"
                )
        for name, mine in tensors.items():
            mine.copy_(shards[name])
        rest = {name: values[name] for name in live if name not in tensors}
        if rest:
            self._model.load_state_dict(rest, strict=False)
        spectral_norm.recompute_weights(self._model)

    def _sharded(self, tree: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict in which what is shaped as a DTensor's shard is one again."""
        params = [p for group in self._optimizer.inner.param_groups for p in group["params"]]
        for number, state in tree["state"].items():
            p = params[number]
            if not isinstance(p, DTensor):
                continue
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.shape == mesh.local(p).shape:
                    state[name] = DTensor.from_local(
                        value.to(mesh.local(p).device),
                        p.device_mesh,
                        p.placements,
                        run_check=False,
                        shape=p.shape,
                        stride=p.stride(),
                    )
        return tree


def read_mean(
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The workers' mean in a checkpoint, as the model's state dict; in one process, without the others.

    Args:
        checkpoint_id: the folder.
        storage_reader: to read from something else.
        key: the `AveragingState`'s name in what was saved; needed where there are several.

    Raises:
        ValueError: there is none, or several and no key.
    """
    source = _reader(checkpoint_id, storage_reader)
    if source is None:
        raise ValueError("neither checkpoint_id nor storage_reader: allowed is either")
    found = _Found.of(source.read_metadata(), key)
    values = {
        found.prefix + name: _room(entry)
        for name, entry in found.entries.items()
        if name.startswith("mean.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(values, storage_reader=source, no_dist=True)
    return _below(f"{found.prefix}mean.", values)


def _reader(
    checkpoint_id: str | os.PathLike[str] | None, storage_reader: StorageReader | None
) -> StorageReader | None:
    if storage_reader is not None:
        return storage_reader
    return None if checkpoint_id is None else FileSystemReader(checkpoint_id)


@final
@dataclass(frozen=True)
class _Found:
    """What there is of one `AveragingState` in a checkpoint.

    Attributes:
        prefix: of its names in there.
        entries: the rest of its names -> what DCP says of the value.
        workers: that have saved.
    """

    prefix: str
    entries: dict[str, Any]
    workers: int

    @classmethod
    def of(cls, metadata: Metadata, key: str | None) -> _Found:
        """The one of this key, or the only one."""
        names = metadata.state_dict_metadata
        matches = [match for name in names if (match := _PLAIN.fullmatch(name))]
        outers = {match["outer"] for match in matches}
        outer = key if key is not None else next(iter(outers), None)
        if outer not in outers or (key is None and len(outers) > 1):
            raise ValueError(
                f"key={key!r}: the checkpoint has states of distoptim under {sorted(map(str, outers))}; "
                "allowed is one of them, or none where there is one"
                if outers
                else "the checkpoint has no state of distoptim: load the weights in it by torch's own "
                "means, on all workers, and start a new run with them"
            )
        prefix = "" if outer is None else f"{outer}."
        workers = 1 + max(int(match["worker"]) for match in matches if match["outer"] == outer)
        return cls(prefix, _below(prefix, names), workers)


@final
class _Unread:
    """Holds the place of an object that is to be loaded; nobody is to save it by mistake."""

    def __reduce__(self) -> NoReturn:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "this AveragingState has a checkpoint_id, from which nothing was loaded yet: dcp.load() it "
            "first, or save one without"
        )


def _room(entry: Any, like: object = None) -> Any:
    """What DCP can load a value into: cut as the model's, if that is a DTensor."""
    if not isinstance(entry, TensorStorageMetadata):
        return _Unread()
    if isinstance(like, DTensor) and like.shape == entry.size:
        return torch.empty_like(like)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _split(value: Any, path: Path, tensors: dict[Path, Tensor]) -> Any:
    """A copy in which tensors are without values, which are put into `tensors`; single numbers stay."""
    if isinstance(value, Tensor):
        shard = mesh.local(value.detach())
        if not shard.dim():
            return shard.clone()
        tensors[path] = shard
        return torch.empty_like(shard, device="meta")
    if isinstance(value, dict):
        return {name: _split(part, (*path, name), tensors) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_split(part, (*path, i), tensors) for i, part in enumerate(value))
    return value


def _join(value: Any, path: Path, look_up: Callable[[Path], Tensor]) -> Any:
    """The reverse."""
    if isinstance(value, Tensor):
        return look_up(path) if value.is_meta else value
    if isinstance(value, dict):
        return {name: _join(part, (*path, name), look_up) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(part, (*path, i), look_up) for i, part in enumerate(value))
    return value
