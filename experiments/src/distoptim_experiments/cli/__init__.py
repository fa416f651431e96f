"""The subcommands of `distoptim`."""

from __future__ import annotations

import click

import distoptim
from distoptim_experiments.cli.partition import partition
from distoptim_experiments.cli.report import report
from distoptim_experiments.cli.reproduce import reproduce
from distoptim_experiments.cli.sim import plan, probe, simulate
from distoptim_experiments.cli.train import compare, train


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(distoptim.__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train with communication hidden behind computation."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (compare, train, simulate, reproduce, report, partition, plan, probe):
    cli.add_command(command)
