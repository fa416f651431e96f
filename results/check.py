"""Recompute what pages take from the CSV files here: their tables, and sentences with numbers.

A table stands behind a comment that names it, `<!-- from results: NAME -->`. Pages that differ are
named, and what they should say is printed; exit status 1. Run: python results/check.py [--write]
(which mends the tables; sentences are for you).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
from distoptim_experiments import frames
from distoptim_experiments.studies import front

HERE = Path(__file__).parent
PAGES = [
    HERE.parent / "README.md",
    HERE / "README.md",
    HERE / "stragglers" / "README.md",
    *(HERE.parent / "docs").glob("*.md"),
]
COLUMNS = [("iid", 8), ("iid", 24), ("label-skew", 8), ("label-skew", 24)]


@cache
def final(study: str) -> pd.DataFrame:
    """The final runs of a study."""
    ended = frames.read(HERE / study).ended
    return ended[ended.stage == frames.FINAL]


@cache
def trials(study: str) -> pd.DataFrame:
    """The runs of a study that chose learning rates."""
    ended = frames.read(HERE / study).ended
    return ended[ended.stage == frames.TRIAL]


def runs(study: str, label: str, tau: int | None = None, **fields: object) -> pd.DataFrame:
    """Of one method, at one period, or at any."""
    chosen = final(study)
    fields |= {"label": label} | ({} if tau is None else {"tau": tau})
    for name, value in fields.items():
        chosen = chosen[chosen[name] == value]
    if not len(chosen):
        raise ValueError(f"{study}: no run of {fields}")
    return chosen


def mean(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """Printed."""
    return f"{scale * fmean(values):.{digits}f}"


def spread(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """Mean and standard deviation, printed."""
    return f"{mean(values, digits, scale)} +- {scale * stdev(values):.{digits}f}"


def accuracy(
    label: str, tau: int | None = None, skewed: bool = False, study: str = "small"
) -> float:
    """Of the averaged model on the test set, in per cent."""
    partition = "label-skew" if skewed else "iid"
    return 100 * fmean(runs(study, label, tau, partition=partition).test_accuracy)


def loss(label: str, tau: int | None = None) -> float:
    """Of the averaged model on the test set, in nats."""
    return fmean(runs("shakespeare", label, tau).test_loss)


def step_ms(label: str, tau: int | None, slowdown: str) -> pd.Series[float]:
    """Milliseconds of a local step, waiting included."""
    chosen = runs("stragglers", label, tau, slowdown=slowdown)
    return 1e3 * chosen.seconds / chosen.step


def waits(chosen: pd.DataFrame, digits: int = 0) -> str:
    """Exposed communication as a share of the computation, printed."""
    return f"{100 * fmean(chosen.exposed_s / chosen.computation_s):.{digits}f} %"


def rows(*cells: list[str]) -> str:
    """A table in Markdown."""
    header, *body = cells
    lines = [header, ["---"] * len(header), *body]
    made = [
        f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines
    ]
    made[1] = f"|{'|'.join(lines[1])}|"
    return "\n".join(made)


SMALL = {
    "Local SGD": "Local SGD",
    "BMUF (momentum 0.7)": "BMUF",
    "CoCoD-SGD": "CoCoD-SGD",
    "EAMSGD": "EAMSGD",
    "Overlap-Local-SGD": "Overlap-Local-SGD",
}
TAUS = (1, 2, 8, 24)


def small(partition: str) -> list[list[str]]:
    """Methods x tau."""
    sync = runs("small", "sync", partition=partition)
    return [
        ["synchronous SGD", spread(sync.test_accuracy, 2, 100), "", "", ""],
        *(
            [
                name,
                *(
                    spread(runs("small", label, tau, partition=partition).test_accuracy, 2, 100)
                    for tau in TAUS
                ),
            ]
            for name, label in SMALL.items()
        ),
    ]


def small_iid() -> str:
    """With what is exposed."""
    sync, *others = small("iid")
    exposed = [waits(runs("small", label, 2, partition="iid"), 1) for label in SMALL.values()]
    header = ["IID", *(f"tau {tau}" for tau in TAUS), "exposed / computation at tau 2"]
    told = f"{waits(runs('small', 'sync', partition='iid'), 1)} (at tau 1, set by the link)"
    return rows(header, [*sync, told], *([*a, b] for a, b in zip(others, exposed, strict=True)))


def small_skewed() -> str:
    """The same with label skew."""
    return rows(["label skew", *(f"tau {tau}" for tau in TAUS)], *small("label-skew"))


RULES = {
    "pull (Overlap-Local-SGD without momentum)": "pull",
    "pull, momentum 0.7 (Overlap-Local-SGD)": "Overlap-Local-SGD",
    "carry (CoCoD-SGD)": "CoCoD-SGD",
    "carry, momentum 0.5 a round later (`BMUF(carry=True)`)": "carry, late momentum 0.5, tau {}",
    "carry, momentum 0.5": "carry, momentum 0.5",
    "half carry": "half carry",
    "half carry, momentum 0.5 (`OverlapBMUF`)": "half carry, momentum 0.5",
    "half carry, momentum 0.7": "half carry, momentum 0.7",
    "eager (`EagerDiLoCo`, outer_lr 1, no momentum)": "eager",
    "eager, momentum 0.5": "eager, momentum 0.5",
    "late anchor (`CO2`)": "late anchor (CO2)",
}


def rules() -> str:
    """Validation accuracy of one seed, the best of each column in bold."""
    made = pd.DataFrame(
        {
            column: {
                name: 100
                * runs(
                    "beyond", label.format(tau), tau, partition=partition, seed=0
                ).validation_accuracy.item()
                for name, label in RULES.items()
            }
            for column, (partition, tau) in enumerate(COLUMNS)
        }
    )
    texts = made.map(lambda value: f"{value:.2f}")
    texts = texts.mask(made == made.max(), "**" + texts + "**")
    header = ["rule", *_columns()]
    return rows(
        header, *([name, *row] for name, row in zip(texts.index, texts.values, strict=True))
    )


def column_means(label: str, score: str = "test_accuracy", seed: int | None = None) -> list[float]:
    """Per cent in each column of the study `beyond`, as a mean over seeds or of one."""
    fields = {} if seed is None else {"seed": seed}
    return [
        100
        * fmean(
            runs("beyond", label.format(tau), tau, partition=partition, **fields)[score].dropna()
        )
        for partition, tau in COLUMNS
    ]


def less(ones: Iterable[float], others: Iterable[float]) -> list[float]:
    """Differences, one by one."""
    return [one - other for one, other in zip(ones, others, strict=True)]


def between(values: Iterable[float], digits: int = 1) -> str:
    """From the least to the greatest, printed."""
    ordered = sorted(values)
    return f"{ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f}"


def _columns() -> list[str]:
    return [f"{'IID' if part == 'iid' else 'label skew'}, tau {tau}" for part, tau in COLUMNS]


def five_seeds() -> str:
    """Test accuracy of the two rules, beside what waits."""
    sync = [
        spread(runs("beyond", "sync", partition=partition).test_accuracy, 2, 100)
        for partition in ("iid", "label-skew")
    ]
    methods = {
        "`OverlapBMUF`, all hidden": ("beyond", "half carry, momentum 0.5"),
        "`OverlapLocalSGD`, all hidden": ("beyond", "Overlap-Local-SGD"),
        "`LocalSGD`, which waits at every sync (3 seeds)": ("small", "Local SGD"),
    }
    return rows(
        ["", *_columns()],
        ["synchronous SGD, which waits at every step", sync[0], "", sync[1], ""],
        *(
            [
                name,
                *(
                    spread(runs(study, label, tau, partition=part).test_accuracy, 2, 100)
                    for part, tau in COLUMNS
                ),
            ]
            for name, (study, label) in methods.items()
        ),
    )


TEXT = {
    "DiLoCo, outer momentum 0.5": "DiLoCo, momentum 0.5",
    "Local AdamW": "Local AdamW",
    "Streaming DiLoCo (2 fragments, delay 1)": "Streaming DiLoCo",
    "DiLoCo": "DiLoCo",
    "*everything hidden:*": None,
    "Streaming DiLoCo, delay 5, outer lr 0.7, momentum 0.5": "Streaming DiLoCo, momentum 0.5, delay 5",
    "OverlapBMUF": "OverlapBMUF",
    "Overlap-Local-SGD": "Overlap-Local-SGD",
    "CoCoD-SGD": "CoCoD-SGD",
    "CO2": "CO2",
    "Eager DiLoCo, outer lr 0.7, momentum 0.5": "Eager DiLoCo, momentum 0.5",
    "Eager DiLoCo": "Eager DiLoCo",
}


def shakespeare() -> str:
    """Test losses; the best, and the best of what hides everything, in bold."""
    ddp = runs("shakespeare", "DDP")
    bold = {"Streaming DiLoCo, momentum 0.5, delay 5"}
    made = []
    for name, label in TEXT.items():
        if label is None:
            made.append([name, "", "", "", ""])
            continue
        both = [runs("shakespeare", label, tau) for tau in (10, 50)]
        losses = [spread(chosen.test_loss, 3) for chosen in both]
        made.append(
            [
                name,
                *(f"**{told}**" if label in bold else told for told in losses),
                " / ".join(waits(chosen) for chosen in both),
                " / ".join(mean(chosen.bytes, 0, 1e-6) for chosen in both),
            ]
        )
    first = f"**{spread(ddp.test_loss, 3)}** (no tau)"
    return rows(
        ["method", "tau 10", "tau 50", "waits, tau 10 / 50", "MB, tau 10 / 50"],
        ["DDP", first, "", waits(ddp), mean(ddp.bytes, 0, 1e-6)],
        *made,
    )


def stragglers() -> str:
    """Milliseconds per local step."""
    overlapped = ("EAMSGD", "CoCoD-SGD", "Overlap-Local-SGD")
    methods = [
        ("synchronous SGD", ["sync"], None),
        *(("Local SGD", ["Local SGD"], tau) for tau in (2, 8)),
        *((", ".join(overlapped), list(overlapped), tau) for tau in (2, 8)),
    ]
    made = []
    for name, labels, tau in methods:
        cells = []
        for slowdown, digits in (("none", 1), ("exponential", 1), ("pareto", 0)):
            times = [step_ms(label, tau, slowdown) for label in labels]
            told = {mean(t, 1) if slowdown == "none" else spread(t, digits) for t in times}
            # One row says the times of three methods.
            (cell,) = told
            cells.append(cell)
        made.append([name, "" if tau is None else str(tau), *cells])
    return rows(["method", "tau", "none", "exponential", "Pareto"], *made)


CHURN = {
    "nobody": 0.0,
    "one every 20 rounds": 16.0,
    "one every 5 rounds": 4.0,
    "one every 2 rounds": 1.6,
}


def churn() -> str:
    """Test accuracy by how often one of 16 workers is lost."""
    made = [
        [
            label,
            *(
                spread(runs("churn", label, lose_every_s=every).test_accuracy, 2, 100)
                for every in CHURN.values()
            ),
        ]
        for label in ("Local SGD", "Overlap-Local-SGD", "OverlapBMUF")
    ]
    return rows(["method", *CHURN], *made)


def churn_costs() -> list[str]:
    """In points of accuracy, at the highest rate."""
    below = {
        label: 100
        * (
            fmean(runs("churn", label, lose_every_s=0.0).test_accuracy)
            - fmean(runs("churn", label, lose_every_s=1.6).test_accuracy)
        )
        for label in ("Local SGD", "OverlapBMUF", "Overlap-Local-SGD")
    }
    first, second, third = (f"{name} {x:.2f}" for name, x in below.items())
    return [
        f"with one loss every two rounds {first.replace('SGD ', 'SGD ends ')} points lower, {second} and {third}"
    ]


def one_step(lines: list[list[str]]) -> list[list[str]]:
    """Of the front's rows those of messages that take one local step."""
    return [[line[1], *line[2:]] for line in lines if line is lines[0] or line[0] == "1 step"]


