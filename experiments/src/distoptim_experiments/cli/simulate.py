"""The subcommand that trains on virtual workers in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from distoptim_experiments import optimizers, records
from distoptim_experiments.cli.options import (
    CliOption,
    Given,
    algorithm_options,
    check_files,
    command,
    new_folder,
    options_of,
    own_of,
)
from distoptim_experiments.cli.train import Folder
from distoptim_experiments.config import ROUNDS, TRAINING, RunConfig
from distoptim_experiments.grid import simulated
from distoptim_experiments.machines import SECTION, Machines
from distoptim_experiments.report.table import table
from distoptim_experiments.settings import Needs, Number, Option, Settings
from distoptim_experiments.studies import timing as time_methods
from distoptim_experiments.studies.utilisation import ModelShape
from distoptim_experiments.training.virtual import check_virtual

TIMING = "Timing alone"
_WITH_TIMING = Needs("with --timing", lambda v: v["timing"])
_WITHOUT_TIMING = Needs("without --timing", lambda v: not v["timing"])
_TIMED = ("step_ms", "latency_ms", "workers", "fragments", "folder")
"""Options that count with --timing as well as without."""

ONLY_REAL = (
    "timeout_s",
    "latency_ms",
    "bandwidth_gbit_s",
    "slowdown",
    "slowdown_ms",
    "levels",
    "streams",
    "island_size",
    "island_kind",
    "checkpoint_every",
)
_VARIED = ("algorithm", "tau", "seed", "workers")


class SimulateOptions(Settings):
    """What is varied, and on how many workers."""

    methods: Annotated[
        str,
        Field(description="What is simulated."),
        Option(TRAINING, metavar="NAME,NAME,..."),
    ] = "ddp,local-sgd,overlap-local-sgd"
    taus: Annotated[
        str,
        Field(description="Each of them with each of these periods."),
        Option(TRAINING, needs=ROUNDS, metavar="N,N,..."),
    ] = "2,8"
    seeds: Annotated[
        str,
        Field(description="Each of them with each of these seeds."),
        Option(TRAINING, metavar="N,N,..."),
    ] = "0"
    workers: Annotated[
        int,
        Field(description="How many there are, without a process of their own."),
        Option(SECTION),
    ] = 16


class TimingOptions(Settings):
    """A model that is not trained."""

    timing: Annotated[
        bool,
        Field(
            description="No training: the bandwidth that keeps a model's machines computing, for "
            "each algorithm."
        ),
        Option(TIMING),
    ] = False
    params: Annotated[
        Number,
        Field(description="Parameters of that model."),
        Option(TIMING, needs=_WITH_TIMING),
    ] = 1e9
    layers: Annotated[
        int, Field(description="Layers of that model."), Option(TIMING, needs=_WITH_TIMING)
    ] = 24
    period: Annotated[
        int, Field(description="Local steps in a round."), Option(TIMING, needs=_WITH_TIMING)
    ] = 100


def _options() -> list[CliOption]:
    training = [
        *options_of(SimulateOptions),
        *options_of(RunConfig, without=(*ONLY_REAL, *_VARIED)),
        *options_of(Machines, defaults={"latency_ms": 1.0, "bandwidth_gbit_s": 1.0}),
        *options_of(Folder),
        *algorithm_options(),
    ]
    return [
        *(o if o.name in _TIMED else o.with_need(_WITHOUT_TIMING) for o in training),
        *options_of(TimingOptions),
    ]


@command(_options())
def simulate(given: Given) -> None:
    """Train on virtual workers in virtual time, every combination of methods, taus and seeds.

    The algorithms and their engine are the real ones. An option of the algorithms goes to those
    that take it; for --timing only --fragments counts (default 8). Interrupted, it goes on when
    called with the same --folder.
    """
    given.check_effects()
    machines = given.made(Machines)
    timing = given.made(TimingOptions)
    folder = given.made(Folder).folder
    if timing.timing:
        _time(given, timing, machines, folder or new_folder("timing"))
        return
    configs = _configs(given, machines)
    check_files(configs[0])
    folder = folder or new_folder("simulate")
    console = Console()
    with Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.completed}/{task.total} runs"),
        console=console,
    ) as bar:
        task = bar.add_task("simulating", total=None)
        folders = simulated.run_all(
            configs,
            machines,
            folder,
            done=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(table([records.read(path) for path in folders]))
    console.print("seconds are virtual, those of the machines described", highlight=False)
    console.print(f"records: {folder / '*' / records.FILE}", soft_wrap=True, highlight=False)


def _configs(given: Given, machines: Machines) -> list[RunConfig]:
    """Every combination."""
    varied = given.made(SimulateOptions)
    axes: dict[str, list[Any]] = {
        "algorithm": _listed(varied.methods, str),
        "tau": _listed(varied.taus, int),
        "seed": _listed(varied.seeds, int),
    }
    config = given.made(RunConfig, without=ONLY_REAL)
    if config.hide_communication or config.equal_time:
        axes["tau"] = axes["tau"][:1]
    options = optimizers.shared_options(own_of(given.all), axes["algorithm"])
    configs = simulated.combinations(config, axes, options)
    for made in configs:
        check_virtual(made, machines)
    return configs


def _listed(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r}: expected values with commas between them ({error})") from error


def _time(given: Given, timing: TimingOptions, machines: Machines, folder: Path) -> None:
    """Print the table of bandwidths and draw utilisation against bandwidth."""
    path = folder / "utilisation.png"
    if path.exists():
        raise ValueError(f"--folder {folder}: {path.name} is in it; give another folder")
    shape = ModelShape(
        params=timing.params,
        layers=timing.layers,
        step_s=machines.step_ms / 1e3,
        fragments=given.values.get("fragments", 8),
    )
    workers = given.all["workers"]
    timed = list(time_methods.methods(tau=timing.period).values())
    latency_s = machines.latency_ms / 1e3
    out = Table(
        "Gbit/s for a utilisation of", *(f"{t:.0%}" for t in time_methods.TARGETS), box=None
    )
    for column in out.columns[1:]:
        column.justify = "right"
    for row in time_methods.table([shape], timed, latency_s=latency_s, workers=workers):
        out.add_row(row["method"], *("-" if x is None else f"{x:.1f}" for x in row["gbit_s"]))
    console = Console(soft_wrap=True)
    console.print(out)
    time_methods.draw(shape, timed, path, latency_s=latency_s, workers=workers)
    console.print(f"picture: {path}", highlight=False)
