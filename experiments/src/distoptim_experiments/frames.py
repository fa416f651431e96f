"""Runs as tables: one row a run, and one row a logged loss, from records or from CSV files.

A study is two files: `runs.csv`, in which each run that has ended is a row, and `curves.csv`, the
losses that pictures need. Its records may be thrown away once it is done.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.records import Record, Summary
from distoptim_experiments.settings import plain_type

RUNS = "runs.csv"
CURVES = "curves.csv"
TRIALS = "trials"
TRIAL = "trial"
FINAL = "final"
POINTS = 50
"""Losses of one run in `curves.csv`, at most about."""

SETTINGS = [
    name
    for name in {**RunConfig.model_fields, **Machines.model_fields}
    if name not in ("seed", "options", "data_dir")
]
"""Columns that say what was run; virtual machines have a link and slow-downs of their own. What the
algorithm was given is in `options`, as JSON."""

_FIRST = [
    "run",
    "stage",
    "label",
    "algorithm",
    "tau",
    "partition",
    "slowdown",
    "seed",
    "lr",
    "options",
    "diverged",
    "test_accuracy",
    "test_loss",
    "worker_accuracy",
    "validation_accuracy",
    "validation_loss",
    "step",
    "seconds",
    "computation_s",
    "exposed_s",
    "overhead_s",
    "hidden_s",
]
_FIELDS = {**RunConfig.model_fields, **Machines.model_fields}
_FIGURES: dict[str, type] = {
    **dict.fromkeys(("tau", "seed", "step", "bytes", "syncs", "workers", "cores"), int),
    **dict.fromkeys(("lr", "seconds", "computation_s", "exposed_s", "test_accuracy"), float),
    **dict.fromkeys(("diverged", "virtual"), bool),
}
_ALWAYS = {
    "run",
    "stage",
    "label",
    "algorithm",
    "options",
    "model",
    "data",
    "partition",
    "slowdown",
}
_ALWAYS |= {"date", *_FIGURES} - {"test_accuracy"}
"""In every row of `runs.csv`."""
_TEXTS = ["run", "stage", "label", "options", "date", "distoptim", "torch", "python", "commit"]
_TEXTS += ["processor", "system"]
_CURVES: dict[str, type] = {
    "run": str,
    "step": int,
    "epoch": float,
    "seconds": float,
    "loss": float,
}


@dataclass(frozen=True)
class Runs:
    """What is below a folder.

    Attributes:
        ended: a row for every run with a summary; columns as in `runs.csv`.
        curves: run, step, epoch, seconds, loss.
        notes: one line for every record that is damaged or unfinished, naming it.
    """

    ended: pd.DataFrame
    curves: pd.DataFrame
    notes: list[str]


def read(folder: Path) -> Runs:
    """All runs below a folder, of records and of CSV files; of a run that is in both, its record.

    Raises:
        ValueError: there is no such folder, a damaged CSV file, or no run that has ended; the line
            names the folder or the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    recorded, notes = _recorded(folder)
    rows, damaged = _whole([_row(name, record) for name, record in recorded.items()])
    notes = [*damaged, *notes]
    ended = [rows]
    curves = [_losses(name, record) for name, record in recorded.items()]
    for path in sorted(folder.rglob(RUNS)):
        place = path.parent.relative_to(folder)
        ended.append(_without(recorded, place, _table(path, _types())))
        curves.append(_without(recorded, place, _table(path.with_name(CURVES), _CURVES)))
    ended = [table for table in ended if len(table)]
    if not ended:
        raise ValueError("; ".join([f"{folder}: no finished run there", *notes]))
    return Runs(
        pd.concat(ended, ignore_index=True),
        pd.concat(curves, ignore_index=True),
        notes,
    )


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """By run, the rows of the `runs.csv` in a folder; none where there is no such file.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = folder / RUNS
    if not path.exists():
        return {}
    table = _table(path, _types())
    return dict(zip(table.run, table.to_dict("records"), strict=True))


def write(folder: Path) -> list[Path]:
    """Write the two files of the runs below a folder; returns their paths.

    Raises:
        ValueError: see `read`, or they cannot be written.
    """
    found = read(folder)
    final = found.ended.run[found.ended.stage == FINAL]
    tables = {RUNS: found.ended, CURVES: thinned(found.curves[found.curves.run.isin(final)])}
    try:
        for name, table in tables.items():
            draft = folder / f"{name}.draft"
            draft.write_text(_text(table), encoding="utf-8")
            draft.replace(folder / name)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from error
    return [folder / name for name in tables]


def thinned(curves: pd.DataFrame, points: int = POINTS) -> pd.DataFrame:
    """Curves with every n-th loss, counted from the last one, in six digits."""
    by_run = curves.groupby("run", sort=False)
    every = by_run.step.transform("size").sub(1).floordiv(points).add(1)
    kept = curves[by_run.cumcount(ascending=False) % every == 0]
    six = {name: kept[name].map(lambda x: float(f"{x:.6g}")) for name in ("seconds", "loss")}
    return kept.assign(**six)


def _recorded(folder: Path) -> tuple[dict[str, Record], list[str]]:
    """The records of runs that have ended, by their places, and what is said of the others."""
    found: dict[str, Record] = {}
    damaged = []
    unfinished = []
    for place in records.folders(folder):
        name = place.relative_to(folder).as_posix()
        try:
            record = records.read(place)
        except ValueError as error:
            damaged.append(f"damaged, left out: {str(error).replace(f'{folder}/', '')}")
            continue
        if record.summary is None:
            unfinished.append(name)
        else:
            found[name] = record
    if unfinished:
        damaged.append(f"{len(unfinished)} unfinished, left out: {', '.join(unfinished)}")
    return found, damaged


def _row(name: str, record: Record) -> dict[str, Any]:
    """A run as a row of `runs.csv`."""
    start = record.start
    summary = record.summary
    assert summary is not None
    surroundings = start.surroundings.model_dump(exclude={"machine"})
    row = {
        "run": name,
        "stage": TRIAL if Path(name).parent.name == TRIALS else FINAL,
        "label": start.label,
        "options": json.dumps(record.config.options),
        **record.config.model_dump(exclude={"options", "data_dir"}),
        **(start.machines.model_dump() if start.machines else {}),
        "virtual": start.machines is not None,
        **_figures(summary),
        **surroundings,
        **start.surroundings.machine.model_dump(),
    }
    return {name: row[name] for name in [*_FIRST, *row]}


def _figures(summary: Summary) -> dict[str, Any]:
    """Of the summary, in which tau is that of the last round."""
    figures = summary.model_dump(exclude={"kind", "tau"})
    return {**figures, "computation_s": summary.computation_s, "last_tau": summary.tau}


def _losses(name: str, record: Record) -> pd.DataFrame:
    lines = [line.model_dump(include=set(_CURVES)) for line in record.logs]
    # Of the same types where there are no lines, or all of a study would be objects beside them.
    return pd.DataFrame(lines, columns=list(_CURVES)).assign(run=name).astype(_CURVES)


def _without(recorded: dict[str, Record], place: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of runs that have no record, named from the folder that is read."""
    named = table.assign(run=[(place / run).as_posix() for run in table.run])
    return named[~named.run.isin(list(recorded))]