def by_workers() -> list[list[str]]:
    """Rows: the better of two learning rates on the validation set, for each number of workers."""
    made = final("workers")
    chosen = made.loc[made.groupby(["label", "workers"], sort=False).validation_loss.idxmin()]
    found = chosen.pivot(index="label", columns="workers", values="test_loss")
    return [
        ["method", *(f"{count} workers" for count in found.columns)],
        *([str(label), *(f"{loss:.3f}" for loss in losses)] for label, losses in found.iterrows()),
    ]


TABLES: dict[str, Callable[[], str]] = {
    "churn": churn,
    "small, IID": small_iid,
    "small, label skew": small_skewed,
    "beyond, all rules": rules,
    "beyond, five seeds": five_seeds,
    "shakespeare": shakespeare,
    "stragglers": stragglers,
    "front": lambda: rows(*front.front(final("front"))),
    "front, one step": lambda: rows(*one_step(front.front(final("front")))),
    "front, all": lambda: rows(*front.everything(final("front"))),
    "front, plays tried": lambda: rows(*front.tried(trials("front"), "gpt-small", "iid")),
    "workers": lambda: rows(*by_workers()),
}


OURS = "half carry, momentum 0.5"
"""OverlapBMUF at its defaults, in the study `beyond`."""


def which_sgd() -> list[str]:
    """What to choose over SGD with momentum."""
    a = accuracy
    overlap = "Overlap-Local-SGD"
    cocod = "CoCoD-SGD"

    def both(label: str, tau: int, study: str = "small") -> str:
        return f"{a(label, tau, study=study):.1f} ({a(label, tau, True, study):.1f})"

    def waiting(skewed: bool) -> str:
        return f"tau 1: {a('Local SGD', 1, skewed):.1f} %, " + ", ".join(
            f"{tau}: {a(label, tau, skewed):.1f}"
            for label, tau in (("Local SGD", 2), ("Local SGD", 8), ("BMUF", 24))
        )

    above = less([a("Local SGD", 8, True), a("BMUF", 24, True)], column_means(OURS)[2:])
    return [
        f"had {a(overlap, 2):.1f} % at tau 2, {a(OURS, 8, study='beyond'):.1f} at tau 8, "
        f"{a(OURS, 24, study='beyond'):.1f} at tau 24",
        f"Synchronous SGD has {a('sync'):.1f} % (skewed {a('sync', skewed=True):.1f}).",
        f"| {a(cocod, 1):.1f} %; {overlap} {a(overlap, 1):.1f}, EASGD {a('EAMSGD', 1):.1f} |",
        f"| {a(overlap, 1, True):.1f} % both; single workers are best with the first |",
        f"| {a(overlap, 2):.1f} % both (skewed {a(overlap, 2, True):.1f} and {a(cocod, 2, True):.1f}).",
        f"| {both(OURS, 8, 'beyond').replace(' (', ' % (')}; {overlap} {both(overlap, 8, 'beyond')}, {cocod} "
        f"{both(cocod, 8)} |",
        f"| {both(OURS, 24, 'beyond').replace(' (', ' % (')}; {cocod} {both(cocod, 24)}, {overlap} "
        f"{both(overlap, 24, 'beyond')} |",
        f"| {waiting(False)} |",
        f"| {waiting(True)}: at 8 and 24 at most {max(above):.1f} above what `OverlapBMUF` hides |",
        *which_other_sgd(),
    ]


