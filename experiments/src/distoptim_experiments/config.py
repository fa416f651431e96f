"""Everything that describes a run, in one object that goes into its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from distoptim import checks
from distoptim.comm import Link, SingleWorker
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import partition
from distoptim_experiments.lr_schedule import SCHEDULES, Schedule
from distoptim_experiments.models import registry as models
from distoptim_experiments.training import optimizers, rounds
from distoptim_experiments.training.slowdown import SLOWDOWNS

DDP, FSDP2 = "ddp", "fsdp2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    Args:
        algorithm: a name of `distoptim.ALGORITHMS`, or "ddp": DistributedDataParallel.
        tau: local steps in a round, >= 1; "ddp" has no rounds.
        tau_at: other periods from later local steps on, such as "1000:8,4000:16".
        post_local: local steps of a synchronous phase before the algorithm begins, >= 0.
        hide_communication: let tau be the smallest that hides communication, as measured; `tau`
            does not count.
        adacomm: let tau follow the loss, from `tau` on, with a decision every so many local steps;
            0 does not.
        levels: "4:2": every 4 local steps the workers of each two average among themselves; more
            levels behind commas.
        options: of the algorithm, by keyword, where its defaults are not wanted.
        optimizer: the (inner) one, "sgd" or "adamw".
        lr, weight_decay: of it.
        momentum, nesterov: of SGD, in [0, 1); without momentum there is no Nesterov form.
        clip_norm: largest norm of a worker's gradient, > 0; None does not clip.
        scale_lr: the peak learning rate is lr times the number of workers (linear scaling).
        schedule: "constant", "steps" (times `decay` at each of the `milestones`) or "cosine" (to 0)
            after the warm-up.
        warmup_epochs: the learning rate rises from 1/workers of the peak to the peak, >= 0.
        milestones, decay: epochs, ascending; factor, in (0, 1].
        batch_size: samples per worker and step, >= 1.
        epochs: passes over the training set, >= 1.
        steps: local steps of each worker, >= 1; overrides `epochs`.
        seed: of the initial model, the partition and the batches, >= 0.
        data, data_dir, partition, model: names in `train.data`, `train.partition` and
            `train.models`, and the folder of files; with a model of text, `data` is a file or
            folder of it.
        validation: share of the training set held out and evaluated beside the test set, in [0, 1).
        augment: move and mirror the training images at random; not for text.
        workers: how many, >= 1.
        island_size: ranks of each worker, which share its batches, >= 1.
        island_kind: what they are together, if there are several: "ddp", each with the whole model,
            or "fsdp2", each with a shard of it.
        latency_ms: of one message over the emulated link, >= 0; None leaves the network as it is.
        bandwidth_gbit_s: of the emulated link, > 0; None means that only latency counts.
        slowdown, slowdown_ms: random delay of every local step, "none", "exponential" or "pareto"
            (shape 2.5), and its mean, > 0 unless there is none; a worker sleeps so long before the
            step.
        dtype: of the computation, "float32" or "bfloat16" (autocast).
        log_every, evaluate_every: local steps, >= 1; None means an epoch.
        checkpoint_every: local steps, >= 0; None means an epoch, 0 only at the end or when stopped.
        timeout_s: bound of every wait for the other workers, > 0.

    Raises:
        ValueError: a value outside its range, in one line.
    """

    algorithm: str = "overlap-local-sgd"
    tau: int = 4
    tau_at: str = ""
    post_local: int = 0
    hide_communication: bool = False
    adacomm: int = 0
    levels: str = ""
    options: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    scale_lr: bool = False
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    milestones: Sequence[float] = ()
    decay: float = 0.1
    batch_size: int = 32
    epochs: int = 20
    steps: int | None = None
    seed: int = 0
    data: str = "digits"
    data_dir: str | None = None
    partition: str = "iid"
    validation: float = 0.0
    augment: bool = False
    model: str = "cnn"
    workers: int = 4
    island_size: int = 1
    island_kind: str = DDP
    latency_ms: float | None = None
    bandwidth_gbit_s: float | None = None
    slowdown: str = "none"
    slowdown_ms: float = 0.0
    dtype: str = "float32"
    log_every: int = 10
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Check all values."""
        for name in ("tau", "batch_size", "epochs", "workers", "island_size", "log_every"):
            checks.integer(name, getattr(self, name), 1)
        for name, low in (("steps", 1), ("evaluate_every", 1), ("checkpoint_every", 0)):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low)
        checks.integer("seed", self.seed, 0, 2**31 - 1)
        for name, table in (
            ("model", models.MODELS),
            ("dtype", DTYPES),
            ("optimizer", optimizers.INNER),
            ("schedule", SCHEDULES),
            ("island_kind", (DDP, FSDP2)),
            ("slowdown", SLOWDOWNS),
        ):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: allowed is one of {', '.join(table)}"
                )
        self._check_data()
        checks.number("lr", self.lr, 0, checks.LARGEST)
        checks.number("momentum", self.momentum, 0, 1, open_high=True)
        checks.flag("nesterov", self.nesterov)
        checks.number("weight_decay", self.weight_decay, 0, checks.LARGEST)
        if self.clip_norm is not None:
            checks.number("clip_norm", self.clip_norm, 0, math.inf, open_low=True, open_high=True)
        checks.number("slowdown_ms", self.slowdown_ms, 0, 1e9, open_low=self.slowdown != "none")
        if self.slowdown == "none" and self.slowdown_ms:
            raise ValueError(
                f"slowdown_ms={self.slowdown_ms!r}: without a slowdown only 0 is allowed"
            )
        partition.parse(self.partition)
        checks.number("validation", self.validation, 0, 1, open_high=True)
        checks.number("warmup_epochs", self.warmup_epochs, 0, math.inf, open_high=True)
        checks.number("decay", self.decay, 0, 1, open_low=True)
        checks.flag("scale_lr", self.scale_lr)
        object.__setattr__(
            self,
            "milestones",
            [checks.number("milestones", m, 0, math.inf) for m in self.milestones],
        )
        if self.latency_ms is not None:
            checks.number("latency_ms", self.latency_ms, 0, math.inf, open_high=True)
        if self.bandwidth_gbit_s is not None:
            checks.number(
                "bandwidth_gbit_s",
                self.bandwidth_gbit_s,
                0,
                math.inf,
                open_low=True,
                open_high=True,
            )
        rounds.check(self, synchronous=self.synchronous)
        self._check_islands()
        # As many as there can be fragments.
        params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(min(self.tau, 1000))]
        optimizers.build(self, params, communicator=_Rehearsal(self.workers))

    def _check_data(self) -> None:
        """Text and models of text belong together."""
        if self.model not in models.TEXT_MODELS:
            if not data.is_images(self.data):
                raise ValueError(
                    f"data={self.data!r}: allowed is one of {', '.join(data.DATASETS)}, image-folder:SIZE"
                    f"; text goes with model={' or '.join(models.TEXT_MODELS)}, not {self.model!r}"
                )
            data.parse(self.data)
        elif data.is_images(self.data):
            raise ValueError(
                f"data={self.data!r} with model={self.model!r}: allowed is a file or folder of text"
            )
        elif self.partition != "iid":
            raise ValueError(f"partition={self.partition!r}: text has no classes, allowed is iid")
        elif self.augment:
            raise ValueError(
                "augment=True: only images are moved and mirrored, allowed is False with text"
            )

    def _check_islands(self) -> None:
        """Workers of several ranks, and what goes with them."""
        several = f"island_size={self.island_size!r}"
        if self.island_size == 1:
            if self.island_kind == FSDP2:
                raise ValueError(
                    f"island_kind='fsdp2' with {several}: one rank has nothing to shard, allowed is ddp"
                )
            return
        if self.synchronous:
            raise ValueError(
                f"{several}: {self.algorithm} averages the gradients of all ranks at every step, allowed "
                "is 1"
            )
        if self.batch_size % self.island_size:
            raise ValueError(
                f"batch_size={self.batch_size} with {several}: a worker's ranks share its batch, allowed "
                "are multiples"
            )
        for name in ("hide_communication", "adacomm"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with {several}: each rank of a worker would choose "
                    "tau by what it measures itself; give tau or tau_at"
                )
        if self.island_kind == FSDP2 and not hasattr(torch.cpu.Stream, "record_event"):
            raise ValueError(
                f"island_kind='fsdp2': FSDP2 of torch {torch.__version__} needs GPUs, allowed is ddp"
            )

    @property
    def ranks(self) -> int:
        """Processes of all workers."""
        return self.workers * self.island_size

    @property
    def synchronous(self) -> bool:
        """Gradients are averaged at every step: there are no rounds."""
        return self.algorithm in (optimizers.SYNCHRONOUS, optimizers.POWERSGD)

    @property
    def link(self) -> Link | None:
        """The emulated link, if there is one."""
        if self.latency_ms is None and self.bandwidth_gbit_s is None:
            return None
        bandwidth = float("inf") if self.bandwidth_gbit_s is None else self.bandwidth_gbit_s
        return Link((self.latency_ms or 0.0) / 1e3, bandwidth)

    @property
    def peak_lr(self) -> float:
        """The learning rate that the schedule's factor is applied to."""
        return self.lr * self.workers if self.scale_lr else self.lr

    def learning_rate(self, *, steps: int, steps_per_epoch: int) -> Schedule:
        """The schedule of a run of so many local steps."""
        return Schedule(
            self.schedule,
            steps,
            round(self.warmup_epochs * steps_per_epoch),
            self.workers,
            [round(m * steps_per_epoch) for m in self.milestones],
            self.decay,
        )

    def length(self, samples: int, workers: int) -> tuple[int, int]:
        """Local steps in an epoch, and in the whole run, of so many training samples on so many workers."""
        epoch = max(1, samples // (workers * self.batch_size))
        return epoch, self.steps or self.epochs * epoch

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `RunConfig(**config.to_dict())` is the same again."""
        return asdict(self)


def compared(fields: Mapping[str, Any]) -> RunConfig:
    """The run of one method of a comparison.

    What is said of rounds, but for tau, is left out where there are none.
    """
    config = RunConfig(**{name: value for name, value in fields.items() if name not in rounds.NONE})
    return config if config.synchronous else RunConfig(**fields)


class _Rehearsal(SingleWorker):
    """Stands for the workers that are not there yet, so that an optimizer can check its arguments."""

    def __init__(self, size: int) -> None:
        self.size = size

    def exchange(self, message: object) -> list[object]:
        return [message] * self.size
