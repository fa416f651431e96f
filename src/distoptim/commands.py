"""The subcommands of `distoptim`, and how their options become a RunConfig."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

import distoptim
from distoptim.report.progress import LiveProgress
from distoptim.train import compare as comparison
from distoptim.train import data, models, optimizers, records
from distoptim.train.config import DTYPES, RunConfig
from distoptim.train.launch import Job, WorkerError, run_local, run_worker
from distoptim.train.world import Meeting, from_torchrun

Command = TypeVar("Command", bound=Callable[..., Any])

# Fast enough for two cores, and a link over which an all-reduce takes about as long as a training step.
DEMO = RunConfig(epochs=30, batch_size=32, tau=4, evaluate_every=66, log_every=6, latency_ms=2.0, bandwidth_gbit_s=0.5)


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


def run_options(defaults: RunConfig) -> Callable[[Command], Command]:
    """The options that every training has; their names are the fields of RunConfig."""
    d = defaults
    options = [
        _option("Training", "--tau", type=int, default=d.tau, help="Local steps between two syncs."),
        _option("Training", "--lr", type=float, default=d.lr, help="Learning rate of the local SGD."),
        _option("Training", "--momentum", type=float, default=d.momentum, help="Momentum of the local SGD."),
        _option("Training", "--nesterov/--no-nesterov", default=d.nesterov, help="Nesterov's form of it."),
        _option("Training", "--weight-decay", type=float, default=d.weight_decay, help="Weight decay."),
        _option("Training", "--batch-size", type=int, default=d.batch_size, help="Samples per worker and step."),
        _option("Training", "--epochs", type=int, default=d.epochs, help="Passes over the training set."),
        _option("Training", "--steps", type=int, help="Steps of each worker, instead of --epochs."),
        _option("Training", "--seed", type=int, default=d.seed, help="Of the model, the partition, the batches."),
        _option("Training", "--dtype", type=click.Choice(list(DTYPES)), default=d.dtype, help="Of the computation."),
        _option("Data and model", "--data", type=click.Choice(list(data.DATASETS)), default=d.data,
                help="Data set."),
        _option("Data and model", "--data-dir", type=click.Path(), metavar="FOLDER",
                help="Folder with the IDX files of mnist or fashion-mnist."),
        _option("Data and model", "--partition", type=click.Choice(list(data.PARTITIONS)), default=d.partition,
                help="Who gets which samples."),
        _option("Data and model", "--model", type=click.Choice(list(models.MODELS)), default=d.model, help="Model."),
        _option("Workers and network", "--workers", type=int, default=d.workers,
                help="Processes on this machine."),
        _option("Workers and network", "--latency-ms", type=float, default=d.latency_ms,
                help="Emulate a link: milliseconds one message takes."),
        _option("Workers and network", "--bandwidth-gbit-s", type=float, default=d.bandwidth_gbit_s,
                help="Emulate a link: each worker's rate, in Gbit/s."),
        _option("Workers and network", "--timeout-s", type=float, default=d.timeout_s,
                help="Bound of every wait for other workers, in seconds."),
        _option("Records", "--folder", type=click.Path(path_type=Path), metavar="FOLDER",
                help="Where the results go.  [default: a new one in runs/]"),
        _option("Records", "--log-every", type=int, default=d.log_every, help="Steps between two logged losses."),
        _option("Records", "--evaluate-every", type=int, default=d.evaluate_every,
                help="Steps between two evaluations.  [default: an epoch]" if d.evaluate_every is None
                else "Steps between two evaluations."),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
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
@_option("Training", "--algorithm", type=click.Choice(optimizers.names()), default=RunConfig.algorithm,
         help="Method; ddp is synchronous SGD by DistributedDataParallel.")
@run_options(RunConfig())
@_option("Records", "--checkpoint-every", type=int, help="Steps between two checkpoints.  [default: an epoch]")
@_option("Records", "--resume", type=click.Path(path_type=Path), metavar="FOLDER",
         help="Go on with the run in this folder; options given now replace its own.")
@_option("Records", "--tensorboard", is_flag=True, default=False, help="Log for TensorBoard too.")
@_option("Workers and network", "--init", metavar="tcp://HOST:PORT",
         help="Be one worker of several machines; rank 0 listens there. Under torchrun not needed.")
@_option("Workers and network", "--rank", type=int, help="With --init: this worker's number, from 0.")
@_option("Workers and network", "--world-size", type=int, help="With --init: how many workers there are.")
@algorithm_options
@click.pass_context
def train(ctx: click.Context, **given: Any) -> None:
    """Train a model with one method.

    Starts --workers processes on this machine, or is one worker under torchrun or with --init.
    """
    folder, resume, tensorboard = given.pop("folder"), given.pop("resume"), given.pop("tensorboard")
    try:
        meeting = _meeting(given.pop("init"), given.pop("rank"), given.pop("world_size")) or from_torchrun()
        if meeting is not None:
            given["workers"] = meeting.size
        config = _resumed(ctx, resume, given) if resume else _config(given)
        data.load(config.data, None if config.data_dir is None else Path(config.data_dir))
        job = Job(config, folder or resume or _new_folder(config.algorithm), resume is not None, tensorboard)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    console = Console()
    with LiveProgress(console) as progress:
        watch = [progress.watch(config.algorithm)]
        signum = _run(lambda: run_local(job, watch) if meeting is None else run_worker(job, meeting, watch))
    if meeting is None or meeting.rank == 0:
        _finish(console, job, signum)
    ctx.exit(128 + signum if signum else 0)


@cli.command(cls=Sections)
@_option("Training", "--methods", default=",".join(comparison.METHODS), metavar="NAME,NAME,...",
         help="What is compared, one after the other.")
@run_options(DEMO)
@click.pass_context
def compare(ctx: click.Context, methods: str, folder: Path | None, **given: Any) -> None:
    """Train the same model once per method, over an emulated slow link.

    Prints a table, and leaves it as a picture with the records of all runs.
    """
    try:
        configs = comparison.variants(_config(given), [name.strip() for name in methods.split(",")])
        data.load(configs[0].data, None if configs[0].data_dir is None else Path(configs[0].data_dir))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder = folder or _new_folder("compare")
    console = Console()
    with LiveProgress(console) as progress:
        signum = _run(lambda: comparison.compare(configs, folder, lambda c: progress.watch(c.algorithm)))
    if signum:
        ctx.exit(128 + signum)
    from distoptim.report.table import table

    runs = comparison.read(folder)
    console.print(table(runs))
    console.print(f"records: {folder}/*/{records.FILE}")


def _config(given: dict[str, Any]) -> RunConfig:
    """From the values of all options."""
    fields = {f.name for f in dataclasses.fields(RunConfig)}
    options = {name: value for name, value in given.items() if name not in fields and value is not None}
    return RunConfig(**{name: value for name, value in given.items() if name in fields}, options=options)


def _resumed(ctx: click.Context, folder: Path, given: dict[str, Any]) -> RunConfig:
    """The configuration of a recorded run, with what is given on the command line now."""
    saved = records.read(folder).config
    now = {name: value for name, value in given.items()
           if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE or name == "workers" and
           value != RunConfig.workers}
    fields = {f.name for f in dataclasses.fields(RunConfig)}
    options = {**saved.pop("options"), **{name: value for name, value in now.items() if name not in fields}}
    return RunConfig(**{**saved, **{name: value for name, value in now.items() if name in fields}}, options=options)


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


def _run(action: Callable[[], int]) -> int:
    try:
        return action()
    except WorkerError as error:
        raise click.ClickException(str(error)) from error


def _finish(console: Console, job: Job, signum: int) -> None:
    if signum:
        print(f"stopped; go on with: distoptim train --resume {job.folder}", file=sys.stderr)
        return
    from distoptim.report.table import table

    console.print(table([records.read(job.folder)]))
    console.print(f"record: {job.folder / records.FILE}")
