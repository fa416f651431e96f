"""The subcommands that answer before anything is rented: plan and probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from distoptim.comm import Link
from distoptim.sim.network import Ring
from distoptim.sim.plan import Job, Plan, plan
from distoptim.sim.probe import load, probe


@click.command("plan")
@click.option("--step-s", type=float, help="Seconds of one local step without communication.")
@click.option("--params", type=float, help="Number of parameters (11e6 is fine).")
@click.option("--workers", type=int, help="Number of workers.")
@click.option("--latency-ms", type=float, help="Milliseconds one message takes.")
@click.option("--bandwidth-gbit-s", type=float, help="Each worker's rate, in Gbit/s.")
@click.option("--probe", "measured", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What `distoptim probe` wrote; options given here win.")
@click.option("--all", "everything", is_flag=True, help="Every algorithm and tau, not the best tau of each.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def plan_command(*, measured: Path | None, everything: bool, as_json: bool, **given: float | None) -> None:
    """Say what will pay on a link, and what to write for it."""
    known = _known(measured, given)
    try:
        link = Link(known["latency_ms"] / 1e3, known["bandwidth_gbit_s"])
        job = Job(known["step_s"], _count("params", known["params"]), int(known["workers"]), Ring([link]))
        made = plan(job)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(made.as_dict(), indent=1))
    else:
        _print(made, everything)


@click.command("probe")
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option("--steps", type=int, default=20, show_default=True, help="Local steps to time.")
@click.option("--backend", default=None, help="Of torch.distributed.  [default: nccl with a GPU, else gloo]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("probe.json"), show_default=True,
              help="Where rank 0 writes the figures for `distoptim plan --probe`.")
def probe_command(*, target: str, steps: int, backend: str | None, out: Path) -> None:
    """Time a step and the link between the workers; run it under torchrun.

    MODULE:FUNCTION is called once and returns a step (a function without arguments: one local step, no
    communication) or a pair (model, step).
    """
    if not dist.is_torchelastic_launched():
        raise click.UsageError("start it with torchrun: torchrun --nproc-per-node=... -m distoptim.cli probe ...")
    try:
        prepare = load(target)
        dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
        if dist.get_world_size() < 2:
            raise ValueError("one worker has no link: allowed are 2 or more")
        measured = probe(prepare, steps=steps)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if dist.get_rank() == 0:
        out.write_text(json.dumps(measured.as_dict(), indent=1) + "\n")
        click.echo(f"step {measured.step_s * 1e3:.1f} ms, {measured.params:,} parameters, {measured.workers} workers, "
                   f"latency {measured.latency_s * 1e3:.2f} ms, {measured.bandwidth_gbit_s:.2f} Gbit/s -> {out}")
    dist.destroy_process_group()


def _known(measured: Path | None, given: dict[str, float | None]) -> dict[str, float]:
    """The probe's figures, overridden by the options; all must be there."""
    known: dict[str, Any] = {}
    if measured is not None:
        try:
            known = json.loads(measured.read_text())
            known["latency_ms"] = known.pop("latency_s") * 1e3
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.UsageError(f"{measured}: not a file that `distoptim probe` wrote ({error})") from error
    known.update({name: value for name, value in given.items() if value is not None})
    missing = [f"--{name.replace('_', '-')}" for name in given if not known.get(name) and known.get(name) != 0]
    if missing:
        raise click.UsageError(f"missing: {', '.join(missing)} (or --probe FILE)")
    return known


def _count(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, 1 or more")
    return int(value)


def _print(made: Plan, everything: bool) -> None:
    table = Table("method", "tau", "s/step", "times DDP", "exposed", "copies", "GB/hour", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    best: dict[str, Any] = {}
    for p in made.predictions:
        if p.algorithm not in best or p.step_s < 0.95 * best[p.algorithm].step_s:
            best[p.algorithm] = p
    for p in made.predictions if everything else best.values():
        table.add_row(p.algorithm, str(p.tau), f"{p.step_s:.4g}", f"{p.speed_up:.2f}", f"{p.exposed_share:.1%}",
                      f"{p.copies:g}", f"{p.gbytes_per_hour:.3g}", style="bold" if p == made.best else None)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"\n{made.line}", highlight=False, markup=False)
    console.print(f"because: {made.reason}", highlight=False, markup=False)
