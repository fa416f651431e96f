"""How soon a language model is as good as after 70 % of DDP's steps, over a slow link. Linux, root, the experiments.

Two workers in namespaces of their own (`benchmarks.delay_line`), real TCP; `distoptim train` with the model
"gpt" and AdamW, a core each. The loss is that of the training batches, of which none comes twice, as the
mean of so many steps as a line of the record has. A run is evaluated once, at its end, on a tenth of the
text, and that takes longer than training if there is much of it.

Run: python -m benchmarks.to_loss FOLDER_OF_TEXT [--mbit-s 100] [--rtt-ms 20] [--steps 160] [--seeds 3] [--lr 3e-3]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from distoptim_experiments import records

from benchmarks.delay_line import DelayLine

METHODS: dict[str, list[str]] = {
    "DDP": ["--algorithm", "ddp"],
    "`GlobalMomentum`, e3m0, every step": ["--algorithm", "global-momentum"],
    "the same, 1 bit": ["--algorithm", "global-momentum", "--codec", "1bit"],
    "`OverlapLocalSGD`, tau 8": ["--algorithm", "overlap-local-sgd", "--tau", "8"],
}
"""By name, what is said of them to `distoptim train`. The first is what the others are held against."""


def trained(line: DelayLine, given: argparse.Namespace, method: str, seed: int) -> records.Record:
    """One run's record."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "distoptim", "train", "--folder", f"{folder}/run"]
        command += ["--data", given.data, "--model", "gpt", "--batch-size", "4"]
        command += ["--optimizer", "adamw", "--clip-norm", "1", "--weight-decay", "0.1"]
        command += ["--lr", str(given.lr), "--warmup-epochs", "0.01", "--seed", str(seed)]
        command += ["--steps", str(given.steps), "--evaluate-every", str(given.steps)]
        command += ["--log-every", str(given.every), *METHODS[method]]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        for process in line.start(command, **quiet):
            _, said = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{method}: {said}")
        return records.read(Path(folder) / "run" / records.FILE)


def seconds_to(record: records.Record, loss: float) -> float:
    """When its loss first was so low, between two lines as on a straight one; infinite if it never was."""
    lines = [(line.seconds, line.loss) for line in record.logs]
    for (before_s, before), (after_s, after) in itertools.pairwise(lines):
        if after <= loss:
            return before_s + (after_s - before_s) * (before - loss) / (before - after)
    return math.inf


def shown(values: list[float]) -> str:
    """Their mean and, of several, how far they are apart."""
    if not all(map(math.isfinite, values)):
        return f"not in {sum(map(math.isinf, values))} of {len(values)}"
    spread = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--mbit-s", type=float, default=100.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(
        "| method | ms a step | exposed, ms | loss at the end | seconds to DDP's at 70 % | load |"
    )
    print("|---|---|---|---|---|---|")
    with DelayLine(2, rtt_s=given.rtt_ms / 1e3, gbit_s=given.mbit_s / 1e3) as line:
        goals: list[float] = []
        for method in METHODS:
            runs = [trained(line, given, method, seed) for seed in range(given.seeds)]
            ends = [run.logs[-1].loss for run in runs]
            goals = goals or [run.logs[int(0.7 * len(run.logs)) - 1].loss for run in runs]
            sums = [run.summary for run in runs if run.summary is not None]
            step_ms = [1e3 * end.seconds / given.steps for end in sums]
            exposed_ms = [1e3 * end.exposed_s / given.steps for end in sums]
            reached_s = [seconds_to(run, goal) for run, goal in zip(runs, goals, strict=True)]
            figures = " | ".join(map(shown, (step_ms, exposed_ms, ends, reached_s)))
            print(f"| {method} | {figures} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
