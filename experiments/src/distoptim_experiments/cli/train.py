"""The subcommands that train with real processes: train and compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from distoptim_experiments import records
from distoptim_experiments.cli.options import (
    Given,
    algorithm_options,
    check_files,
    command,
    config_of,
    fields_of,
    new_folder,
    options_of,
    own_of,
)
from distoptim_experiments.config import NETWORK, RESULTS, TRAINING, RunConfig
from distoptim_experiments.data import datasets
from distoptim_experiments.report.progress import LiveProgress
from distoptim_experiments.report.table import note, table
from distoptim_experiments.settings import Option, Settings
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training import compare as comparison
from distoptim_experiments.training import elastic as elastic_worker
from distoptim_experiments.training.elastic import ElasticOptions
from distoptim_experiments.training.launch import Job, run_local, run_worker
from distoptim_experiments.training.rendezvous import Rendezvous, at_url, from_torchrun
from distoptim_experiments.training.world import workers_of

DEMO = {
    "epochs": 36,
    "lr": 0.01,
    "batch_size": 48,
    "latency_ms": 3.0,
    "bandwidth_gbit_s": 0.5,
    "log_every": 5,
    "evaluate_every": 49,
}
"""Fast enough for two cores, and a link over which an all-reduce takes about as long as a training
step."""

_LASTING = (
    "algorithm",
    "fragments",
    "pattern",
    "codec",
    "model",
    "optimizer",
    "momentum",
    "nesterov",
    "weight_decay",
    "data",
    "partition",
    "validation",
    "augment",
    "seed",
)
"""What a checkpoint holds the results of, or holds itself, so that a change would be an error or count
for nothing."""


ELASTIC_TIMEOUT_S = 60.0

_PICTURE = "comparison.png"


class Folder(Settings):
    """Where a command leaves what it makes."""

    folder: Annotated[
        Path | None,
        Field(description="Where they go."),
        Option(RESULTS, metavar="FOLDER", unset="a new folder in runs/"),
    ] = None


class TrainOptions(Settings):
    """What is said of the processes of a run, and of where it begins."""

    resume: Annotated[
        Path | None,
        Field(
            description="Go on with the run in this folder; options given now replace its own, if it "
            "can go on with them."
        ),
        Option(RESULTS, metavar="FOLDER"),
    ] = None
    auto_resume: Annotated[
        bool,
        Field(
            description="Go on with the run in --folder if it has a checkpoint, else begin; for "
            "torchrun --max-restarts."
        ),
        Option(RESULTS),
    ] = False
    tensorboard: Annotated[bool, Field(description="Log for TensorBoard too."), Option(RESULTS)] = (
        False
    )
    wandb: Annotated[
        bool,
        Field(description="Log to Weights & Biases too, as WANDB_PROJECT and WANDB_MODE say."),
        Option(RESULTS),
    ] = False
    init: Annotated[
        str | None,
        Field(
            description="Be one of several processes; rank 0 listens there. Not needed under torchrun."
        ),
        Option(NETWORK, metavar="tcp://HOST:PORT"),
    ] = None
    rank: Annotated[
        int | None,
        Field(description="With --init: this process's number, from 0."),
        Option(NETWORK),
    ] = None
    world_size: Annotated[
        int | None,
        Field(description="With --init: how many processes there are."),
        Option(NETWORK),
    ] = None


class CompareOptions(Settings):
    """What is compared."""

    methods: Annotated[
        str,
        Field(description="What is compared, one after the other."),
        Option(TRAINING, metavar="NAME,NAME,..."),
    ] = ",".join(comparison.COMPARED)


@command(
    options_of(RunConfig),
    options_of(Folder),
    options_of(TrainOptions),
    options_of(ElasticOptions),
    algorithm_options(),
)
def train(given: Given) -> int:
    """Train a model with one method.

    Starts --workers processes on this machine, or is one worker under torchrun or with --init; with
    --island-size N there are N times as many processes, and each is one of the ranks of a worker.
    """
    own = given.made(TrainOptions)
    folder = given.made(Folder).folder
    elastic = given.made(ElasticOptions)
    if elastic.elastic is not None:
        return _train_elastic(given, elastic, folder)
    resume = own.resume
    rendezvous = _rendezvous(own.init, own.rank, own.world_size) or from_torchrun()
    if own.auto_resume:
        resume = _found(folder, resume)
    elif resume is None:
        _check_free(folder)
    fields = given.all if resume is None else _resumed(resume, folder, given)
    started = rendezvous and workers_of(rendezvous.size, fields.get("island_size", 1))
    # Records of earlier versions lack the newest options.
    given.check_effects({**given.all, **fields, "started": started})
    if started:
        fields = {**fields, "workers": started}
    config = config_of(fields)
    check_files(config, tensorboard=own.tensorboard, wandb=own.wandb)
    job = Job(
        config,
        folder or resume or new_folder(config.algorithm),
        resume is not None,
        own.tensorboard,
        own.wandb,
    )
    return _run(job, rendezvous)


def _train_elastic(given: Given, elastic: ElasticOptions, folder: Path | None) -> int:
    """Be a worker that comes and goes; the same line brings it back."""
    given.check_effects({**given.all, "started": elastic.start})
    for name in ("resume", "auto_resume", "init", "rank", "world_size", "tensorboard", "wandb"):
        if given.all[name]:
            raise ValueError(f"--{name.replace('_', '-')} does not go with --elastic")
    if folder is None:
        raise ValueError(
            "--elastic goes with --folder FOLDER, in which each worker has one by its name"
        )
    # That of fixed workers is for those that are slow, not for those that are gone.
    timeout_s = given.values.get("timeout_s", ELASTIC_TIMEOUT_S)
    config = config_of({**given.all, "workers": elastic.start or 1, "timeout_s": timeout_s})
    elastic_worker.check(config, elastic)
    check_files(config)
    own = folder / str(elastic.name)
    if records.file(own).exists() and records.finished(own):
        print(f"{own}: this worker has ended its run; give another --folder for another one")
        return 0
    console = Console()
    with LiveProgress(console) as progress:
        signum = elastic_worker.run_elastic(
            config,
            own,
            elastic,
            [progress.watch(str(elastic.name))],
            resume=checkpoint.exists(own),
        )
    if signum:
        print("Stopped; the same line goes on", file=sys.stderr)
        return 128 + signum
    _tell(records.read(own), console)
    console.print(f"record: {own / records.FILE}", soft_wrap=True, highlight=False)
    return 0


def _run(job: Job, rendezvous: Rendezvous | None) -> int:
    """Start the run and say what came of it."""
    speaks = rendezvous is None or rendezvous.rank == 0
    console = Console(quiet=not speaks)
    with LiveProgress(console) as progress:
        watch = [progress.watch(job.config.algorithm)] if speaks else []
        signum = run_local(job, watch) if rendezvous is None else run_worker(job, rendezvous, watch)
    if signum and speaks:
        go_on = f"go on with: distoptim train --resume {job.folder}"
        print(
            f"Stopped; {go_on if checkpoint.exists(job.folder) else 'no checkpoint yet'}",
            file=sys.stderr,
        )
    elif speaks:
        _tell(records.read(job.folder), console)
        console.print(f"record: {job.folder / records.FILE}", soft_wrap=True, highlight=False)
    return 128 + signum if signum else 0


def _tell(record: records.Record, console: Console) -> None:
    """How a run ended."""
    console.print(table([record]))
    if record.summary and record.summary.diverged:
        step = record.summary.step
        why = "no worker is finite"
        if step >= record.start.steps:
            why = "the loss is no better than that of guessing"
        console.print(f"diverged after {step} steps: {why}", highlight=False)


@command(
    options_of(CompareOptions),
    options_of(RunConfig, without=("algorithm", "checkpoint_every"), defaults=DEMO),
    options_of(Folder),
    algorithm_options(),
)
def compare(given: Given) -> int:
    """Train the same model once per method, over an emulated slow link.

    An option of the algorithms goes to those that take it. Prints a table, and leaves a picture and
    the records of all runs.
    """
    # It draws; importing it takes longer than the help.
    from distoptim_experiments.report.figure import draw

    given.check_effects()
    methods = [name.strip() for name in given.made(CompareOptions).methods.split(",")]
    config = given.made(RunConfig)
    configs = comparison.variants(config, methods, own_of(given.all))
    check_files(configs[0])
    folder = given.made(Folder).folder
    _check_new(folder)
    folder = folder or new_folder("compare")
    console = Console()
    with LiveProgress(console) as progress:
        signum = comparison.compare(
            configs, folder, lambda config: progress.watch(config.algorithm)
        )
    if signum:
        print(f"Stopped; the records are in {folder}", file=sys.stderr)
        return 128 + signum
    runs = comparison.read(folder)
    picture = folder / _PICTURE
    draw(runs, picture)
    console.print(table(runs))
    console.print(note(runs), soft_wrap=True, highlight=False)
    for name, path in (("picture", picture), ("records", folder / "*" / records.FILE)):
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False)
    return 0


def _found(folder: Path | None, resume: Path | None) -> Path | None:
    """What --auto-resume goes on from, if there is something."""
    if folder is None or resume is not None:
        raise ValueError("--auto-resume goes with --folder FOLDER, and not with --resume")
    return folder if checkpoint.exists(folder) else None


def _check_free(folder: Path | None) -> None:
    """A new run would overwrite the record and the checkpoints of the one that is there."""
    if folder is not None and (records.file(folder).exists() or checkpoint.exists(folder)):
        raise ValueError(
            f"--folder {folder}: there is a run in it; go on with --resume {folder}, or with "
            "--auto-resume beside --folder, or give another folder"
        )


def _check_new(folder: Path | None) -> None:
    """A comparison would overwrite what is there of an earlier one, and mix the rest with its own."""
    if folder is not None and (records.folders(folder) or (folder / _PICTURE).exists()):
        raise ValueError(f"--folder {folder}: there are runs in it; give another folder")


def _resumed(resume: Path, folder: Path | None, given: Given) -> dict[str, Any]:
    """The options of a recorded run, with what is given on the command line now."""
    checkpoint.latest(resume)
    if folder is not None and folder != resume:
        raise ValueError(
            f"--resume {resume} with --folder {folder}: a run goes on in its own folder"
        )
    saved = records.read(resume).config.to_dict()
    now = {**fields_of(RunConfig, given.values), **own_of(given.values)}
    saved.update(saved.pop("options"))
    for name in _LASTING:
        if name in now and not _same(name, saved.get(name), now[name]):
            before = f"{name}={saved[name]!r}" if name in saved else f"the default {name}"
            raise ValueError(
                f"{name}={now[name]!r}: {resume} was begun with {before}, and goes on only with that"
            )
    return {**saved, **now}


def _same(name: str, before: Any, now: Any) -> bool:
    """Text is named by its place, which may be another one by now."""
    return bool(
        before == now
        or (name == "data" and not datasets.is_images(before) and not datasets.is_images(now))
    )


def _rendezvous(init: str | None, rank: int | None, size: int | None) -> Rendezvous | None:
    if init is not None:
        return at_url(init, rank, size)
    if rank is not None or size is not None:
        raise ValueError("--rank and --world-size go with --init tcp://HOST:PORT")
    return None
