"""The subcommands of `distoptim`, and how their options become a RunConfig."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console

import distoptim
from distoptim.report.figure import draw
from distoptim.report.progress import LiveProgress
from distoptim.report.table import note, table
from distoptim.train import checkpoint, data, models, optimizers, records
from distoptim.train import compare as comparison
from distoptim.train.config import DTYPES, RunConfig
from distoptim.train.launch import Job, run_local, run_worker
from distoptim.train.world import Meeting, from_torchrun

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RunConfig)}
# Fast enough for two cores, and a link over which an all-reduce takes about as long as a training step.
DEMO = {**DEFAULTS, "epochs": 36, "lr": 0.01, "batch_size": 48, "latency_ms": 3.0, "bandwidth_gbit_s": 0.5,
        "log_every": 5, "evaluate_every": 49}


class Option(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *args: Any, section: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Sections(click.Command):
    """A command whose help lists its options by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per section, in the order in which the sections first appear."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for name, rows in sections.items():
            with formatter.section(name):
                formatter.write_dl(rows)


def _option(section: str, *names: str, default: Any = None, **kwargs: Any) -> Callable[[Command], Command]:
    return click.option(*names, cls=Option, section=section, default=default,
                        show_default=default is not None and not kwargs.get("is_flag", False), **kwargs)


def run_options(defaults: dict[str, Any]) -> Callable[[Command], Command]:
    """The options that every training has; their names are the fields of RunConfig."""
    training, problem, network, files = "Training", "Data and model", "Workers and network", "Results"
    rows: list[tuple[str, str, Any, str]] = [
        (training, "--tau", int, "Local steps between two syncs."),
        (training, "--lr", float, "Learning rate of the local SGD."),
        (training, "--momentum", float, "Momentum of the local SGD."),
        (training, "--nesterov/--no-nesterov", None, "Nesterov's form of it."),
        (training, "--weight-decay", float, "Weight decay of the local SGD."),
        (training, "--batch-size", int, "Samples per worker and step."),
        (training, "--epochs", int, "Passes over the training set."),
        (training, "--steps", int, "Steps of each worker, instead of --epochs."),
        (training, "--seed", int, "Of the model, the partition and the batches."),
        (training, "--dtype", click.Choice(list(DTYPES)), "Of the computation."),
        (problem, "--data", click.Choice(list(data.DATASETS)), "Data set; digits come with scikit-learn."),
        (problem, "--data-dir", click.Path(), "Folder with the IDX files of mnist or fashion-mnist."),
        (problem, "--partition", click.Choice(list(data.PARTITIONS)), "Who gets which samples."),
        (problem, "--model", click.Choice(list(models.MODELS)), "What is trained."),
        (network, "--workers", int, "Processes on this machine."),
        (network, "--latency-ms", float, "Emulate a link: milliseconds one message takes."),
        (network, "--bandwidth-gbit-s", float, "Emulate a link: each worker's rate, in Gbit/s."),
        (network, "--timeout-s", float, "Bound of every wait for other workers, in seconds."),
        (files, "--folder", click.Path(path_type=Path), "Where they go.  [default: a new folder in runs/]"),
        (files, "--log-every", int, "Steps between two logged losses."),
        (files, "--evaluate-every", int, "Steps between two evaluations." + (
            "" if defaults["evaluate_every"] else "  [default: an epoch]")),
    ]

    def add(command: Command) -> Command:
        for section, names, kind, text in reversed(rows):
            field = names.split("/")[0].removeprefix("--").replace("-", "_")
            metavar = "FOLDER" if isinstance(kind, click.Path) else None
            command = _option(section, names, type=kind, default=defaults.get(field), metavar=metavar,
                              help=text)(command)
        return command

    return add


