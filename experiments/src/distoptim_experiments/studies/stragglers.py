"""Do random slow-downs cost less when nobody waits? Time per round against the number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import integrate, special, stats

from distoptim.algorithms import ALGORITHMS
from distoptim.simulator.cluster import Cluster
from distoptim.simulator.compute import Compute, Pareto, ShiftedExponential

WORKERS = (4, 16, 64, 256, 1024)

TIMED: dict[str, tuple[str, int | None]] = {
    "synchronous": ("local-sgd", 1),
    "Local SGD": ("local-sgd", None),
    "EASGD": ("easgd", None),
    "Overlap-Local-SGD": ("overlap-local-sgd", None),
}
"""Name in the picture -> (algorithm, its own tau or None for the study's)."""


@dataclass(frozen=True)
class Curve:
    """Seconds per tau local steps of one method.

    Attributes:
        method: its name.
        simulated: seconds, one per number of workers.
        closed_form: the same from theory, where there is one.
    """

    method: str
    simulated: list[float]
    closed_form: list[float] | None


def study(
    compute: ShiftedExponential | Pareto,
    *,
    tau: int = 8,
    workers: Sequence[int] = WORKERS,
    rounds: int = 40,
) -> list[Curve]:
    """Time a round of every method on workers whose steps take random time, communication taking
    none.

    Args:
        compute: the distribution of a local step's time.
        tau: local steps in a round, >= 1; the synchronous method waits after each of them.
        workers: numbers of workers.
        rounds: measured, after a fifth as many for the start to be forgotten.
    """
    curves = []
    for method, (algorithm, own_tau) in TIMED.items():
        seconds = [_round_s(algorithm, own_tau or tau, tau, m, compute, rounds) for m in workers]
        theory = None
        if algorithm == "local-sgd":
            theory = [
                tau / (own_tau or tau) * expected_maximum(compute, m, own_tau or tau)
                for m in workers
            ]
        curves.append(Curve(method, seconds, theory))
    return curves


def _round_s(
    algorithm: str, own_tau: int, tau: int, workers: int, compute: Compute, rounds: int
) -> float:
    cluster = Cluster(
        workers=workers,
        model=lambda: torch.nn.Linear(1, 1, bias=False),
        compute=compute,
        threads=1,
        optimizer=lambda params, communicator: ALGORITHMS[algorithm](
            params, tau=own_tau, lr=0.0, communicator=communicator
        ),
    )
    cluster.advance(rounds // 5 * tau)
    start = cluster.seconds()
    cluster.advance(rounds * tau)
    return (cluster.seconds() - start) / rounds


def expected_maximum(compute: ShiftedExponential | Pareto, workers: int, steps: int) -> float:
    """E[max over the workers of the sum of `steps` step times]: how long all wait for the slowest.

    The sum of exponentials is Erlang, E[max] = integral of 1 - F(t)^m. A sum of Pareto variables
    has no closed form; for one step E[max] = scale m B(m, 1 - 1/shape), else the Monte Carlo mean
    of 2,000 maxima.

    Args:
        compute: the distribution of one step.
        workers: m, >= 1.
        steps: in the sum, >= 1.
    """
    if isinstance(compute, ShiftedExponential):
        erlang = stats.erlang(steps)
        # The integrand is 1, then falls to 0 within a few units: in one piece quad would overlook that.
        ends = [0.0, *erlang.ppf([0.5 ** (1 / workers), 1 - 1e-3 / workers]), np.inf]
        parts = [
            integrate.quad(lambda t: -np.expm1(workers * erlang.logcdf(t)), low, high)[0]
            for low, high in itertools.pairwise(ends)
        ]
        return float(steps * compute.shift_s + compute.mean_s * sum(parts))
    if steps == 1:
        return float(compute.scale_s * workers * special.beta(workers, 1 - 1 / compute.shape))
    slow = stats.pareto(compute.shape, scale=compute.scale_s)
    draws = np.random.default_rng(compute.seed + 1)
    maxima = [slow.rvs((workers, steps), random_state=draws).sum(1).max() for _ in range(2000)]
    return float(np.mean(maxima))


def draw(
    panels: Mapping[str, Sequence[Curve]], path: str | Path, *, workers: Sequence[int] = WORKERS
) -> None:
    """A picture with one panel per distribution: points simulated, dashed lines from theory.

    Args:
        panels: title -> the curves of `study`.
        path: where to write it, as the format that its suffix names.
        workers: the numbers of workers studied.
    """
    import matplotlib.pyplot as plt

    colors = ["#D55E00", "#E69F00", "#009E73", "#0072B2"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for curve, color, marker in zip(curves, colors, "osD^", strict=True):
            axis.plot(
                workers,
                curve.simulated,
                color=color,
                marker=marker,
                markersize=6,
                label=curve.method,
            )
            if curve.closed_form is not None:
                axis.plot(workers, curve.closed_form, color="black", linestyle="--", linewidth=1)
        axis.plot([], [], color="black", linestyle="--", linewidth=1, label="expected maximum")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(workers), [str(m) for m in workers])
        axis.set_xlabel("workers")
        axis.set_ylim(bottom=0)
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds per round")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, facecolor="white", dpi=130)
    plt.close(figure)
