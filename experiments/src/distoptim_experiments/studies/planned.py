"""What the planner takes from the studies: how far below DDP each algorithm ended, by inner optimizer and tau.

Run from the repository's root, after a study was made anew:
python -m distoptim_experiments.studies.planned
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from distoptim.planning.studied import Studied

STUDIES = ("small", "beyond", "shakespeare")
"""Those in which learning rates were tuned for each method."""

LEAST_SEEDS = 3
TARGET = Path("src/distoptim/planning/studied.py")
_BEGIN = "# fmt: off\nSTUDIED = ("


def table(results: Path) -> list[Studied]:
    """The rows, from results/*/runs.csv: the same data on all workers, no slow-downs.

    Args:
        results: the folder of the studies.
    """
    found = []
    for study in STUDIES:
        runs = pd.read_csv(results / study / "runs.csv")
        final = runs[
            (runs.stage == "final") & (runs.partition == "iid") & (runs.slowdown == "none")
        ]
        synchronous = final[final.algorithm == "ddp"].test_accuracy.mean()
        groups = final[final.algorithm != "ddp"].groupby(
            ["optimizer", "algorithm", "tau", "options"]
        )
        for (inner, algorithm, tau, options), rows in groups:
            if len(rows) >= LEAST_SEEDS:
                below = 100 * (synchronous - rows.test_accuracy)
                found.append(
                    Studied(
                        study,
                        str(inner),
                        str(algorithm),
                        int(tau),
                        round(float(below.mean()), 2),
                        round(float(below.std()), 2),
                        len(rows),
                        float(rows.lr.iloc[0]),
                        "" if options == "{}" else str(options),
                    )
                )
    return found


def source(rows: list[Studied], before: str) -> str:
    """The module with these rows instead of those that it has."""
    lines = [f"    Studied({', '.join(map(_literal, vars(row).values()))}),\n" for row in rows]
    head, _, _ = before.partition(_BEGIN)
    return f"{head}{_BEGIN}\n{''.join(lines)})\n# fmt: on\n"


def _literal(value: object) -> str:
    if not isinstance(value, str):
        return repr(value)
    return f"'{value}'" if '"' in value else f'"{value}"'


if __name__ == "__main__":
    TARGET.write_text(source(table(Path("results")), TARGET.read_text()))