def algorithm_options(command: Command) -> Command:
    """One option for each that an algorithm has of its own, read from the constructors."""
    takers: dict[str, list[str]] = {}
    types: dict[str, type] = {}
    for algorithm in optimizers.names():
        for name, kind in optimizers.own_options(algorithm).items():
            takers.setdefault(name, []).append(algorithm)
            types[name] = kind
    for name in reversed(takers):
        everybody = len(takers[name]) == len(optimizers.names()) - 1
        of = "all but ddp" if everybody else ", ".join(takers[name])
        command = _option("Options of the algorithms (default: each one's own)", f"--{name.replace('_', '-')}", name,
                          type=types[name], help=f"Of {of}.")(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(distoptim.__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train with communication hidden behind computation."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(cls=Sections)
@_option("Training", "--algorithm", type=click.Choice(optimizers.names()), default=DEFAULTS["algorithm"],
         help="Method; ddp is synchronous SGD by DistributedDataParallel.")
@run_options(DEFAULTS)
@_option("Results", "--checkpoint-every", type=int,
         help="Steps between two checkpoints; 0: only at the end.  [default: an epoch]")
@_option("Results", "--resume", type=click.Path(path_type=Path), metavar="FOLDER",
         help="Go on with the run in this folder; options given now replace its own.")
@_option("Results", "--tensorboard", is_flag=True, default=False, help="Log for TensorBoard too.")
@_option("Workers and network", "--init", metavar="tcp://HOST:PORT",
         help="Be one of several workers; rank 0 listens there. Not needed under torchrun.")
@_option("Workers and network", "--rank", type=int, help="With --init: this worker's number, from 0.")
@_option("Workers and network", "--world-size", type=int, help="With --init: how many workers there are.")
@algorithm_options
def train(*, folder: Path | None, resume: Path | None, tensorboard: bool, init: str | None, rank: int | None,
          world_size: int | None, **given: Any) -> int:
    """Train a model with one method.

    Starts --workers processes on this machine, or is one worker under torchrun or with --init.
    """
    meeting = _meeting(init, rank, world_size) or from_torchrun()
    if meeting is not None:
        given["workers"] = meeting.size
    if resume is not None:
        checkpoint.latest(resume)
    config = _config(given) if resume is None else _resumed(resume, given, keep_workers=meeting is None)
    _check_files(config, tensorboard)
    job = Job(config, folder or resume or _new_folder(config.algorithm), resume is not None, tensorboard)
    speaks = meeting is None or meeting.rank == 0
    console = Console(quiet=not speaks)
    with LiveProgress(console) as progress:
        watch = [progress.watch(config.algorithm)] if speaks else []
        signum = run_local(job, watch) if meeting is None else run_worker(job, meeting, watch)
    if signum and speaks:
        go_on = f"go on with: distoptim train --resume {job.folder}"
        print(f"Stopped; {go_on if checkpoint.exists(job.folder) else 'no checkpoint yet'}", file=sys.stderr)
    elif speaks:
        console.print(table([records.read(job.folder)]))
        console.print(f"record: {job.folder / records.FILE}", soft_wrap=True, highlight=False)
    return 128 + signum if signum else 0


@cli.command(cls=Sections)
@_option("Training", "--methods", default=",".join(comparison.METHODS), metavar="NAME,NAME,...",
         help="What is compared, one after the other.")
@run_options(DEMO)
def compare(*, methods: str, folder: Path | None, **given: Any) -> int:
    """Train the same model once per method, over an emulated slow link.

    Prints a table, and leaves a picture and the records of all runs.
    """
    configs = comparison.variants(_config(given), [name.strip() for name in methods.split(",")])
    _check_files(configs[0])
    folder = folder or _new_folder("compare")
    console = Console()
    with LiveProgress(console) as progress:
        signum = comparison.compare(configs, folder, lambda config: progress.watch(config.algorithm))
    if signum:
        print(f"Stopped; the records are in {folder}", file=sys.stderr)
        return 128 + signum
    runs = comparison.read(folder)
    picture = folder / "comparison.png"
    draw(runs, picture)
    console.print(table(runs))
    console.print(note(runs), soft_wrap=True, highlight=False)
    for name, path in (("picture", picture), ("records", folder / "*" / records.FILE)):
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False)
    return 0


def _config(given: dict[str, Any]) -> RunConfig:
    """From options by name: those that are no field of RunConfig are the algorithm's own."""
    fields = {name: value for name, value in given.items() if name in DEFAULTS}
    own = {name: value for name, value in given.items() if name not in DEFAULTS and value is not None}
    return RunConfig(**{"options": own, **fields})


def _resumed(folder: Path, given: dict[str, Any], *, keep_workers: bool) -> RunConfig:
    """The configuration of a recorded run, with what is given on the command line now."""
    ctx = click.get_current_context()
    saved = records.read(folder).config
    now = {name: value for name, value in given.items()
           if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE or (name == "workers" and not keep_workers)}
    return _config({**saved, **saved.pop("options"), **now})


def _check_files(config: RunConfig, tensorboard: bool = False) -> None:
    """Fail here, before there are workers."""
    data.load(config.data, None if config.data_dir is None else Path(config.data_dir))
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs TensorBoard: pip install 'distoptim[tensorboard]'")


def _meeting(init: str | None, rank: int | None, size: int | None) -> Meeting | None:
    if init is None:
        if rank is not None or size is not None:
            raise ValueError("--rank and --world-size go with --init tcp://HOST:PORT")
        return None
    host, colon, port = init.removeprefix("tcp://").rpartition(":")
    if not init.startswith("tcp://") or not colon or not port.isdigit():
        raise ValueError(f"--init {init}: expected tcp://HOST:PORT")
    if rank is None or size is None or not 0 <= rank < size:
        raise ValueError(f"--init needs --rank and --world-size with 0 <= rank < world size, got {rank} and {size}")
    return Meeting(host, int(port), rank, size, hosted=False)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
