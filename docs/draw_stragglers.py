"""Draw stragglers.png and print its numbers: time per round under random slow-downs, 4 to 1,024
virtual workers.

Run: python docs/draw_stragglers.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from distoptim_experiments.machines import PARETO_SHAPE, pareto
from distoptim_experiments.studies.stragglers import WORKERS, Curve, draw, study

from distoptim.simulator import ShiftedExponential

TAU = 8
PANELS = {
    "half fixed, half exponential (mean 1 s)": ShiftedExponential(0.5, 0.5),
    f"Pareto, shape {PARETO_SHAPE} (mean 1 s)": pareto(1.0, seed=0),
}


def rows(title: str, curves: list[Curve]) -> list[str]:
    """A Markdown table."""
    lines = [
        f"{title}",
        "",
        "| method | " + " | ".join(f"m = {m:,}" for m in WORKERS) + " |",
        "|---" * (len(WORKERS) + 1) + "|",
    ]
    for curve in curves:
        lines.append(
            f"| {curve.method} | " + " | ".join(f"{s:.1f}" for s in curve.simulated) + " |"
        )
        if curve.closed_form is not None:
            lines.append(
                "| *expected maximum* | "
                + " | ".join(f"*{s:.1f}*" for s in curve.closed_form)
                + " |"
            )
    return [*lines, ""]


def main() -> None:
    """Simulate, print, draw."""
    torch.set_num_threads(1)
    panels = {title: study(compute, tau=TAU) for title, compute in PANELS.items()}
    for title, curves in panels.items():
        print("\n".join(rows(title, curves)))
    draw(panels, Path(__file__).with_name("stragglers.png"))


if __name__ == "__main__":
    main()
