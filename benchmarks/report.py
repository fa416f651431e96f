"""What all benchmarks print: the machine, tables of figures, and whether an aim is met."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

console = Console(width=max(110, Console().width), highlight=False)


@dataclass
class Aim:
    """A figure, its statistical error, and what it should be: at most `limit`."""

    name: str
    value: float
    limit: float
    unit: str = ""
    error: float = 0.0

    @property
    def verdict(self) -> str:
        if self.value - self.error > self.limit:
            return "not met"
        # A noisy machine can make a figure look good too.
        return "met" if self.value <= self.limit and self.error <= self.limit else "unclear"

    def __str__(self) -> str:
        error = f" +- {self.error:.2g}" if self.error else ""
        return f"{self.name}: {self.value:.3g}{error}{self.unit}, aim at most {self.limit:g}{self.unit}"


COLOURS = {"met": "green", "unclear": "yellow", "not met": "bold red"}


@dataclass
class Report:
    """The figures of one benchmark, printed as they come and kept for the JSON file."""

    name: str
    machine: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    aims: list[Aim] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine()
        console.rule(f"[bold]{self.name}")
        console.print(", ".join(f"{key} {value}" for key, value in self.machine.items()))

    def note(self, text: str) -> None:
        console.print(text)

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Print rows of equal keys, numbers to three digits."""
        self.tables[title] = rows
        table = Table(title=title, title_justify="left")
        for key in rows[0]:
            table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
        for row in rows:
            table.add_row(*(_text(value) for value in row.values()))
        console.print(table)

    def aim(
        self, name: str, value: float, limit: float, unit: str = "", error: float = 0.0
    ) -> None:
        self.aims.append(Aim(name, value, limit, unit, error))

    def finish(self) -> None:
        """Print what is met, and the load that the figures were measured under."""
        for aim in self.aims:
            console.print(f"[{COLOURS[aim.verdict]}]{aim.verdict:7}[/] {aim}")
        self.machine["load average after"] = load()
        if float(self.machine["load average before"].split()[0]) > 0.5:
            console.print(
                "[yellow]other programs were running: run it again on a quiet machine before believing it"
            )
        console.print(
            f"load average (1, 5, 15 min): {self.machine['load average before']} before, {load()} after\n"
        )

    def record(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "tables": self.tables,
            "aims": [{**asdict(aim), "verdict": aim.verdict} for aim in self.aims],
        }


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def machine() -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load average before": load(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def load() -> str:
    return " ".join(f"{x:.2f}" for x in os.getloadavg())


def save(reports: list[Report], path: Path | None) -> None:
    """The figures of all reports as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({report.name: report.record() for report in reports}, indent=1) + "\n"
        )
        console.print(f"figures in {path}")


def json_path(description: str | None) -> Path | None:
    """The one option that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the figures to this file"
    )
    path: Path | None = parser.parse_args().json
    return path
