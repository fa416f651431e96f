"""What a report says about the runs of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from distoptim_experiments.machines import PARETO_SHAPE
from distoptim_experiments.models.registry import TEXT_MODELS
from distoptim_experiments.records import Surroundings
from distoptim_experiments.report import front, page, pictures, tables
from distoptim_experiments.report import runs as grid
from distoptim_experiments.report.page import Picture, Section
from distoptim_experiments.report.runs import Run, Runs

_BEST = (
    "The best mean of each column is in bold; a method of which a run diverged is no candidate, and its mean is "
    "over the others."
)
_SYNCHRONOUS = "Synchronous SGD has no tau: its runs are repeated in every column and panel."
_FIELDS = {
    "workers": "{} workers",
    "batch_size": "batches of {}",
    "epochs": "{} epochs",
    "steps": "{} local steps",
    "optimizer": "optimizer {}",
    "lr": "learning rate {}",
    "momentum": "momentum {}",
    "weight_decay": "weight decay {}",
    "schedule": "schedule {}",
    "warmup_epochs": "{} epochs of warm-up",
    "validation": "share {} held out",
    "dtype": "computed in {}",
    "step_ms": "{} ms a local step",
    "latency_ms": "latency {} ms",
    "bandwidth_gbit_s": "bandwidth {} Gbit/s",
    "collective": "all-reduce over a {}",
    "slowdown": "slow-downs {}",
}
_SLOWDOWNS = {
    "exponential": "Exponential: half of a step is fixed, half an exponential delay, with the same mean.",
    "pareto": f"Pareto: a heavy tail of shape {PARETO_SHAPE}, with the same mean.",
    "trace": "Trace: recorded step times.",
}


def write(found: Runs, out: Path) -> list[Path]:
    """Write the report of recorded runs; returns the paths of the Markdown and the HTML file.

    Args:
        found: the runs.
        out: folder for the report.

    Raises:
        ValueError: `out` cannot be written to.
    """
    parts = grid.by(found.ended, lambda run: run.experiment)
    title = f"Runs of {', '.join(parts)}" if len(parts) == 1 else "Runs of several experiments"
    return page.write(title, sections(found), out)


def sections(found: Runs) -> list[Section]:
    """All sections; those of final runs only where there are some.

    Of several experiments one after the other.
    """
    parts = grid.by(found.ended, lambda run: run.experiment)
    out = (
        [Section("What was left out", [f"{note}." for note in found.notes])] if found.notes else []
    )
    for i, (name, runs) in enumerate(parts.items()):
        made = _part(Runs(runs, []))
        out += made if len(parts) == 1 else [_named(section, name, i) for section in made]
    return [*out, Section("Surroundings", _surroundings(found.ended))]


def _named(section: Section, experiment: str, i: int) -> Section:
    blocks = [
        replace(block, name=f"{block.name}-{i}") if isinstance(block, Picture) else block
        for block in section.blocks
    ]
    return Section(f"{experiment}: {section.heading[0].lower()}{section.heading[1:]}", blocks)


def _part(found: Runs) -> list[Section]:
    """What can be compared."""
    plain = found.plain
    out = [Section("What was run", _overview(found))]
    if plain:
        out += [_quality(plain), _single_workers(plain)]
    if found.tuning:
        score = _score(found.tuning)
        text = (
            f"{_spread(found.tuning, f'{score.capitalize()} on the validation set')} The best of each row is in "
            "bold. The last column is the learning rate that the final runs were made with."
        )
        rates = tables.learning_rates(found.tuning, found.final, f"validation_{score}")
        out.append(Section("Learning rates tried", [text, *rates]))
    return out + ([*_figures(plain), _stragglers(found.final)] if plain else [])


def _overview(found: Runs) -> list[str]:
    told = [_count(found.final, "final run")]
    if found.tuning:
        told.append(_count(found.tuning, "run") + " to choose learning rates")
    options = {
        run.label: ", ".join(f"{name} {value}" for name, value in chosen.items())
        for run in found.final or found.ended
        if (chosen := run.record.config.options)
    }
    said = "; ".join(f"{label}: {text}" for label, text in options.items())
    return [
        f"{'; '.join(told)}.",
        f"All of them: {_common(found.final or found.ended)}.",
        *([f"Options that are not at their defaults: {said}."] if said else []),
    ]


def _count(runs: Sequence[Run], what: str) -> str:
    diverged = sum(run.diverged for run in runs)
    return f"{len(runs)} {what}{'' if len(runs) == 1 else 's'}" + (
        f" ({diverged} diverged)" if diverged else ""
    )


def _common(runs: Sequence[Run]) -> str:
    settings = [grid.setting(run) for run in runs]
    same = {
        name: value
        for name, value in settings[0].items()
        if all(s.get(name) == value for s in settings)
    }
    if same.get("steps", "None") != "None":
        same.pop("epochs", None)
    if same.get("optimizer") != "sgd":
        same.pop("momentum", None)
    emulated = "" if runs[0].virtual else "emulated "
    told = [
        (emulated if name in ("latency_ms", "bandwidth_gbit_s") else "") + text.format(same[name])
        for name, text in _FIELDS.items()
        if same.get(name, "None") not in ("None", "none", "0")
    ]
    return ", ".join(told) or "nothing in common"


def _spread(runs: Sequence[Run], what: str) -> str:
    """How the figures of a table were made."""
    seeds = tables.seeds(runs)
    unit = "nats per byte" if what.startswith("Loss") else "per cent"
    if seeds == 1:
        return f"{what} in {unit}, one seed each."
    told = "seeds, whose number is in parentheses" if seeds is None else f"{seeds} seeds"
    return f"{what} in {unit}, mean ± standard deviation over {told}."


def _score(runs: Sequence[Run]) -> str:
    """What tells good models from bad ones."""
    return "loss" if all(run.record.config.model in TEXT_MODELS for run in runs) else "accuracy"


def _quality(runs: Sequence[Run]) -> Section:
    score = _score(runs)
    told = [f"{_spread(runs, f'{score.capitalize()} on the whole test set')} {_BEST}"]
    told += [_SYNCHRONOUS] * any(run.synchronous for run in runs)
    return Section(
        f"Test {score} of the averaged model", [*told, *tables.scores(runs, f"test_{score}")]
    )


def _single_workers(runs: Sequence[Run]) -> Section:
    heading = "Test accuracy of single workers"
    if all(run.value("worker_accuracy") is None for run in runs):
        return Section(heading, ["Left out: these records have no accuracy of single workers."])
    return Section(
        heading,
        [
            "What each worker's own model reaches at the end without averaging, as a mean over the workers, in per cent; "
            "otherwise as above. It is measured on the first 1000 test images or 100 windows of text only: where the test "
            "set has more, it cannot be compared with the table above.",
            *tables.scores(runs, "worker_accuracy"),
        ],
    )


def _figures(runs: Sequence[Run]) -> list[Section]:
    virtual = runs[0].virtual
    clock = "virtual seconds" if virtual else "seconds"
    curve = "Training loss, mean over the seeds that did not diverge; dotted to a cross where all of them did."
    waits = (
        "Virtual time, " if virtual else "Measured time, "
    ) + "means over partitions and seeds."
    return [
        Section(
            "Loss against epochs",
            [
                curve,
                Picture(
                    "epochs",
                    "Training loss against epochs",
                    pictures.losses(runs, "epoch", "epochs"),
                ),
            ],
        ),
        Section(
            "Loss against time",
            [
                curve,
                Picture(
                    "seconds", "Training loss against time", pictures.losses(runs, "seconds", clock)
                ),
            ],
        ),
        Section(
            "Error and time over tau",
            [
                "Means over seeds. Lower and further left is better: what nothing else beats in both is named, and joined "
                "by a grey line. Larger markers stand for longer periods; some are moved sideways, not to cover others. "
                "What is far from all others is at the border, with an arrow and its value. Settings of which a run "
                "diverged are left out.",
                Picture("front", "Test error against seconds, over tau", front.front(runs, clock)),
            ],
        ),
        Section(
            "Where the time goes",
            [
                f"{waits} Exposed communication is the time for which a worker stood still for messages or late workers; "
                "its percentage is relative to the computation.",
                Picture("times", "Computation and exposed communication", pictures.times(runs)),
            ],
        ),
    ]


def _stragglers(runs: Sequence[Run]) -> Section:
    heading = "Stragglers"
    if all(run.slowdown == "none" for run in runs):
        return Section(heading, ["Left out: no run here had random slow-downs."])
    used = {run.slowdown for run in runs}
    told = (
        " ".join(text for kind, text in _SLOWDOWNS.items() if kind in used)
        if runs[0].virtual
        else "Slowed workers sleep before every step, for a random time."
    )
    return Section(
        heading,
        [
            "Time of a local step, waiting included, with and without random slow-downs of the workers; means over "
            f"partitions and seeds. {told}",
            Picture("stragglers", "Time with and without slow-downs", pictures.stragglers(runs)),
        ],
    )


def _surroundings(runs: Sequence[Run]) -> list[str]:
    starts = [run.record.start.surroundings for run in runs]
    dates = sorted({start.date[:16].replace("T", " ") for start in starts})
    times = f"at {dates[0]}" if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    machines = {
        f"{m.cores} cores of {m.processor}, {m.system}" for m in (start.machine for start in starts)
    }
    lines = [
        f"Started {times} (UTC), with distoptim {_all(starts, 'distoptim')} (commit {_all(starts, 'commit')}), "
        f"torch {_all(starts, 'torch')} and python {_all(starts, 'python')}, on {'; '.join(sorted(machines))}."
    ]
    if any(run.virtual for run in runs):
        lines.append(
            "Seconds of virtual workers are those of the virtual machines described above, not of this "
            "computer."
        )
    if not all(run.virtual for run in runs):
        lines.append(
            "Seconds of real workers are those of their training steps, without evaluation; exposed "
            "communication is what they waited for it."
        )
    return lines


def _all(starts: Iterable[Surroundings], name: str) -> str:
    return ", ".join(sorted({str(getattr(start, name)) for start in starts}))
