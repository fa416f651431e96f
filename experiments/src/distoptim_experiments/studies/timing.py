"""Methods by their timing alone, also such as this library does not have, and what link they need."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from distoptim.algorithms import ALGORITHMS, StreamingDiLoCo
from distoptim_experiments.studies.utilisation import (
    GRID,
    ModelShape,
    TimedMethod,
    first_reaching,
    utilisations,
)

TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
DDP_BUCKET_BYTES = 25 * 2**20
"""From so many bytes of gradients on DistributedDataParallel sends them, by default."""


class Row(TypedDict):
    """One line of the table: what was timed, and the Gbit/s for each target (None.

    More than the grid has).
    """

    params: float
    layers: int
    step_s: float
    fragments: int
    method: str
    payload_bytes: float
    tau: int
    delay: int
    targets: list[float]
    gbit_s: list[float | None]


def layerwise_methods(
    *, tau: int = 100, payload_bytes: float = 4.0, fp4_bytes: float = 0.5
) -> dict[str, TimedMethod]:
    """Data parallel, DiLoCo and Streaming DiLoCo as in a paper: each layer is sent as its backward
    pass ends.

    This library's optimizers send after a whole local step: see `methods`.

    Args:
        tau: local steps in a round of all but the first, which sends after every step; >= 1.
        payload_bytes: bytes per parameter, > 0.
        fp4_bytes: bytes per parameter of the last one, > 0; default half a byte.

    Raises:
        ValueError: a value outside its range.

    Source: arXiv 2501.18512; data parallel as in arXiv 2006.15704 with one bucket a layer.
    """
    delay = min(1, tau)
    made = [
        TimedMethod(name="data-parallel", payload_bytes=payload_bytes, layerwise=True),
        TimedMethod(name="layerwise-diloco", payload_bytes=payload_bytes, tau=tau, layerwise=True),
    ]
    for suffix, nbytes, late in (
        ("", payload_bytes, 0),
        ("-delay1", payload_bytes, delay),
        ("-delay1-fp4", fp4_bytes, delay),
    ):
        made.append(
            TimedMethod(
                name=f"layerwise-streaming-diloco{suffix}",
                payload_bytes=nbytes,
                tau=tau,
                delay=late,
                fragments=None,
                layerwise=True,
            )
        )
    return {method.name: method for method in made}


def methods(*, tau: int = 100, payload_bytes: float = 4.0) -> dict[str, TimedMethod]:
    """The methods of `layerwise_methods`, torch's DDP, and every algorithm of `distoptim.ALGORITHMS` at
    its default delay.

    StreamingDiLoCo is cut into the model's fragments, all others are sent in one.

    Args:
        tau: local steps in a round, >= 1.
        payload_bytes: bytes per parameter, > 0; default 4, the float32 in which this library
            averages.

    Raises:
        ValueError: a value outside its range.
    """
    made = layerwise_methods(tau=tau, payload_bytes=payload_bytes)
    made["ddp"] = TimedMethod(
        name="ddp", payload_bytes=payload_bytes, bucket_bytes=DDP_BUCKET_BYTES
    )
    for name, algorithm in ALGORITHMS.items():
        made[name] = TimedMethod(
            name=name,
            payload_bytes=payload_bytes,
            tau=tau,
            delay=_default_delay(algorithm, tau),
            fragments=None if algorithm is StreamingDiLoCo else 1,
        )
    return made


def table(
    models: Iterable[ModelShape],
    timed: Iterable[TimedMethod],
    targets: Sequence[float] = TARGETS,
    *,
    grid: Sequence[float] = GRID,
    latency_s: float = 0.0,
    workers: int = 2,
) -> list[Row]:
    """For each model and method the first bandwidth of the grid that reaches each utilisation.

    Args:
        models: what is trained.
        timed: the methods.
        targets: utilisations, in (0, 1].
        grid: rising bandwidths in Gbit/s, > 0.
        latency_s: seconds one message takes, >= 0.
        workers: >= 1.

    Raises:
        ValueError: a value outside its range.
    """
    timed = list(timed)
    rows = []
    for model in models:
        for method in timed:
            values = utilisations(model, method, grid, latency_s=latency_s, workers=workers)
            needed = [first_reaching(target, grid, values) for target in targets]
            rows.append(
                Row(
                    params=model.params,
                    layers=model.layers,
                    step_s=model.step_s,
                    fragments=model.fragments,
                    method=method.name,
                    payload_bytes=method.payload_bytes,
                    tau=method.tau,
                    delay=method.delay,
                    targets=list(targets),
                    gbit_s=[x if math.isfinite(x) else None for x in needed],
                )
            )
    return rows


def draw(
    model: ModelShape,
    timed: Iterable[TimedMethod],
    path: str | Path,
    *,
    grid: Sequence[float] = GRID,
    latency_s: float = 0.0,
    workers: int = 2,
) -> None:
    """Write a picture of utilisation against bandwidth; methods with the same timing share a line.

    Args:
        model: what is trained.
        timed: the methods.
        path: of the file, whose ending says the format (png, svg, pdf); its folder is made.
        grid: rising bandwidths in Gbit/s, > 0.
        latency_s: seconds one message takes, >= 0.
        workers: >= 1.

    Raises:
        ValueError: a value outside its range.
    """
    from matplotlib.figure import Figure

    from distoptim_experiments.report.figure import COLOURS, MARKERS, save

    names: dict[TimedMethod, list[str]] = {}
    for method in timed:
        names.setdefault(replace(method, name=""), []).append(method.name)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, (method, same) in enumerate(names.items()):
        values = utilisations(
            model, replace(method, name=same[0]), grid, latency_s=latency_s, workers=workers
        )
        axes.plot(
            grid,
            100 * values,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            markevery=(i % 5, 5),
            linestyle="-" if method.delay else "--",
            label=", ".join(same),
        )
    axes.set_xscale("log")
    axes.set_xlim(min(grid), max(grid))
    axes.set_ylim(0, 103)
    axes.set_yticks(np.arange(0, 101, 20))
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("bandwidth of each worker, Gbit/s")
    axes.set_ylabel("compute utilisation, %")
    axes.set_title(
        f"{model.params:.3g} parameters, {model.layers} layers, {model.step_s:g} s a step, {workers} "
        f"workers, latency {1e3 * latency_s:g} ms; dashed: blocking",
        loc="left",
        fontsize=10,
    )
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    save(figure, Path(path), dpi=150)


def _default_delay(algorithm: Callable[..., Any], tau: int) -> int:
    """An algorithm without the argument `delay` blocks; a default of None means a whole round."""
    parameter = inspect.signature(algorithm).parameters.get("delay")
    if parameter is None:
        return 0
    return min(parameter.default, tau) if isinstance(parameter.default, int) else tau
