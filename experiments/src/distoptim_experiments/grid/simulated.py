"""Many simulated runs: all combinations, on all cores, each once, resumable."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from distoptim_experiments.config import RunConfig, compared
from distoptim_experiments.grid.ended import Ended
from distoptim_experiments.machines import Machines
from distoptim_experiments.optimizers import check
from distoptim_experiments.training.launch import PRELOAD, end_with_parent
from distoptim_experiments.training.virtual import run


def combinations(
    config: RunConfig,
    axes: Mapping[str, Sequence[Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[RunConfig]:
    """`config` once per combination of the axes' values; synchronous SGD once for all tau.

    Args:
        config: what they have in common.
        axes: name of a field of the configuration -> its values.
        options: algorithm -> its own options, instead of the configuration's.

    Raises:
        ValueError: a value outside its range.
    """
    found: dict[str, RunConfig] = {}
    for values in itertools.product(*axes.values()):
        fields = {**config.to_dict(), **dict(zip(axes, values, strict=True))}
        made = compared(
            {**fields, **({} if options is None else {"options": options[fields["algorithm"]]})}
        )
        if made.synchronous:
            made = made.replace(tau=1)
        found.setdefault(name(made, Machines()), check(made))
    return list(found.values())


_YOUNGER = ("speeds", "streams", "churn", "lose_every_s", "away_s", "heartbeat_s")
"""Fields of `Machines` that the first finished grids do not have; left out at their defaults."""

_NAMED_BEFORE = {
    "site_size": "island",
    "site_latency_ms": "island_latency_ms",
    "site_bandwidth_gbit_s": "island_bandwidth_gbit_s",
}
"""Fields of `Machines` that had other names then."""


def name(config: RunConfig, machines: Machines | None) -> str:
    """A folder's name: readable, and different for every different run, wherever its data are.

    None: real machines.
    """
    # Fields at their default are left out, so that a new field does not make every finished run
    # another one.
    plain = RunConfig().to_dict()
    changed = {
        key: value
        for key, value in config.replace(data_dir=None).to_dict().items()
        if value != plain[key]
    }
    usual = Machines().to_dict()
    described = machines and {
        _NAMED_BEFORE.get(key, key): value
        for key, value in machines.to_dict().items()
        if key not in _YOUNGER or value != usual[key]
    }
    text = json.dumps([changed, described], sort_keys=True)
    short = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{config.algorithm}-tau{config.tau}-m{config.workers}-seed{config.seed}-{short}"


def run_all(
    configs: Sequence[RunConfig],
    machines: Machines,
    folder: Path,
    *,
    processes: int | None = None,
    done: Callable[[int, int], object] = lambda finished, total: None,
    labels: Sequence[str] | None = None,
    ended: Ended | None = None,
    another: Callable[[], bool] = lambda: True,
) -> list[Path]:
    """Run what has not ended yet; returns all records' folders, in order.

    An interruption loses what runs have made since their last epoch; the next call goes on from
    there.

    Args:
        configs: the runs.
        machines: the virtual machines, the same for all.
        folder: of the grid.
        processes: runs at the same time; default one per core, or one with all cores if only one
            run is left.
        done: told (finished, total) at the start and after every run.
        labels: the runs' names for their records, where the algorithm's is not enough.
        ended: what has ended; default what `folder` says of them.
        another: whether another run may begin.
    """
    folders = [folder / name(config, machines) for config in configs]
    names = labels or [config.algorithm for config in configs]
    ended = Ended(folder) if ended is None else ended
    left = [run for run in zip(configs, folders, names, strict=True) if run[1] not in ended]
    done(len(configs) - len(left), len(configs))
    if len(left) == 1 or processes == 1:
        for i, (config, target, label) in enumerate(left, 1):
            if not another():
                break
            _run(config, machines, target, label=label)
            done(len(configs) - len(left) + i, len(configs))
    else:
        several = _in_processes(left, machines, processes or os.cpu_count() or 1, another)
        for i, _ in enumerate(several, 1):
            done(len(configs) - len(left) + i, len(configs))
    return folders


def _run(config: RunConfig, machines: Machines, folder: Path, **options: Any) -> None:
    run(config, machines, folder, **options)
    # Its workers, with their data, refer to each other: without this they stay for dozens of runs.
    gc.collect()


def _in_processes(
    left: Sequence[tuple[RunConfig, Path, str]],
    machines: Machines,
    processes: int,
    another: Callable[[], bool],
) -> Iterator[None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        waiting = list(reversed(left))
        pending: set[Future[None]] = set()
        try:
            while True:
                while waiting and len(pending) < processes and another():
                    config, target, label = waiting.pop()
                    pending.add(pool.submit(_run, config, machines, target, label=label, threads=1))
                if not pending:
                    return
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """In a process of the pool: one thread computes, and nothing outlives whoever asked for it,
    however that ended.

    The next call goes on with the same runs, and would meet whoever still writes their records.
    """
    torch.set_num_threads(1)
    end_with_parent()