def which_other_sgd() -> list[str]:
    """What not to choose, and what it costs."""
    one = {name: column_means(label, seed=0) for name, label in RULES.items()}
    ours = column_means(OURS)
    cocod = [accuracy("CoCoD-SGD", tau, partition != "iid") for partition, tau in COLUMNS]
    bmuf = one["carry, momentum 0.5 a round later (`BMUF(carry=True)`)"]
    eager = one.pop("eager, momentum 0.5")
    others = itertools.chain(*one.values())
    return [
        f"`CoCoDSGD` costs {between(less(ours, cocod))} points at tau 8 and 24 against `OverlapBMUF`.",
        f"`BMUF` with it is {between(less(one['half carry, momentum 0.5 (`OverlapBMUF`)'], bmuf))} points "
        "below `OverlapBMUF` (one seed)",
        f"over SGD with momentum {between(eager, 0)} % where others have {between(others, 0)}",
    ]


def which_adamw() -> list[str]:
    """What to choose over AdamW."""
    streaming = "Streaming DiLoCo, momentum 0.5, delay 5"
    sgd = "Overlap-Local-SGD"
    return [
        f"DDP has {loss('DDP'):.2f}.",
        f"| {loss(streaming, 10):.2f}, nothing exposed; Local AdamW, which waits, "
        f"{loss('Local AdamW', 10):.2f} |",
        f"| {loss('OverlapBMUF', 10):.2f}, as `OverlapLocalSGD` {loss(sgd, 10):.2f} |",
        f"| {loss(streaming, 50):.2f}; Local AdamW {loss('Local AdamW', 50):.2f} |",
        f"| {loss('OverlapBMUF', 50):.2f}; `OverlapLocalSGD` {loss(sgd, 50):.2f} |",
        f"| {loss('DiLoCo, momentum 0.5', 10):.2f} at tau 10, {loss('DiLoCo, momentum 0.5', 50):.2f} at "
        "tau 50.",
        f"had {loss('DiLoCo', 10):.2f} and {loss('DiLoCo', 50):.2f} |",
        f"over AdamW {_eager_behind()} nats behind Local AdamW even with a smaller outer momentum",
    ]


