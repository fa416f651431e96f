"""The options of the subcommands, and how they become a RunConfig."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from distoptim.algorithms import ALGORITHMS
from distoptim.comm.codecs import CODECS
from distoptim.fragments import SEQUENTIAL, STRIDED
from distoptim_experiments import optimizers
from distoptim_experiments.config import DDP, DTYPES, FSDP2, RunConfig, algorithms
from distoptim_experiments.data import datasets as data
from distoptim_experiments.models import registry as models

Command = TypeVar("Command", bound=Callable[..., Any])

# What the algorithms' own options mean; ranges and reasons are in the constructors' docstrings.
MEANING = {
    "fragments": "Messages in which the parameters are averaged, spread over the round.",
    "pattern": f"Cut of the parameters into them: {SEQUENTIAL} (runs) or {STRIDED} (dealt out one by one).",
    "delay": "Local steps from launch to merge, at most tau; 0 waits.",
    "carry": "With a delay, keep the local steps made since the launch.",
    "reset_inner": "Forget the local optimizer's momentum at every merge.",
    "codec": f"In which means travel: {', '.join(CODECS)}, each also with +ef, error feedback.",
    "alpha": "Weight of the anchor in the pull; of EASGD the elastic strength.",
    "outer_momentum": "Momentum of the anchor.",
    "outer_lr": "Learning rate of the anchor.",
    "outer_nesterov": "Nesterov's form of --outer-momentum.",
    "block_momentum": "Momentum of the workers' mean from round to round.",
    "block_lr": "Learning rate of the anchor.",
    "nesterov_block": "Nesterov's form of --block-momentum.",
    "slow_momentum": "Momentum of the anchor.",
    "slow_lr": "Learning rate of the anchor.",
    "gain": "Share of the difference to the mean that is corrected.",
    "local_weight": "Weight of the local value beside the anchor at the merge.",
    "eager": "Use the worker's own share of a round at once, not a round late.",
    "clip": "Largest element of the anchor's momentum.",
    "approximation_rank": "Rank of the matrices that stand for gradients.",
}


class Epochs(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on only
    """Numbers with commas between them."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[float]:
        """From text."""
        try:
            return (
                [float(part) for part in value.split(",")]
                if isinstance(value, str)
                else list(value)
            )
        except ValueError:
            self.fail(f"{value!r}: expected numbers with commas between them", param, ctx)


class Pairs(click.types.StringParamType):
    """Pairs of integers as text, which RunConfig checks."""

    def __init__(self, pair: str) -> None:
        self.name = f"{pair},..."


DEFAULTS: dict[str, Any] = RunConfig().to_dict()


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


def option(
    section: str, *names: str, default: Any = None, **kwargs: Any
) -> Callable[[Command], Command]:
    """`click.option` in a section of the help."""
    return click.option(
        *names,
        cls=Option,
        section=section,
        default=default,
        show_default=default not in (None, "") and not kwargs.get("is_flag", False),
        **kwargs,
    )


