"""A table of runs, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from distoptim_experiments.config import RunConfig
from distoptim_experiments.optimizers import rule_facts
from distoptim_experiments.records import Record

NONE = "-"


def table(runs: Sequence[Record]) -> Table:
    """One row per finished run.

    With tau where the runs differ in it, and with the seed likewise.
    """
    told = [key for key in ("tau", "seed") if len({getattr(r.config, key) for r in runs}) > 1]
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    out.add_column("method", no_wrap=True, vertical="bottom")
    for heading in (
        *told,
        "test\naccuracy",
        "test\nloss",
        "seconds",
        "exposed\n/comput.",
        "overhead\n/comput.",
        "MB per\nworker",
        "syncs",
    ):
        out.add_column(heading, justify="right", vertical="bottom")
    for run in runs:
        out.add_row(
            run.config.algorithm,
            *(str(getattr(run.config, key)) for key in told),
            *_figures(run),
        )
    return out


def _figures(run: Record) -> list[str]:
    s = run.summary
    if s is None:
        raise ValueError(f"{run.start.label}: the run has not ended")
    return [
        _text(s.test_accuracy, ".2%"),
        _text(s.test_loss, ".3f"),
        _text(s.seconds, ".1f"),
        _text(s.exposed_share, ".1%"),
        _text(s.overhead_share, ".1%"),
        _text(s.bytes / 1e6, ".1f"),
        str(s.syncs),
    ]


def _text(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def note(runs: Sequence[Record]) -> str:
    """What must be known to compare the methods fairly."""
    told = []
    for run in reversed(runs):
        factor = _effective(run.config)
        if factor is not None:
            name, why = _NAMES[run.config.algorithm]
            told.append(f"{factor:.2g} times in {name} ({why})")
    lr = f"All learning rates are {runs[0].config.lr:g}, "
    return lr + (f"but the effective one is {' and '.join(told)}." if told else "as given.")


_NAMES = {
    "overlap-local-sgd": ("Overlap-Local-SGD", "its pull"),
    "bmuf": ("BMUF", "its block momentum"),
}


def _effective(config: RunConfig) -> float | None:
    """The workers' mean moves at so many times the learning rate; None if at the rate as given."""
    if config.algorithm not in _NAMES:
        return None
    rule = rule_facts(config)
    momentum = float(rule["outer_momentum"])
    if config.algorithm == "bmuf":
        return float(rule["outer_lr"]) / (1 - momentum)
    if "delay" in config.options:
        return None
    alpha = float(rule["alpha"])
    return (1 - alpha) / (1 - alpha * momentum)
