"""The subcommand that shows who gets which samples."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from distoptim import checks
from distoptim_experiments.cli.effects import check_effects
from distoptim_experiments.data import datasets
from distoptim_experiments.data import partition as partitions
from distoptim_experiments.report import histogram


@click.command
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help=f"One of {', '.join(datasets.DATASETS)}; image-folder:SIZE.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="FOLDER", help="Where its files are."
)
@click.option(
    "--partition",
    "name",
    default="label-skew",
    show_default=True,
    help="iid, label-skew[:SHARE] or dirichlet[:CONCENTRATION].",
)
@click.option("--workers", type=int, default=16, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffle.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("partition.png"),
    show_default=True,
    help="The picture.",
)
def partition(
    *, data: str, data_dir: Path | None, name: str, workers: int, seed: int, out: Path
) -> None:
    """Show how many samples of each class every worker gets, as a table and as a picture."""
    check_effects(click.get_current_context().params)
    checks.integer("workers", workers, 1)
    loaded = datasets.parse(data)(data_dir)
    shards = partitions.partition(name, loaded.train_labels, workers=workers, seed=seed)
    counted = histogram.counts(loaded.train_labels, shards, loaded.classes)
    table = Table("worker", *map(str, range(loaded.classes)), "all", box=None)
    for column in table.columns:
        column.justify = "right"
    for rank, row in enumerate(counted):
        table.add_row(str(rank), *map(str, row), str(sum(row)))
    console = Console(soft_wrap=True)
    console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    histogram.draw(counted, out, title=f"{data}, {name}, {workers} workers: samples of each class")
    console.print(f"picture: {out}", highlight=False)