def _eager_behind() -> str:
    label = "Eager DiLoCo, momentum 0.5"
    return between(loss(label, tau) - loss("Local AdamW", tau) for tau in (10, 50))


def slow() -> list[str]:
    """What slow-downs cost."""

    def ms(label: str, tau: int | None, slowdown: str) -> str:
        return mean(step_ms(label, tau, slowdown), 0)

    def more(label: str, tau: int | None, slowdown: str) -> str:
        without = fmean(step_ms(label, tau, "none"))
        return f"{fmean(step_ms(label, tau, slowdown)) - without:.0f}"

    slow = "exponential"
    hidden = "Overlap-Local-SGD"
    return [
        f"slow-downs bring synchronous SGD from {ms('sync', None, 'none')} to {ms('sync', None, slow)} ms "
        f"a step, Local SGD with tau = 8 from {ms('Local SGD', 8, 'none')} to {ms('Local SGD', 8, slow)}, "
        f"and EAMSGD, CoCoD-SGD and Overlap-Local-SGD, which wait for a message of the round before, from "
        f"{ms(hidden, 8, 'none')} to {ms(hidden, 8, slow)} (at tau = 2: to {ms(hidden, 2, slow)}).",
        f"Pareto slow-downs cost those three {more(hidden, 8, 'pareto')} ms at tau = 8 and "
        f"{more(hidden, 2, 'pareto')} at tau = 2, against {more('sync', None, 'pareto')} in synchronous SGD.",
    ]


