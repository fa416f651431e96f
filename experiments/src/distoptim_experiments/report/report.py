"""What a report says about the runs of a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from distoptim_experiments import frames
from distoptim_experiments.frames import Runs
from distoptim_experiments.machines import PARETO_SHAPE
from distoptim_experiments.models.registry import TEXT_MODELS
from distoptim_experiments.report import front, page, pictures, tables
from distoptim_experiments.report import runs as reported
from distoptim_experiments.report.page import Picture, Section

_BEST = (
    "The best mean of each column is in bold; a method of which a run diverged is no candidate, and its mean is "
    "over the others."
)
_SYNCHRONOUS = "Synchronous SGD has no tau: its runs are repeated in every column and panel."
_CURVE = "Training loss, mean over the seeds that did not diverge; dotted to a cross where all of them did."
_FRONT = (
    "Means over seeds. Lower and further left is better: what nothing else beats in both is named, and joined "
    "by a grey line. Larger markers stand for longer periods. What is far from all others is at the border, as "
    "an arrow with its value. Settings of which a run diverged are left out."
)
_COSTS = (
    "Exposed communication is the time for which a worker stood still for messages or late workers; its "
    "percentage is relative to the computation. Overhead is the rest of what averaging took: forming payloads, "
    "coding, merging. It takes virtual workers no time."
)
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


def write(found: Runs, out: Path, *, force: bool = False) -> list[Path]:
    """Write the report of runs; returns the paths of the Markdown and the HTML file.

    Args:
        found: the runs; see `runs.named`.
        out: folder for the report.
        force: overwrite files that are no report.

    Raises:
        ValueError: `out` cannot be written to, or has such files.
    """
    return page.write(title(found), sections(found), out, force=force)


def title(found: Runs) -> str:
    """What the report is about."""
    parts = found.ended.experiment.unique()
    return f"Runs of {parts[0]}" if len(parts) == 1 else "Runs of several experiments"


def sections(found: Runs) -> list[Section]:
    """All sections; those of final runs only where there are some.

    Of several experiments one after the other.
    """
    out = (
        [Section("What was left out", [f"{note}." for note in found.notes])] if found.notes else []
    )
    parts = list(found.ended.groupby("experiment", sort=False))
    for i, (name, runs) in enumerate(parts):
        made = _part(runs, found.curves)
        out += made if len(parts) == 1 else [_named(section, str(name), i) for section in made]
    return [*out, Section("Surroundings", _surroundings(found.ended))]


def _named(section: Section, experiment: str, i: int) -> Section:
    blocks = [
        replace(block, name=f"{block.name}-{i}") if isinstance(block, Picture) else block
        for block in section.blocks
    ]
    return Section(f"{experiment}: {section.heading[0].lower()}{section.heading[1:]}", blocks)


def _part(runs: pd.DataFrame, curves: pd.DataFrame) -> list[Section]:
    """What can be compared."""
    final = runs[runs.stage == frames.FINAL]
    tuning = runs[runs.stage == frames.TRIAL]
    # Those that no slow-downs disturbed; all, if there are no others.
    plain = final[final.slowdown == "none"]
    plain = plain if len(plain) else final
    out = [Section("What was run", _overview(final, tuning))]
    if len(plain):
        out += [_quality(plain), _single_workers(plain)]
    if len(tuning):
        out.append(_tuning(tuning, final))
    return out + ([*_figures(plain, curves), _stragglers(final)] if len(plain) else [])


def _tuning(tuning: pd.DataFrame, final: pd.DataFrame) -> Section:
    score = _score(tuning)
    text = (
        f"{_spread(tuning, f'{score.capitalize()} on the validation set')} The best of each row is in "
        "bold. The last column is the learning rate that the final runs were made with."
    )
    rates = tables.learning_rates(tuning, final, f"validation_{score}")
    return Section("Learning rates tried", [text, *rates])


def _overview(final: pd.DataFrame, tuning: pd.DataFrame) -> list[str]:
    told = [_count(final, "final run")]
    if len(tuning):
        told.append(_count(tuning, "run") + " to choose learning rates")
    shown = final if len(final) else tuning
    own = shown.drop_duplicates("name").set_index("name").options.map(json.loads)
    said = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in given.items())
        for name, given in own.items()
        if given
    ]
    return [
        f"{'; '.join(told)}.",
        f"All of them: {_common(shown)}.",
        *([f"Options that are not at their defaults: {'; '.join(said)}."] if said else []),
    ]


def _count(runs: pd.DataFrame, what: str) -> str:
    diverged = int(runs.diverged.sum())
    return f"{len(runs)} {what}{'' if len(runs) == 1 else 's'}" + (
        f" ({diverged} diverged)" if diverged else ""
    )


def _common(runs: pd.DataFrame) -> str:
    settings = reported.settings(runs)
    alike = settings.columns[settings.nunique(dropna=False) == 1]
    same = settings[alike].iloc[0].dropna().to_dict()
    if "steps" in same:
        same.pop("epochs", None)
    if same.get("optimizer") != "sgd":
        same.pop("momentum", None)
    emulated = "" if runs.virtual.all() else "emulated "
    told = [
        (emulated if name in ("latency_ms", "bandwidth_gbit_s") else "")
        + text.format(reported.text(same[name]))
        for name, text in _FIELDS.items()
        if name in same and same[name] not in ("none", 0)
    ]
    return ", ".join(told) or "nothing in common"


def _spread(runs: pd.DataFrame, what: str) -> str:
    """How the figures of a table were made."""
    seeds = tables.seeds(runs)
    unit = "nats per byte" if what.startswith("Loss") else "per cent"
    if seeds == 1:
        return f"{what} in {unit}, one seed each."
    told = "seeds, whose number is in parentheses" if seeds is None else f"{seeds} seeds"
    return f"{what} in {unit}, mean ± standard deviation over {told}."


def _score(runs: pd.DataFrame) -> str:
    """What tells good models from bad ones."""
    return "loss" if runs.model.isin(TEXT_MODELS).all() else "accuracy"


def _quality(runs: pd.DataFrame) -> Section:
    score = _score(runs)
    told = [f"{_spread(runs, f'{score.capitalize()} on the whole test set')} {_BEST}"]
    told += [_SYNCHRONOUS] * bool(runs.synchronous.any())
    return Section(
        f"Test {score} of the averaged model", [*told, *tables.scores(runs, f"test_{score}")]
    )


def _single_workers(runs: pd.DataFrame) -> Section:
    heading = "Test accuracy of single workers"
    if runs.worker_accuracy.isna().all():
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


def _figures(runs: pd.DataFrame, curves: pd.DataFrame) -> list[Section]:
    virtual = bool(runs.virtual.all())
    clock = "virtual seconds" if virtual else "seconds"
    waits = ("Virtual" if virtual else "Measured") + " time, means over partitions and seeds."
    against = {
        "epochs": pictures.losses(runs, curves, "epoch", "epochs"),
        "time": pictures.losses(runs, curves, "seconds", clock),
    }
    return [
        *(
            Section(
                f"Loss against {what}",
                [_CURVE, Picture(what, f"Training loss against {what}", made)],
            )
            for what, made in against.items()
        ),
        Section(
            "Error and time over tau",
            [
                _FRONT,
                Picture("front", "Test error against seconds, over tau", front.front(runs, clock)),
            ],
        ),
        Section(
            "Where the time goes",
            [
                f"{waits} {_COSTS}",
                Picture(
                    "costs", "Computation, overhead and exposed communication", pictures.times(runs)
                ),
            ],
        ),
    ]


def _stragglers(runs: pd.DataFrame) -> Section:
    heading = "Stragglers"
    used = set(runs.slowdown) - {"none"}
    if not used:
        return Section(heading, ["Left out: no run here had random slow-downs."])
    told = (
        " ".join(text for kind, text in _SLOWDOWNS.items() if kind in used)
        if runs.virtual.all()
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


def _surroundings(runs: pd.DataFrame) -> list[str]:
    dates = sorted(runs.date.str[:16].str.replace("T", " ").unique())
    times = f"at {dates[0]}" if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    named = runs[["processor", "system"]].fillna("unknown")
    machines = runs.cores.astype(str) + " cores of " + named.processor + ", " + named.system
    lines = [
        f"Started {times} (UTC), with distoptim {_all(runs.distoptim)} (commit {_all(runs.commit)}), "
        f"torch {_all(runs.torch)} and python {_all(runs.python)}, on {'; '.join(sorted(machines.unique()))}."
    ]
    if runs.virtual.any():
        lines.append(
            "Seconds of virtual workers are those of the virtual machines described above, not of this "
            "computer."
        )
    if not runs.virtual.all():
        lines.append(
            "Seconds of real workers are those of their training steps, without evaluation."
        )
    return lines


def _all(values: pd.Series[str]) -> str:
    return ", ".join(sorted(values.fillna("None").unique()))
