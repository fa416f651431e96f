"""The subcommands of `distoptim`."""

from __future__ import annotations

import click

import distoptim
from distoptim.commands.partition import partition
from distoptim.commands.report import report
from distoptim.commands.reproduce import reproduce
from distoptim.commands.sim import plan, probe, simulate
from distoptim.commands.train import compare, train


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(distoptim.__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train with communication hidden behind computation."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (compare, train, simulate, reproduce, report, partition, plan, probe):
    cli.add_command(command)