def lost(label: str, tau: int | None) -> str:
    """Milliseconds a step that exponential slow-downs cost."""
    slowed = fmean(step_ms(label, tau, "exponential"))
    return f"{slowed - fmean(step_ms(label, tau, 'none')):.0f} ms"


def slow_choice() -> list[str]:
    """The same in short."""
    return [
        f"synchronous SGD loses {lost('sync', None)} of a 100 ms step, Local SGD at tau = 8 "
        f"{lost('Local SGD', 8)}, the overlapped ones {lost('Overlap-Local-SGD', 8)}"
    ]


def slow_result() -> list[str]:
    """The same beside its table."""
    return [
        f"Slow-downs cost synchronous SGD {lost('sync', None)} a step (exponential), Local SGD with "
        f"tau = 8 {lost('Local SGD', 8)}, the overlapped methods {lost('Overlap-Local-SGD', 8)}."
    ]


def read_best() -> list[str]:
    """What reads Shakespeare best."""
    streaming = "Streaming DiLoCo, momentum 0.5, delay 5"
    best = "DiLoCo, momentum 0.5"
    adamw = "Local AdamW"

    def seconds(label: str, tau: int | None = None) -> str:
        return mean(runs("shakespeare", label, tau).seconds, 0)

    def behind(label: str, other: str) -> list[str]:
        return [f"{loss(label, tau) - loss(other, tau):.2f}" for tau in (10, 50)]

    return [
        f"the best periodic method is {loss(best, 10) - loss('DDP'):.2f} nats behind at tau 10 and "
        f"{loss(best, 50) - loss('DDP'):.2f} at tau 50.",
        f"DDP takes {seconds('DDP')} virtual seconds, {adamw} {seconds(adamw, 10)} at tau 10, and what "
        f"hides everything {seconds('OverlapBMUF', 10)}.",
        f"is {behind(streaming, best)[0]} behind the best blocking one at tau 10, and "
        f"{behind(streaming, best)[1]} at tau 50",
        f"OverlapBMUF is best, {' and '.join(behind('OverlapBMUF', adamw))} behind {adamw}; "
        f"Overlap-Local-SGD is {' and '.join(behind('Overlap-Local-SGD', adamw))} behind it, CoCoD-SGD "
        f"{' and '.join(behind('CoCoD-SGD', adamw))}, CO2 {' and '.join(behind('CO2', adamw))}.",
        f"0.5 gains DiLoCo {' and '.join(behind('DiLoCo', best))}.",
        f"with 0.5 ahead by {loss(adamw, 10) - loss(best, 10):.3f} and "
        f"{loss(adamw, 50) - loss(best, 50):.3f}, at most two standard deviations",
        f"with momentum 0.5 it is still {_eager_behind()} behind {adamw}.",
    ]


