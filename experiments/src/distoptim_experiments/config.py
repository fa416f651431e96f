"""Everything that describes a run, in one object that goes into its record.

Each value stands here once, with type, default, range and meaning; TOML files, the command line and
its help are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from distoptim import checks
from distoptim.algorithms import ALGORITHMS, load_entry_points
from distoptim.comm import Link
from distoptim_experiments import lr_schedule
from distoptim_experiments.data import datasets
from distoptim_experiments.data import partition as partitions
from distoptim_experiments.machines import Slowdown
from distoptim_experiments.models import registry as models
from distoptim_experiments.settings import Needs, NoOption, Number, OneOf, Option, Settings

# Here, since workers' processes have to know them too, which no command line has started.
load_entry_points()

SYNCHRONOUS = "ddp"
POWERSGD = "powersgd"
DDP = "ddp"
FSDP2 = "fsdp2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TRAINING = "Training"
PROBLEM = "Data and model"
NETWORK = "Workers and network"
RESULTS = "Results"

ROUNDS = Needs(
    "without --hide-communication and --equal-time, for a method that has rounds",
    lambda v: (
        not v["hide_communication"]
        and not v["equal_time"]
        and v.get("algorithm") not in (SYNCHRONOUS, POWERSGD)
    ),
)
_SGD = Needs("with --optimizer sgd", lambda v: v["optimizer"] == "sgd")
_MOMENTUM = Needs(
    "with --optimizer sgd and a --momentum above 0",
    lambda v: v["optimizer"] == "sgd" and v["momentum"],
)
_EQUAL_TIME = Needs("with --equal-time", lambda v: v["equal_time"])
_MILESTONES = Needs("with --milestones", lambda v: v["schedule"] != "steps" or v["milestones"])
_STEPS = Needs("with --schedule steps", lambda v: v["schedule"] == "steps")
_EPOCHS = Needs("without --steps", lambda v: not v["steps"])
_FILES = Needs(
    "with data that have files in a folder",
    lambda v: "data" not in v or datasets.has_files(v["data"]),
)
_STARTED = Needs(
    "where this command starts them", lambda v: v.get("started") in (None, v["workers"])
)


def algorithms() -> list[str]:
    """All that `RunConfig.algorithm` may be."""
    return [SYNCHRONOUS, *ALGORITHMS, POWERSGD]


class RunConfig(Settings):
    """One training run.

    What of it goes together, and what the algorithm makes of its options, `optimizers.check` says.

    Raises:
        ValueError: a value outside its range, in one line.
    """

    algorithm: Annotated[
        str,
        Field(
            description="Method; ddp is synchronous SGD by DistributedDataParallel, powersgd the same "
            "with compressed gradients."
        ),
        OneOf(algorithms),
        Option(TRAINING),
    ] = "overlap-local-sgd"
    tau: Annotated[
        int,
        Field(ge=1, description="Local steps between two syncs."),
        Option(TRAINING, needs=ROUNDS),
    ] = 4
    tau_at: Annotated[
        str,
        Field(description="Other periods from later local steps on."),
        Option(TRAINING, metavar="STEP:TAU,..."),
    ] = ""
    post_local: Annotated[
        int,
        Field(ge=0, description="Synchronous steps first, before the algorithm begins."),
        Option(TRAINING),
    ] = 0
    hide_communication: Annotated[
        bool,
        Field(description="Let tau be the smallest that hides communication, as measured."),
        Option(TRAINING),
    ] = False
    adacomm: Annotated[
        int,
        Field(
            ge=0,
            description="Let tau follow the loss, from --tau on; decide every so many local steps.",
        ),
        Option(TRAINING),
    ] = 0
    equal_time: Annotated[
        Number,
        Field(
            ge=0,
            le=1e9,
            description="Seconds of a round, in which each worker makes as many local steps as fit; "
            "--steps and all else that counts steps counts rounds then.",
        ),
        Option(TRAINING),
    ] = 0.0
    weigh: Annotated[
        Literal["steps", "workers"],
        Field(description="What counts alike then: each local step's gradient, or each worker."),
        Option(TRAINING, needs=_EQUAL_TIME),
    ] = "steps"
    levels: Annotated[
        str,
        Field(description="Groups of neighbouring workers that average more often."),
        Option(TRAINING, metavar="PERIOD:SIZE,..."),
    ] = ""
    options: Annotated[
        dict[str, int | float | bool | str],
        Field(description="Of the algorithm, by keyword, where its defaults are not wanted."),
        NoOption("each of the algorithm's own options is one of the command line"),
    ] = Field(default_factory=dict)
    optimizer: Annotated[
        Literal["sgd", "adamw"], Field(description="Local optimizer."), Option(TRAINING)
    ] = "sgd"
    lr: Annotated[
        Number,
        Field(ge=0, le=checks.LARGEST, description="Learning rate of the local optimizer."),
        Option(TRAINING),
    ] = 0.05
    momentum: Annotated[
        Number,
        Field(ge=0, lt=1, description="Momentum of the local SGD."),
        Option(TRAINING, needs=_SGD),
    ] = 0.9
    nesterov: Annotated[
        bool, Field(description="Nesterov's form of it."), Option(TRAINING, needs=_MOMENTUM)
    ] = True
    weight_decay: Annotated[
        Number,
        Field(ge=0, le=checks.LARGEST, description="Weight decay of the local optimizer."),
        Option(TRAINING),
    ] = 1e-4
    clip_norm: Annotated[
        Number | None,
        Field(gt=0, description="Largest norm of a worker's gradient."),
        Option(TRAINING),
    ] = None
    scale_lr: Annotated[
        bool,
        Field(description="Peak learning rate: --lr times the number of workers."),
        Option(TRAINING),
    ] = False
    schedule: Annotated[
        lr_schedule.Kind,
        Field(description="Of the learning rate, after the warm-up."),
        Option(TRAINING, needs=_MILESTONES),
    ] = "constant"
    warmup_epochs: Annotated[
        Number,
        Field(ge=0, description="Epochs in which it rises from 1/workers of the peak."),
        Option(TRAINING),
    ] = 0.0
    milestones: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Field(
            strict=False, description="Epochs at which the schedule `steps` multiplies by --decay."
        ),
        Option(TRAINING, needs=_STEPS),
    ] = ()
    decay: Annotated[
        Number,
        Field(gt=0, le=1, description="Factor of the schedule `steps`."),
        Option(TRAINING, needs=_STEPS),
    ] = 0.1
    batch_size: Annotated[
        int, Field(ge=1, description="Samples per worker and step."), Option(TRAINING)
    ] = 32
    epochs: Annotated[
        int,
        Field(ge=1, description="Passes over the training set."),
        Option(TRAINING, needs=_EPOCHS),
    ] = 20
    steps: Annotated[
        int | None,
        Field(ge=1, description="Steps of each worker, instead of --epochs."),
        Option(TRAINING),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, le=2**31 - 1, description="Of the model, the partition and the batches."),
        Option(TRAINING),
    ] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="Of the computation."), Option(TRAINING)
    ] = "float32"
    data: Annotated[
        str,
        Field(
            description=f"One of {', '.join(datasets.DATASETS)}; image-folder:SIZE; or a file, or folder "
            "of *.txt files, of text."
        ),
        Option(PROBLEM),
    ] = "digits"
    data_dir: Annotated[
        str | None,
        Field(description="Folder with the files of the data set."),
        Option(PROBLEM, needs=_FILES, metavar="FOLDER"),
    ] = None
    partition: Annotated[
        str,
        Field(
            description="Who gets which samples: iid, label-skew[:SHARE], dirichlet[:CONCENTRATION]."
        ),
        Option(PROBLEM),
    ] = "iid"
    validation: Annotated[
        Number,
        Field(
            ge=0,
            lt=1,
            description="Share of the training set to hold out and evaluate beside the test set.",
        ),
        Option(PROBLEM),
    ] = 0.0
    augment: Annotated[
        bool, Field(description="Move and mirror the training images at random."), Option(PROBLEM)
    ] = False
    model: Annotated[
        str, Field(description="What is trained."), OneOf(models.MODELS.keys), Option(PROBLEM)
    ] = "cnn"
    workers: Annotated[
        int,
        Field(ge=1, description="Workers to start on this machine."),
        Option(NETWORK, needs=_STARTED),
    ] = 4
    island_size: Annotated[
        int,
        Field(ge=1, description="Ranks (processes) of each worker, which share its batches."),
        Option(NETWORK),
    ] = 1
    island_kind: Annotated[
        Literal["ddp", "fsdp2"],
        Field(
            description="With several: each has the whole model (ddp), or a shard of it (fsdp2)."
        ),
        Option(NETWORK),
    ] = "ddp"
    latency_ms: Annotated[
        Number | None,
        Field(ge=0, description="Emulate a link: milliseconds one message takes."),
        Option(NETWORK),
    ] = None
    bandwidth_gbit_s: Annotated[
        Number | None,
        Field(gt=0, description="Emulate a link: each worker's rate, in Gbit/s."),
        Option(NETWORK),
    ] = None
    streams: Annotated[
        int | None,
        Field(ge=1, le=64, description="Connections at once in a mean."),
        Option(NETWORK, unset="as many as a long fat link is worth"),
    ] = None
    slowdown: Annotated[
        Slowdown, Field(description="Random delay of every worker's steps."), Option(NETWORK)
    ] = "none"
    slowdown_ms: Annotated[
        Number, Field(ge=0, le=1e9, description="Its mean, in milliseconds."), Option(NETWORK)
    ] = 0.0
    timeout_s: Annotated[
        Number,
        Field(ge=1e-3, le=1e9, description="Bound of every wait for other workers, in seconds."),
        Option(NETWORK),
    ] = 600.0
    log_every: Annotated[
        int, Field(ge=1, description="Steps between two logged losses."), Option(RESULTS)
    ] = 10
    evaluate_every: Annotated[
        int | None,
        Field(ge=1, description="Steps between two evaluations."),
        Option(RESULTS, unset="an epoch"),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        Field(
            ge=0, description="Steps between two checkpoints; 0: only at the end, or when stopped."
        ),
        Option(RESULTS, unset="an epoch"),
    ] = None
    timeline: Annotated[
        bool,
        Field(
            description="Write what each worker does when, for `distoptim timeline`; not of ddp."
        ),
        Option(RESULTS),
    ] = False

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        """What no range of a single value says."""
        if self.slowdown == "none" and self.slowdown_ms:
            raise ValueError(
                f"slowdown_ms={self.slowdown_ms!r}: without a slowdown only 0 is allowed"
            )
        if self.slowdown != "none" and not self.slowdown_ms:
            checks.number("slowdown_ms", self.slowdown_ms, 0, 1e9, open_low=True)
        if self.equal_time and self.steps is None:
            raise ValueError(
                f"equal_time={self.equal_time!r}: how many rounds an epoch has is not known; allowed is with "
                "steps, which counts rounds"
            )
        partitions.parse(self.partition)
        self._check_data()
        self._check_islands()
        return self

    def _check_data(self) -> None:
        """Text and models of text belong together."""
        if self.model not in models.TEXT_MODELS:
            if not datasets.is_images(self.data):
                raise ValueError(
                    f"data={self.data!r}: allowed is one of {', '.join(datasets.DATASETS)}, image-folder:SIZE"
                    f"; text goes with model={' or '.join(models.TEXT_MODELS)}, not {self.model!r}"
                )
            datasets.parse(self.data)
        elif datasets.is_images(self.data):
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
        for name in ("hide_communication", "adacomm", "equal_time"):
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
        return self.algorithm in (SYNCHRONOUS, POWERSGD)

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

    def learning_rate(self, *, steps: int, steps_per_epoch: int) -> lr_schedule.Schedule:
        """The schedule of a run of so many local steps."""
        return lr_schedule.Schedule(
            kind=self.schedule,
            steps=steps,
            warmup=round(self.warmup_epochs * steps_per_epoch),
            workers=self.workers,
            milestones=tuple(round(m * steps_per_epoch) for m in self.milestones),
            decay=self.decay,
        )

    def length(self, samples: int, workers: int) -> tuple[int, int]:
        """Local steps in an epoch, and in the whole run, of so many training samples on so many workers."""
        epoch = max(1, samples // (workers * self.batch_size))
        return epoch, self.steps or self.epochs * epoch


ROUNDS_ONLY = (
    "tau_at",
    "post_local",
    "hide_communication",
    "adacomm",
    "equal_time",
    "weigh",
    "levels",
)
"""Fields that mean nothing to a method that averages gradients at every step."""


def compared(fields: Mapping[str, Any]) -> RunConfig:
    """The run of one method of a comparison.

    What is said of rounds, but for tau, is left out where there are none.
    """
    config = RunConfig(**{name: value for name, value in fields.items() if name not in ROUNDS_ONLY})
    return config if config.synchronous else RunConfig(**fields)
