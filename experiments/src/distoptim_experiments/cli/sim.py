"""The subcommands that answer before anything is rented: simulate, plan and probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from distoptim.comm import Link
from distoptim.planning import planner
from distoptim.planning import probe as probing
from distoptim.planning.planner import Job, Plan
from distoptim.simulator.network import Ring
from distoptim_experiments import optimizers, records
from distoptim_experiments.cli.effects import TIMING, check_effects
from distoptim_experiments.cli.options import (
    DEFAULTS,
    Sections,
    algorithm_options,
    check_files,
    config_of,
    new_folder,
    option,
    run_options,
    split,
)
from distoptim_experiments.grid import simulated as grid
from distoptim_experiments.machines import Machines
from distoptim_experiments.report.table import table
from distoptim_experiments.studies import timing as time_methods
from distoptim_experiments.studies.utilisation import ModelShape
from distoptim_experiments.training.virtual import check_virtual

VIRTUAL = "Virtual machines"
_REAL = (
    "timeout_s",
    "latency_ms",
    "bandwidth_gbit_s",
    "slowdown",
    "slowdown_ms",
    "levels",
    "island_size",
    "island_kind",
)


@click.command(cls=Sections)
@option(
    "Training",
    "--methods",
    default="ddp,local-sgd,overlap-local-sgd",
    metavar="NAME,NAME,...",
    help="What is simulated.",
)
@option(
    "Training",
    "--taus",
    default="2,8",
    metavar="N,N,...",
    help="Each of them with each of these periods.",
)
@option(
    "Training",
    "--seeds",
    default="0",
    metavar="N,N,...",
    help="Each of them with each of these seeds.",
)
@run_options(DEFAULTS, without=("tau", "seed", "workers", *_REAL))
@option(
    VIRTUAL,
    "--workers",
    type=int,
    default=16,
    help="How many there are, without a process of their own.",
)
@option(
    VIRTUAL, "--step-ms", type=float, default=30.0, help="Milliseconds of a local step, on average."
)
@option(
    VIRTUAL,
    "--slowdown",
    type=click.Choice(("none", "exponential", "pareto")),
    default="none",
    help="Random part of it.",
)
@option(
    VIRTUAL,
    "--trace",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Step times as recorded instead: a CSV line per step, seconds, a column per worker (more are left out).",
)
@option(VIRTUAL, "--latency-ms", type=float, default=1.0, help="Milliseconds one message takes.")
@option(
    VIRTUAL, "--bandwidth-gbit-s", type=float, default=1.0, help="Each worker's rate, in Gbit/s."
)
@option(
    VIRTUAL,
    "--collective",
    type=click.Choice(("ring", "tree")),
    default="ring",
    help="Kind of all-reduce.",
)
@option(VIRTUAL, "--island", type=int, help="Workers in an island of fast links.")
@option(VIRTUAL, "--island-latency-ms", type=float, default=0.0, help="Inside an island.")
@option(
    VIRTUAL, "--island-bandwidth-gbit-s", type=float, help="Inside an island.  [default: no limit]"
)
@option(
    TIMING,
    "--timing",
    is_flag=True,
    default=False,
    help="No training: the bandwidth that keeps a model's machines computing, for each algorithm.",
)
@option(TIMING, "--params", type=float, default=1e9, help="Parameters of that model.")
@option(TIMING, "--layers", type=int, default=24, help="Layers of that model.")
@option(TIMING, "--period", type=int, default=100, help="Local steps in a round.")
@algorithm_options
def simulate(
    *,
    methods: str,
    taus: str,
    seeds: str,
    folder: Path | None,
    timing: bool,
    params: float,
    layers: int,
    period: int,
    **given: Any,
) -> None:
    """Train on virtual workers in virtual time, every combination of methods, taus and seeds.

    The algorithms and their engine are the real ones. An option of the algorithms goes to those
    that take it; for --timing only --fragments counts (default 8). Interrupted, it goes on when
    called with the same --folder.
    """
    check_effects(click.get_current_context().params)
    machines = Machines(**{name: given.pop(name) for name in Machines().to_dict()})
    fields, own = split(given)
    if timing:
        shape = ModelShape(
            params=params,
            layers=layers,
            step_s=machines.step_ms / 1e3,
            fragments=own.get("fragments", 8),
        )
        _time(shape, period, fields["workers"], machines, folder or new_folder("timing"))
        return
    axes = {
        "algorithm": _listed(methods, str),
        "tau": _listed(taus, int),
        "seed": _listed(seeds, int),
    }
    if fields["hide_communication"]:
        axes["tau"] = axes["tau"][:1]
    configs = grid.combinations(
        config_of(fields), axes, optimizers.shared_options(own, axes["algorithm"])
    )
    for config in configs:
        check_virtual(config)
    check_files(configs[0])
    folder = folder or new_folder("simulate")
    console = Console()
    with Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.completed}/{task.total} runs"),
        console=console,
    ) as bar:
        task = bar.add_task("simulating", total=None)
        folders = grid.run_all(
            configs,
            machines,
            folder,
            done=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(table([records.read(path) for path in folders]))
    console.print("seconds are virtual, those of the machines described", highlight=False)
    console.print(f"records: {folder / '*' / records.FILE}", soft_wrap=True, highlight=False)


def _listed(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r}: expected values with commas between them ({error})") from error


def _time(shape: ModelShape, tau: int, workers: int, machines: Machines, folder: Path) -> None:
    """Print the table of bandwidths and draw utilisation against bandwidth."""
    timed = list(time_methods.methods(tau=tau).values())
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "utilisation.png"
    time_methods.draw(shape, timed, path, latency_s=latency_s, workers=workers)
    console.print(f"picture: {path}", highlight=False)


@click.command
@click.option("--step-s", type=float, help="Seconds of one local step without communication.")
@click.option("--params", type=float, help="Number of parameters (11e6 is fine).")
@click.option("--workers", type=int, help="Number of workers.")
@click.option("--latency-ms", type=float, help="Milliseconds one message takes.")
@click.option("--bandwidth-gbit-s", type=float, help="Each worker's rate, in Gbit/s.")
@click.option(
    "--probe",
    "measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `distoptim probe` wrote; options given here win.",
)
@click.option(
    "--all", "everything", is_flag=True, help="Every algorithm and tau, not the best tau of each."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def plan(*, measured: Path | None, everything: bool, as_json: bool, **given: float | None) -> None:
    """Say what will pay on a link, and what to write for it."""
    known = _known(measured, given)
    try:
        link = Link(known["latency_ms"] / 1e3, known["bandwidth_gbit_s"])
        job = Job(
            known["step_s"], _count("params", known["params"]), int(known["workers"]), Ring([link])
        )
        made = planner.plan(job)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(made.as_dict(), indent=1))
    else:
        _print(made, everything)


@click.command
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option("--steps", type=int, default=20, show_default=True, help="Local steps to time.")
@click.option(
    "--backend", default=None, help="Of torch.distributed.  [default: nccl with a GPU, else gloo]"
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("probe.json"),
    show_default=True,
    help="Where rank 0 writes the figures for `distoptim plan --probe`.",
)
def probe(*, target: str, steps: int, backend: str | None, out: Path) -> None:
    """Time a step and the link between the workers; run it under torchrun.

    MODULE:FUNCTION is called once and returns a step (a function without arguments: one local step,
    no communication) or a pair (model, step).
    """
    if not dist.is_torchelastic_launched():
        raise click.UsageError(
            "start it with torchrun: torchrun --nproc-per-node=... -m distoptim probe ..."
        )
    try:
        prepare = probing.load(target)
        dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
        if dist.get_world_size() < 2:
            raise ValueError("one worker has no link: allowed are 2 or more")
        measured = probing.probe(prepare, steps=steps)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if dist.get_rank() == 0:
        out.write_text(json.dumps(measured.as_dict(), indent=1) + "\n")
        click.echo(
            f"step {measured.step_s * 1e3:.1f} ms, {measured.params:,} parameters, {measured.workers} workers, "
            f"latency {measured.latency_s * 1e3:.2f} ms, {measured.bandwidth_gbit_s:.2f} Gbit/s -> {out}"
        )
    dist.destroy_process_group()


def _known(measured: Path | None, given: dict[str, float | None]) -> dict[str, float]:
    """The probe's figures, overridden by the options; all must be there."""
    known: dict[str, Any] = {}
    if measured is not None:
        try:
            known = json.loads(measured.read_text())
            known["latency_ms"] = known.pop("latency_s") * 1e3
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.UsageError(
                f"{measured}: not a file that `distoptim probe` wrote ({error})"
            ) from error
    known.update({name: value for name, value in given.items() if value is not None})
    missing = [
        f"--{name.replace('_', '-')}"
        for name in given
        if not known.get(name) and known.get(name) != 0
    ]
    if missing:
        raise click.UsageError(f"missing: {', '.join(missing)} (or --probe FILE)")
    return known


def _count(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, 1 or more")
    return int(value)


def _print(made: Plan, everything: bool) -> None:
    out = Table("method", "tau", "s/step", "times DDP", "exposed", "copies", "GB/hour", box=None)
    for column in out.columns[1:]:
        column.justify = "right"
    best: dict[str, Any] = {}
    for p in made.predictions:
        if p.algorithm not in best or p.step_s < 0.95 * best[p.algorithm].step_s:
            best[p.algorithm] = p
    for p in made.predictions if everything else best.values():
        out.add_row(
            p.algorithm,
            str(p.tau),
            f"{p.step_s:.4g}",
            f"{p.speed_up:.2f}",
            f"{p.exposed_share:.1%}",
            f"{p.copies:g}",
            f"{p.gbytes_per_hour:.3g}",
            style="bold" if p == made.best else None,
        )
    console = Console(soft_wrap=True)
    console.print(out)
    console.print(f"\n{made.line}", highlight=False, markup=False)
    console.print(f"because: {made.reason}", highlight=False, markup=False)
