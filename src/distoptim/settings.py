"""All options that every averaging optimizer takes, once: their types, defaults and ranges."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, final

import torch
from torch import Tensor

from distoptim import checks
from distoptim.comm import Communicator, connect, forgotten, world_size
from distoptim.comm.codecs import Coding
from distoptim.comm.codecs import find as find_codec
from distoptim.comm.mesh import averaging_group
from distoptim.comm.streams import AUTO
from distoptim.comm.streams import check as check_streams
from distoptim.fragments import SEQUENTIAL, Fragments
from distoptim.periods import Period, Tau, period_of

if TYPE_CHECKING:
    from distoptim.comm import DeviceMesh, ProcessGroup

Params = (
    Iterable[Tensor]
    | Iterable[dict[str, Any]]
    | Iterable[tuple[str, Tensor]]
    | torch.optim.Optimizer
)


class Options(TypedDict, total=False):
    """What type checkers need to know of `SyncSettings`; a test holds the two together."""

    lr: float | Tensor | None
    momentum: float | None
    dampening: float | None
    weight_decay: float | None
    nesterov: bool | None
    size: int | None
    group: ProcessGroup | None
    device_mesh: DeviceMesh | None
    levels: Mapping[int, ProcessGroup] | None
    communicator: Communicator | None
    fragments: Fragments
    pattern: str
    timeout_s: float
    average_in_step: bool
    reset_inner: bool
    codec: Coding | str | None
    streams: int | str
    offload: bool
    module: torch.nn.Module | Sequence[torch.nn.Module] | None
    sync_module: bool


@final
@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """The constructor's options; described where users read them, at `AveragingOptimizer`.

    Raises:
        ValueError: a value outside its range.
    """

    tau: Tau
    delay: int | None = None
    lr: float | Tensor | None = None
    momentum: float | None = None
    dampening: float | None = None
    weight_decay: float | None = None
    nesterov: bool | None = None
    size: int | None = None
    group: ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None
    levels: Mapping[int, ProcessGroup] | None = None
    communicator: Communicator | None = None
    fragments: Fragments = 1
    pattern: str = SEQUENTIAL
    timeout_s: float = 1800.0
    average_in_step: bool = False
    reset_inner: bool = False
    codec: Coding | str | None = None
    streams: int | str = AUTO
    offload: bool = False
    module: torch.nn.Module | Sequence[torch.nn.Module] | None = None
    sync_module: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked of one value."""
        period = self.period
        if self.delay is not None:
            checks.integer("delay", self.delay, 0, period.smallest)
        # A longer round hides no more at a fixed delay.
        if "communication_s" in period.measures and self.delay is not None:
            raise ValueError(
                f"delay={self.delay} with tau={self.tau!r}: a longer round hides no more at a fixed "
                "delay; leave delay away, in an algorithm where it is then the whole round"
            )
        self._check_time(period)
        checks.number("timeout_s", self.timeout_s, 1e-3, 1e9)
        checks.flag("average_in_step", self.average_in_step)
        if self.average_in_step and "loss" in period.measures:
            raise ValueError(
                f"average_in_step=True with tau={self.tau!r}: the period follows the loss, which step() is "
                "not told; allowed is average(loss=loss) after each step, or another tau"
            )
        checks.flag("reset_inner", self.reset_inner)
        checks.flag("offload", self.offload)
        checks.flag("sync_module", self.sync_module)
        if check_streams(self.streams) != AUTO and self.communicator is not None:
            raise ValueError(
                f"streams={self.streams} beside communicator=, which has its own; allowed is 'auto'"
            )
        _ = self.modules
        find_codec(self.codec)

    def _check_time(self, period: Period) -> None:
        if period.round_s is None:
            return
        if self.delay not in (0, None):
            raise ValueError(
                f"delay={self.delay} with tau={self.tau!r}: a local step is not as long on all workers; "
                "allowed is 0, or None for the whole round"
            )
        if self.fragments != 1:
            raise ValueError(
                f"fragments={self.fragments!r} with tau={self.tau!r}: nobody knows at which local step a "
                "part of the round is over; allowed is 1"
            )

    @property
    def period(self) -> Period:
        """What chooses tau."""
        return period_of(self.tau)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that were given, as a list.

        Raises:
            ValueError: one is none.
        """
        given = self.module
        if given is None or isinstance(given, torch.nn.Module):
            return [] if given is None else [given]
        if isinstance(given, Sequence) and all(isinstance(m, torch.nn.Module) for m in given):
            return list(given)
        raise ValueError(f"module={given!r}: allowed is a torch.nn.Module, or a list of them")

    @property
    def coding(self) -> Coding | None:
        """The codec, as an object."""
        return find_codec(self.codec)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncSettings:
        """A copied optimizer averages over the same groups."""
        for shared in (self.group, self.device_mesh, *(self.levels or {}).values()):
            memo[id(shared)] = shared
        copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def workers(self) -> int:
        """How many workers there will be.

        Raises:
            ValueError: the communicator is none, group or mesh are of other workers, or there are not
                as many as `size` says.
        """
        found = self._workers()
        if self.size is not None and checks.integer("size", self.size, 1) != found:
            raise ValueError(f"size={self.size}, but the process group has {found} workers")
        return found

    def _workers(self) -> int:
        if self.communicator is None:
            group = self.averaging_group()
            size = world_size(group)
            if started := forgotten():
                raise ValueError(
                    f"torchrun started {started} processes (WORLD_SIZE), but torch.distributed is not "
                    "initialised, so that each would train alone: call "
                    "torch.distributed.init_process_group() before the optimizer is made; to train "
                    "alone, communicator=distoptim.comm.SingleWorker()"
                )
            if size < 1:
                raise ValueError(f"group={group!r}: this worker is not a member of it")
            return size
        self.averaging_group()
        if not isinstance(self.communicator, Communicator):
            raise ValueError(
                f"communicator={self.communicator!r}: allowed is an instance of a subclass of "
                "distoptim.comm.Communicator"
            )
        return self.communicator.size

    def averaging_group(self) -> ProcessGroup | None:
        """The process group to average in; None for all workers, and where a communicator is given."""
        return averaging_group(self.group, self.device_mesh, self.communicator)

    def connect(self) -> Communicator:
        """The communicator that was given, or one over the group; collective in the latter case."""
        if self.communicator is not None:
            return self.communicator
        return connect(self.averaging_group(), self.timeout_s, streams=self.streams)

    def check_offload(self, communicator: Communicator) -> None:
        """Whether messages can be where they are to be.

        Raises:
            ValueError: they cannot.
        """
        if self.offload and not communicator.carries_host_memory:
            raise ValueError(
                "offload=True beside nccl alone, which carries no host memory; allowed is gloo too: "
                "init_process_group('cpu:gloo,cuda:nccl')"
            )

    def inner_optimizer(self, params: Params) -> torch.optim.Optimizer:
        """The optimizer that was given, or an SGD over the parameters.

        Raises:
            ValueError: a value outside its range, or one beside an optimizer.
        """
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if isinstance(params, torch.optim.Optimizer):
            # By name: importing it takes longer than all of this library.
            if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(params).__mro__):
                raise ValueError(
                    "ZeroRedundancyOptimizer updates on each rank another part of one model: its ranks "
                    "are no workers that could be averaged; allowed is the optimizer inside it, or FSDP2 "
                    "(fully_shard) with device_mesh="
                )
            if not hasattr(params, "defaults"):
                raise ValueError(
                    f"{type(params).__name__} has no defaults, which torch.optim.Optimizer's constructor "
                    "makes: it stands around another optimizer; allowed is that one"
                )
            if given:
                raise ValueError(
                    f"{', '.join(given)}: belongs to the optimizer that was given; set it there"
                )
            _check_rates(params)
            return params
        made = torch.optim.SGD(params, **{n: _of_sgd(n, value) for n, value in given.items()})
        _check_rates(made)
        return made


def _check_rates(inner: torch.optim.Optimizer) -> None:
    """Whether every param group has a learning rate, or none in an optimizer that needs none."""
    needs_none = inner.defaults.get("lr") is None
    for i, group in enumerate(inner.param_groups):
        lr = group.get("lr")
        if lr is None and needs_none:
            continue
        value = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
        checks.number(f"lr of param group {i}", value, 0, checks.LARGEST)


def _of_sgd(name: str, value: object) -> Any:
    if name == "nesterov":
        return checks.flag(name, value)
    if name == "lr" and isinstance(value, Tensor):
        # Stays a tensor: a compiled step reads it anew each time.
        checks.number(name, value.item() if value.numel() == 1 else value, 0, checks.LARGEST)
        return value
    low = -checks.LARGEST if name == "dampening" else 0
    return checks.number(name, value, low, checks.LARGEST)


def whole_signature(init: Any) -> inspect.Signature:
    """Of an optimizer's constructor, with every option by name instead of `**options`.

    Tooltips and the command line read it.
    """
    own = inspect.signature(init)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in parameters}
    if len(parameters) == len(own.parameters):
        return own.replace(parameters=parameters[1:])
    for f in dataclasses.fields(SyncSettings):
        if f.name not in names:
            default = inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default
            parameters.append(
                inspect.Parameter(
                    f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=f.type
                )
            )
    # Without self.
    return own.replace(parameters=parameters[1:])