def hidden() -> list[str]:
    """How OverlapBMUF compares."""

    def differences(study: str, label: str) -> list[float]:
        ours = [accuracy(OURS, tau, part != "iid", "beyond") for part, tau in COLUMNS]
        theirs = [accuracy(label, tau, part != "iid", study) for part, tau in COLUMNS]
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    over = differences("beyond", "Overlap-Local-SGD")
    local = differences("small", "Local SGD")
    sync = less(_sync(), column_means(OURS))
    return [
        f"It is above the paper's rule in all four, by {between(over)} points, and about "
        f"where Local SGD is that waits: {-local[0]:.1f} and {-local[1]:.1f} below it with equal data, "
        f"{-local[2]:.1f} below and {local[3]:.1f} above with skewed data.",
        f"is missed**: {between(sync)} points are left",
        f"blocking Local SGD at the same tau is {between(a + b for a, b in zip(local, sync, strict=True))} "
        "points below synchronous SGD.",
        *halves(),
    ]


def halves() -> list[str]:
    """What each part of the rule brings, on the validation set, with one seed."""
    one = {name: column_means(label, "validation_accuracy", 0) for name, label in RULES.items()}
    carry = one["carry (CoCoD-SGD)"]
    ours = one["half carry, momentum 0.5 (`OverlapBMUF`)"]
    more = "half carry, momentum 0.7"
    ended = frames.read(HERE / "beyond").ended
    trials = ended[ended.stage == frames.TRIAL].groupby(["label", "tau", "partition"])
    best = trials.validation_accuracy.max().groupby("label").mean()
    return [
        f"against carry the gain 1/2 alone brings {between(less(one['half carry'], carry))} points, "
        f"momentum alone {between(less(one['carry, momentum 0.5'], carry))}, both together "
        f"{between(less(ours, carry))} (one seed each, validation set).",
        f"Momentum 0.5 and 0.7 are equal on average ({fmean(ours):.2f} and {fmean(one[more]):.2f})",
        f"({100 * best[OURS]:.2f} against {100 * best[more]:.2f} on the validation set).",
    ]


def _sync() -> list[float]:
    return [accuracy("sync", skewed=part != "iid", study="beyond") for part, _ in COLUMNS]


def found() -> list[str]:
    """The paper's claims, one by one."""
    a = accuracy
    ours = "Overlap-Local-SGD"
    gains = [a(ours, tau) - a("EAMSGD", tau) for tau in TAUS]
    skewed = [a(ours, tau, True) - a("EAMSGD", tau, True) for tau in TAUS]
    hidden = ("CoCoD-SGD", "EAMSGD", ours)
    below, below_skewed = (
        between(a("Local SGD", 8, skew) - a(label, 8, skew) for label in hidden)
        for skew in (False, True)
    )
    waiting = [waits(runs("small", label, 2, partition="iid"), 1) for label in ("Local SGD", ours)]
    ahead = column_means(OURS)
    return [
        f"synchronous SGD waits {waits(runs('small', 'sync', partition='iid'), 1)}; at tau = 2 Local SGD "
        f"waits {waiting[0]}, {ours} {waiting[1]}, in virtual time.",
        f"**Not here**: {a(ours, 2):.2f} against {a('sync'):.2f} (IID), {a(ours, 2, True):.2f} against "
        f"{a('sync', skewed=True):.2f} (skew)",
        f"with label skew by {min(skewed):.1f} to {max(skewed):.1f} points, IID by "
        f"{min(gains[:3]):.1f} to {max(gains[:3]):.1f} at tau 1, 2 and 8 and by {gains[3]:.1f} at tau 24.",
        f"Only at tau = 8 (+{a(ours, 8) - a('CoCoD-SGD', 8):.2f}).",
        f"it loses {a(ours, 8, True) - a('CoCoD-SGD', 8, True):.1f} points to Overlap-Local-SGD at tau = 8.",
        f"Equal within the spread at tau 2 and 24, and {a('CoCoD-SGD', 1) - a(ours, 1):.1f} below at tau 1.",
        f"Label skew costs synchronous SGD {a('sync') - a('sync', skewed=True):.1f} points",
        f"at tau = 8 the three overlapped methods are {below} points below blocking Local SGD (IID), "
        f"{below_skewed} with skew.",
        f"by {between(less(ahead, column_means(ours)))} points against {ours}, with 5 seeds; "
        f"{between(less(_sync(), ahead))} points are left to synchronous SGD.",
        *made_at(),
    ]