def _types() -> dict[str, type]:
    """Of the columns of `runs.csv`; what is not named here is a number, perhaps missing."""
    kinds = {name: plain_type(field.annotation) for name, field in _FIELDS.items()}
    kinds = {name: kind if kind in (int, float, bool) else str for name, kind in kinds.items()}
    return {**kinds, **dict.fromkeys(_TEXTS, str), **_FIGURES}


def _whole(rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """Rows as the file would be read, so that a report does not depend on where its runs come from;
    and what is said of those that lack something."""
    if not rows:
        return pd.DataFrame(), []
    table = _csv(io.StringIO(_text(pd.DataFrame(rows))), _types())
    lacking = {
        run: ", ".join(sorted(name for name in _ALWAYS if missing[name]))
        for run, missing in zip(table.run, table.isna().to_dict("records"), strict=True)
        if any(missing[name] for name in _ALWAYS)
    }
    notes = [f"damaged, left out: {run}: without {names}" for run, names in lacking.items()]
    return table[~table.run.isin(list(lacking))], notes


def _table(path: Path, types: dict[str, type]) -> pd.DataFrame:
    try:
        table = _csv(path, types)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}: {why}") from error
    needed = {*_FIRST, *_ALWAYS, *_FIGURES, *_TEXTS} if path.name == RUNS else _CURVES
    for name in sorted(needed):
        if name not in table:
            raise ValueError(f"{path}: no column {name}")
        if name in _ALWAYS and table[name].isna().any():
            raise ValueError(f"{path}: a row without {name}")
    return table


def _csv(source: Path | io.StringIO, types: dict[str, type]) -> pd.DataFrame:
    texts = pd.read_csv(source, dtype=str, keep_default_na=False, na_values=[""])
    for name in texts:
        # Runs that are older than a setting were made as by its default; numbers may stay missing.
        if types.get(name) is bool and name in _FIELDS:
            texts[name] = texts[name].fillna(str(_FIELDS[name].default))
    return pd.DataFrame({name: _typed(texts[name], types.get(name, float)) for name in texts})


def _typed(texts: pd.Series[str], kind: type) -> pd.Series[Any]:
    """Python's own reading of numbers, in which what was written is what is read."""
    if kind is bool:
        known = texts.map({"True": True, "False": False})
        if known.isna().any():
            raise ValueError(f"{texts.name}: expected True or False")
        return known.astype(bool)
    if kind is str:
        return texts
    # A whole number that may be missing is a float to numpy, and so is one beyond all counting.
    whole = kind is int and texts.notna().all() and all(abs(int(text)) < 2**63 for text in texts)
    return texts.astype(int if whole else float)


def _text(table: pd.DataFrame) -> str:
    """Without settings that no run has."""
    given = table.replace("", None)  # a file tells no empty text from nothing
    optional = [name for name in SETTINGS if name in table and name not in _ALWAYS]
    empty = [name for name in optional if given[name].isna().all()]
    return str(table.drop(columns=empty).to_csv(index=False, lineterminator="\n"))
