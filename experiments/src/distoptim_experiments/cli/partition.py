"""The subcommand that shows who gets which samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.table import Table

from distoptim_experiments.cli.options import Given, command, options_of
from distoptim_experiments.config import PROBLEM, RESULTS, RunConfig
from distoptim_experiments.data import datasets
from distoptim_experiments.data import partition as partitions
from distoptim_experiments.settings import Option, Settings


class PartitionOptions(Settings):
    """What is not said of a run."""

    workers: Annotated[int, Field(ge=1, description="How many."), Option(PROBLEM)] = 16
    out: Annotated[Path, Field(description="The picture."), Option(RESULTS, metavar="FILE")] = Path(
        "partition.png"
    )
    force: Annotated[
        bool, Field(description="Overwrite a file that is there."), Option(RESULTS)
    ] = False


@command(
    options_of(
        RunConfig,
        only=("data", "data_dir", "partition", "seed"),
        defaults={"partition": "label-skew"},
    ),
    options_of(PartitionOptions),
)
def partition(given: Given) -> None:
    """Show how many samples of each class every worker gets, as a table and as a picture."""
    # Draws; importing it takes longer than the help.
    from distoptim_experiments.report import histogram

    given.check_effects()
    own = given.made(PartitionOptions)
    if own.out.exists() and not own.force:
        raise ValueError(
            f"--out {own.out}: is there; give another file, or --force to overwrite it"
        )
    values = given.all
    folder = values["data_dir"] and Path(values["data_dir"])
    loaded = datasets.parse(values["data"])(folder)
    shards = partitions.partition(
        values["partition"], loaded.train_labels, workers=own.workers, seed=values["seed"]
    )
    counted = histogram.counts(loaded.train_labels, shards, loaded.classes)
    table = Table("worker", *map(str, range(loaded.classes)), "all", box=None)
    for column in table.columns:
        column.justify = "right"
    for rank, row in enumerate(counted):
        table.add_row(str(rank), *map(str, row), str(sum(row)))
    console = Console(soft_wrap=True)
    console.print(table)
    title = f"{values['data']}, {values['partition']}, {own.workers} workers: samples of each class"
    histogram.draw(counted, own.out, title=title)
    console.print(f"picture: {own.out}", highlight=False)
