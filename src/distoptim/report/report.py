"""What a report says about the runs of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distoptim.report import page, pictures, tables
from distoptim.report import runs as grid
from distoptim.report.page import Picture, Section
from distoptim.report.runs import Run, Runs

_HOW = ("Mean ± standard deviation over seeds, in per cent; in parentheses the number of seeds. The best mean of each "
        "column is in bold; a method of which a run diverged is no candidate, and its mean is over the others.")
_SYNCHRONOUS = "Synchronous SGD has no tau: its runs are repeated in every column and panel."


def write(folder: Path, out: Path) -> list[Path]:
    """Write the report of a folder of records; returns the paths of the Markdown and the HTML file.

    Args:
        folder: holds the records, in folders of their own.
        out: folder for the report.

    Raises:
        ValueError: no such folder, no finished run in it, or `out` cannot be written to.
    """
    found = grid.read(folder)
    return page.write("Recorded runs", sections(found), out)


def sections(found: Runs) -> list[Section]:
    """All sections; those of final runs only where there are some."""
    plain = found.plain
    out = [Section("What was run", _overview(found))]
    if plain:
        out += [_accuracy(plain), _single_workers(plain)]
    if found.tuning:
        text = ("Accuracy on the validation set, in per cent, as above; the best of each row in bold. The last column "
                "is the learning rate that the final runs were made with.")
        out.append(Section("Learning rates tried", [text, *tables.learning_rates(found.tuning, found.final)]))
    return out + ([*_figures(plain), _stragglers(found.final)] if plain else []) + [
        Section("Surroundings", _surroundings(found.ended))]


def _overview(found: Runs) -> list[str]:
    diverged = sum(run.diverged for run in found.ended)
    told = f"{len(found.final)} finished runs, and {len(found.tuning)} that chose learning rates; {diverged} diverged."
    return [told, f"In common: {_common(found.final or found.ended)}.", *(f"{note}." for note in found.notes)]


def _common(runs: Sequence[Run]) -> str:
    settings = [grid.setting(run) for run in runs]
    length = "epochs" if settings[0].get("steps", "None") == "None" else "steps"
    names = ("data", "model", "workers", "batch_size", length, "optimizer", "lr", "schedule", "dtype", "step_ms",
             "latency_ms", "bandwidth_gbit_s", "collective")
    same = [f"{name} {settings[0][name]}" for name in names
            if settings[0].get(name, "None") != "None" and len({s.get(name) for s in settings}) == 1]
    return ", ".join(same) or "nothing"


def _accuracy(runs: Sequence[Run]) -> Section:
    told = [_HOW, _SYNCHRONOUS] if any(run.synchronous for run in runs) else [_HOW]
    return Section("Test accuracy of the averaged model", [*told, *tables.accuracies(runs, "test_accuracy")])


def _single_workers(runs: Sequence[Run]) -> Section:
    heading = "Test accuracy of single workers"
    if all(run.value("worker_accuracy") is None for run in runs):
        return Section(heading, ["The records hold none."])
    return Section(heading, ["The mean over the workers of what each one's own model reaches at the end; as above.",
                             *tables.accuracies(runs, "worker_accuracy")])


def _figures(runs: Sequence[Run]) -> list[Section]:
    clock = "virtual seconds" if all(run.record.start.get("machines") for run in runs) else "seconds"
    curve = "Training loss, mean over the seeds that did not diverge; dotted to a cross where all of them did."
    return [
        Section("Loss against epochs", [curve, Picture("epochs", "Training loss against epochs",
                                                       pictures.losses(runs, "epoch", "epochs"))]),
        Section("Loss against time", [curve, Picture("seconds", "Training loss against time",
                                                     pictures.losses(runs, "seconds", clock))]),
        Section("Error and time over tau", [
            "Means over seeds; the numbers are tau. Left and below is better. Settings of which a run diverged are "
            "left out.", Picture("front", "Test error against seconds, over tau", pictures.front(runs, clock))]),
        Section("Where the time goes", [
            "Means over partitions and seeds.", Picture("times", "Computation and exposed communication",
                                                        pictures.times(runs))]),
    ]


def _stragglers(runs: Sequence[Run]) -> Section:
    heading = "Stragglers"
    if all(run.slowdown == "none" for run in runs):
        return Section(heading, ["Left out: no run here had random slow-downs."])
    return Section(heading, ["Time with and without random slow-downs of the workers; means over partitions and seeds.",
                             Picture("stragglers", "Time with and without slow-downs", pictures.stragglers(runs))])


def _surroundings(runs: Sequence[Run]) -> list[str]:
    starts = [run.record.start for run in runs]
    dates = sorted(str(start.get("date", "?"))[:16] for start in starts)
    lines = [f"Started between {dates[0]} and {dates[-1]} (UTC)."]
    for name in ("distoptim", "torch", "python", "commit"):
        lines.append(f"{name}: {', '.join(sorted({str(start.get(name)) for start in starts}))}.")
    machines = {f"{m.get('cores', '?')} cores of {m.get('processor', '?')}, {m.get('system', '?')}"
                for m in (start.get("machine", {}) for start in starts)}
    return [*lines, f"machine: {'; '.join(sorted(machines))}."]