def made_at() -> list[str]:
    """Of which commits runs are."""

    def count(study: str, commit: str) -> int:
        return int((frames.read(HERE / study).ended.commit == commit).sum())

    return [
        f"| 9887341f346d | beyond, {count('beyond', '9887341f346d')} runs |",
        f"| 6c33e04c48aa | shakespeare, {count('shakespeare', '6c33e04c48aa')} runs |",
        f"| 05769da97eff | shakespeare, the {count('shakespeare', '05769da97eff')} of OverlapBMUF |",
        f"| 6257c3dffd51 | small, {count('small', '6257c3dffd51')}, and beyond, "
        f"{count('beyond', '6257c3dffd51')}, all of them IID |",
    ]


def few_bits_over_adamw() -> list[str]:
    """What the trials over AdamW show."""
    tried = trials("front")
    tried = tried[tried.model == "gpt-small"]

    def least(label: str) -> float:
        return float(tried[tried.label == label].validation_loss.min())

    best = tried.loc[tried.groupby("label").validation_loss.idxmin()]
    rates = ", ".join(f"{lr:g}" for lr in sorted(best.lr.unique()))
    moved = "GlobalMomentum {}, tau 1, delay 1"
    kept = "OverlapBMUF e3m0+ef, momentum kept, gain 0.5, tau 1, delay 1"
    return [
        f"DDP ends the runs of half the length at {least('DDP'):.2f} nats, `GlobalMomentum` at "
        f"{least(moved.format('e3m0')):.2f} in 4 bits and at {least(moved.format('1bit')):.2f} in 1",
        f"nor the rate, whose best was {rates} for all.",
        f"which bear more, it is {least(kept):.2f}.",
    ]


SENTENCES: dict[str, Callable[[], list[str]]] = {
    "results/README.md": found,
    "results/stragglers/README.md": slow_result,
    "docs/hidden-momentum.md": hidden,
    "docs/stragglers.md": slow,
    "docs/which.md": lambda: [*which_sgd(), *which_adamw(), *slow_choice()],
    "docs/text.md": read_best,
    "docs/front.md": few_bits_over_adamw,
    "docs/elastic.md": churn_costs,
}


def differing(pages: Iterable[Path], *, write: bool = False) -> list[str]:
    """What pages should say, and do not.

    Args:
        pages: those that have tables.
        write: put the tables there.
    """
    left = set(TABLES)
    wrong = []
    for page in pages:
        said = page.read_text(encoding="utf-8")
        for name, old in _MARKED.findall(said):
            if name not in TABLES:
                wrong.append(f"{page}: no table is called {name}")
                continue
            left.discard(name)
            new = TABLES[name]()
            if old.rstrip("\n") != new and write:
                mark = f"<!-- from results: {name} -->\n"
                text = page.read_text(encoding="utf-8")
                page.write_text(text.replace(mark + old, f"{mark}{new}\n"))
            elif old.rstrip("\n") != new:
                wrong.append(f"{page}: the table should be\n{new}")
    return wrong + [f"no page shows the table {name}" for name in sorted(left)]


_MARKED = re.compile(r"^<!-- from results: (.+) -->\n((?:\|.*\n)+)", re.MULTILINE)


def unsaid(root: Path = HERE.parent) -> list[str]:
    """Sentences with numbers that are not in their pages."""
    wrong = []
    for name, made in SENTENCES.items():
        said = " ".join((root / name).read_text(encoding="utf-8").split())
        wrong += [
            f"{name}: should say: {text}" for text in made() if " ".join(text.split()) not in said
        ]
    return wrong


def main() -> int:
    """Compare, or write."""
    wrong = differing(PAGES, write="--write" in sys.argv[1:]) + unsaid()
    print("\n".join(wrong) or "all numbers are those of the CSV files")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