def run_options(
    defaults: dict[str, Any], *, without: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """The options that every training has, but for those named.

    Their names are the fields of RunConfig.
    """
    training, problem, network, files = (
        "Training",
        "Data and model",
        "Workers and network",
        "Results",
    )
    rows: list[tuple[str, str, Any, str]] = [
        (training, "--tau", int, "Local steps between two syncs."),
        (training, "--tau-at", Pairs("STEP:TAU"), "Other periods from later local steps on."),
        (training, "--post-local", int, "Synchronous steps first, before the algorithm begins."),
        (
            training,
            "--hide-communication/--no-hide-communication",
            None,
            "Let tau be the smallest that hides communication, as measured.",
        ),
        (
            training,
            "--adacomm",
            int,
            "Let tau follow the loss, from --tau on; decide every so many local steps.",
        ),
        (
            training,
            "--levels",
            Pairs("PERIOD:SIZE"),
            "Groups of neighbouring workers that average more often.",
        ),
        (training, "--optimizer", click.Choice(("sgd", "adamw")), "Local optimizer."),
        (training, "--lr", float, "Learning rate of the local optimizer."),
        (training, "--momentum", float, "Momentum of the local SGD."),
        (training, "--nesterov/--no-nesterov", None, "Nesterov's form of it."),
        (training, "--weight-decay", float, "Weight decay of the local optimizer."),
        (training, "--clip-norm", float, "Largest norm of a worker's gradient."),
        (
            training,
            "--scale-lr/--no-scale-lr",
            None,
            "Peak learning rate: --lr times the number of workers.",
        ),
        (
            training,
            "--schedule",
            click.Choice(("constant", "steps", "cosine")),
            "Of the learning rate, after the warm-up.",
        ),
        (
            training,
            "--warmup-epochs",
            float,
            "Epochs in which it rises from 1/workers of the peak.",
        ),
        (
            training,
            "--milestones",
            Epochs(),
            "Epochs at which the schedule `steps` multiplies by --decay.",
        ),
        (training, "--decay", float, "Factor of the schedule `steps`."),
        (training, "--batch-size", int, "Samples per worker and step."),
        (training, "--epochs", int, "Passes over the training set."),
        (training, "--steps", int, "Steps of each worker, instead of --epochs."),
        (training, "--seed", int, "Of the model, the partition and the batches."),
        (training, "--dtype", click.Choice(list(DTYPES)), "Of the computation."),
        (
            problem,
            "--data",
            str,
            f"One of {', '.join(data.DATASETS)}; image-folder:SIZE; or a file, or folder of *.txt "
            "files, of text.",
        ),
        (problem, "--data-dir", click.Path(), "Folder with the files of the data set."),
        (
            problem,
            "--partition",
            str,
            "Who gets which samples: iid, label-skew[:SHARE], dirichlet[:CONCENTRATION].",
        ),
        (
            problem,
            "--validation",
            float,
            "Share of the training set to hold out and evaluate beside the test set.",
        ),
        (problem, "--augment/--no-augment", None, "Move and mirror the training images at random."),
        (problem, "--model", click.Choice(list(models.MODELS)), "What is trained."),
        (network, "--workers", int, "Workers to start on this machine."),
        (
            network,
            "--island-size",
            int,
            "Ranks (processes) of each worker, which share its batches.",
        ),
        (
            network,
            "--island-kind",
            click.Choice((DDP, FSDP2)),
            "With several: each has the whole model (ddp), or a shard of it (fsdp2).",
        ),
        (network, "--latency-ms", float, "Emulate a link: milliseconds one message takes."),
        (network, "--bandwidth-gbit-s", float, "Emulate a link: each worker's rate, in Gbit/s."),
        (
            network,
            "--slowdown",
            click.Choice(("none", "exponential", "pareto")),
            "Random delay of every worker's steps.",
        ),
        (network, "--slowdown-ms", float, "Its mean, in milliseconds."),
        (network, "--timeout-s", float, "Bound of every wait for other workers, in seconds."),
        (
            files,
            "--folder",
            click.Path(path_type=Path),
            "Where they go.  [default: a new folder in runs/]",
        ),
        (files, "--log-every", int, "Steps between two logged losses."),
        (
            files,
            "--evaluate-every",
            int,
            "Steps between two evaluations."
            + ("" if defaults["evaluate_every"] else "  [default: an epoch]"),
        ),
    ]

    def add(command: Command) -> Command:
        for section, names, kind, text in reversed(rows):
            field = names.split("/")[0].removeprefix("--").replace("-", "_")
            if field in without:
                continue
            metavar = "FOLDER" if isinstance(kind, click.Path) else None
            command = option(
                section, names, type=kind, default=defaults.get(field), metavar=metavar, help=text
            )(command)
        return command

    return add


def algorithm_options(command: Command) -> Command:
    """One option for each that an algorithm has of its own, read from the constructors."""
    takers: dict[str, list[str]] = {}
    types: dict[str, type] = {}
    for algorithm in algorithms():
        for name, kind in optimizers.own_options(algorithm).items():
            takers.setdefault(name, []).append(algorithm)
            types[name] = kind
    for name in reversed(takers):
        text = f"--{name.replace('_', '-')}"
        if types[name] is bool:
            # None, which is neither of the two, leaves the choice to the algorithm.
            text += f"/--no-{name.replace('_', '-')}"
        everybody = len(takers[name]) == len(ALGORITHMS)
        of = "all but ddp and powersgd" if everybody else ", ".join(takers[name])
        meaning = f"{MEANING.get(name, '')} Of {of}.".lstrip()
        command = option(
            "Options of the algorithms (default: each one's own)",
            text,
            name,
            type=None if types[name] is bool else types[name],
            help=meaning,
        )(command)
    return command


def config_of(given: dict[str, Any]) -> RunConfig:
    """From options by name: those that are no field of RunConfig are the algorithm's own."""
    fields, own = split(given)
    return optimizers.check(
        RunConfig(**{**fields, "options": {**fields.get("options", {}), **own}})
    )


def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name.

    The fields of RunConfig, and of the algorithms' own those that were given.
    """
    return (
        {name: value for name, value in given.items() if name in DEFAULTS},
        {
            name: value
            for name, value in given.items()
            if name not in DEFAULTS and value is not None
        },
    )


def is_given(name: str) -> bool:
    """Whether an option stands on the command line, and is not there by its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def check_files(config: RunConfig, tensorboard: bool = False) -> None:
    """Fail here, before there are workers."""
    data.load(config.data, None if config.data_dir is None else Path(config.data_dir))
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs TensorBoard: pip install 'distoptim[tensorboard]'")


def new_folder(name: str) -> Path:
    """A name for a folder in runs/ that begins with the time; it is not made."""
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
