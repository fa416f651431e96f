"""Folders of records made up for the tests: every figure is known."""

from __future__ import annotations

import json
import math

METHODS = {
    "sync": "ddp",
    "Local SGD": "local-sgd",
    "CoCoD-SGD": "cocod-sgd",
    "Overlap-Local-SGD": "overlap-local-sgd",
}


def lines(
    *,
    label="Local SGD",
    tau=2,
    seed=0,
    partition="iid",
    lr=0.1,
    accuracy=0.9,
    diverged=False,
    slowdown="none",
    seconds=6.0,
    exposed=0.5,
    **config,
):
    start = {
        "kind": "start",
        "step": 0,
        "label": label,
        "config": {
            "algorithm": METHODS[label],
            "tau": tau,
            "seed": seed,
            "partition": partition,
            "lr": lr,
            "options": {},
            "data": "fashion-mnist",
            "model": "cnn-small",
            "workers": 16,
            **config,
        },
        "machines": {"step_ms": 30.0, "slowdown": slowdown, "trace": None},
        "surroundings": {
            "date": f"2026-11-24T10:0{seed}:00.000+00:00",
            "distoptim": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11",
            "commit": "0123456789ab",
            "machine": {"cores": 2, "processor": "some <CPU>", "system": "Linux"},
        },
        "steps": 200,
        "steps_per_epoch": 40,
        "parameters": 1000,
    }
    last = 2 if diverged else 20
    seconds, exposed = seconds * last / 20, exposed * last / 20
    logs = [
        {
            "kind": "log",
            "step": 10 * i,
            "epoch": i / 4,
            "seconds": seconds * i / last,
            "loss": math.nan if diverged and i == last else 2.3 * math.exp(-i / 8),
        }
        for i in range(1, last + 1)
    ]
    score = {
        "test_loss": 3.0 if diverged else 0.3,
        "test_accuracy": accuracy,
        "worker_accuracy": accuracy - 0.1,
        "validation_accuracy": accuracy + 0.01,
    }
    summary = {
        "kind": "summary",
        "step": 10 * last,
        **score,
        "diverged": diverged,
        "seconds": seconds,
        "exposed_s": exposed,
        "overhead_s": 0.0,
        "hidden_s": 0.0,
        "bytes": 1000,
        "syncs": 9,
    }
    evaluation = {
        "kind": "evaluation",
        "step": 10 * last,
        "epoch": last / 4,
        "seconds": seconds,
        **score,
    }
    return [start, *logs, evaluation, summary]


def put(folder, name, made):
    """Write a record; returns its path."""
    path = folder / name / "record.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


def grid(
    folder, *, taus=(2, 8), partitions=("iid", "label-skew"), seeds=(0, 1, 2), slowdowns=("none",)
):
    """Methods x tau x partition x seed; CoCoD-SGD diverges under label skew at tau 8."""
    for k, label in enumerate(METHODS):
        for tau in (1,) if label == "sync" else taus:
            for p, partition in enumerate(partitions):
                for seed in seeds:
                    for slow in slowdowns:
                        made = lines(
                            label=label,
                            tau=tau,
                            partition=partition,
                            seed=seed,
                            slowdown=slow,
                            accuracy=0.9 + 0.01 * k - 0.005 * tau * (p + 1) + 0.002 * seed,
                            diverged=label == "CoCoD-SGD" and p == 1 and tau == 8,
                            exposed=[1.8, 1.2 / tau, 0.1 / tau, 0.01][k],
                            seconds=(6.0 if slow == "none" else 7.0 + 1 / tau)
                            + [1.8, 1.2 / tau, 0.1 / tau, 0.01][k],
                        )
                        put(
                            folder / "final",
                            f"{METHODS[label]}-{tau}-{partition}-{seed}-{slow}",
                            made,
                        )
