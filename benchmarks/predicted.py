"""Does `plan` say what then happens? Probe a link, plan, take its line, train with it, and measure; with
the settings that it is compared with. Linux, root: real TCP over `benchmarks.delay_line`.

A local step sleeps, so that the load of the machine matters little; messages are real. With several
links (RTT in ms:Mbit/s:parameters, behind commas) each is a table.

Run: python -m benchmarks.predicted [--links 20:100:820352] [--step-ms 60] [--inner adamw]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distoptim
from benchmarks.delay_line import DelayLine
from benchmarks.peers import Sleeper, Train, stepper, timed
from distoptim.comm import Link
from distoptim.planning.planner import Job, Plan, Prediction, plan
from distoptim.simulator import Gloo

WORKERS = 2
TAU = 8
ROUNDS = 4
SETTINGS = ("ddp", "local-sgd", "overlap-local-sgd", "streaming-diloco")
CODECS = ("e3m0",)


def prepare() -> tuple[Sleeper, Train]:
    """What `distoptim probe` times: a step of the model that the environment says."""
    model = Sleeper(int(os.environ["PREDICTED_PARAMS"]), float(os.environ["PREDICTED_STEP_S"]))
    return model, stepper(model, sgd(model))


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Cheap, so that a step is what it sleeps."""
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def trainer(setting: dict[str, Any]) -> tuple[Train, Callable[[], object]]:
    """How a predicted setting trains, and how it ends."""
    model, _ = prepare()
    if setting["algorithm"] == "ddp":
        ddp = DistributedDataParallel(model)
        return stepper(ddp, sgd(ddp)), lambda: None  # type: ignore[arg-type]  # a module too
    options = {name: setting[name] for name in ("codec", "fragments") if setting[name]}
    optimizer = distoptim.ALGORITHMS[setting["algorithm"]](
        sgd(model), tau=setting["tau"], module=model, **options
    )
    return stepper(model, optimizer, optimizer.average), optimizer.close


def worker(settings: list[dict[str, Any]]) -> None:
    """Rank 0 prints seconds per step of each setting, a line each."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for setting in settings:
        train, end = trainer(setting)
        steps = max(TAU, setting["tau"])
        for _ in range(2 * steps):
            train()
        dist.barrier()
        rounds = timed(train, steps, ROUNDS)
        if dist.get_rank() == 0:
            print(json.dumps(statistics.mean(rounds)), flush=True)
        end()
        dist.barrier()
    dist.destroy_process_group()


def probed(line: DelayLine, out: Path) -> dict[str, Any]:
    """What `distoptim probe` under torchrun writes."""
    command = (
        f"exec torchrun --nnodes={WORKERS} --nproc-per-node=1 --node-rank=$RANK "
        "--master-addr=$MASTER_ADDR --master-port=29600 "
        f"-m distoptim probe benchmarks.predicted:prepare --out {out}"
    )
    for process in line.start(["sh", "-c", command], stderr=subprocess.DEVNULL):
        process.wait()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def planned(found: dict[str, Any], inner: str) -> tuple[Plan, list[Prediction]]:
    """What the plan recommends, and what it says of the settings."""
    link = Link(found["latency_s"], found["bandwidth_gbit_s"])
    job = Job(found["step_s"], found["params"], found["workers"], Gloo(link))
    made = plan(job, inner=inner)
    others = plan(job, algorithms=SETTINGS[1:], taus=[TAU], codecs=CODECS)
    chosen = [
        made.best,
        *(p for p in others.predictions if p.algorithm != "streaming-diloco" or not p.codec),
    ]
    return made, list(dict.fromkeys(chosen))


def table(rtt_ms: float, mbit_s: float, params: int, step_s: float, inner: str) -> None:
    """One link: the probe, the plan and what was measured."""
    os.environ.update(PREDICTED_PARAMS=str(params), PREDICTED_STEP_S=str(step_s))
    with (
        TemporaryDirectory() as folder,
        DelayLine(WORKERS, rtt_s=rtt_ms / 1e3, gbit_s=mbit_s / 1e3) as line,
    ):
        found = probed(line, Path(folder, "probe.json"))
        made, chosen = planned(found, inner)
        print(
            f"\nRTT {rtt_ms:g} ms, {mbit_s:g} Mbit/s, {4 * params / 1e6:.3g} MB; the probe: a step of "
            f"{1e3 * found['step_s']:.1f} ms, {1e3 * found['latency_s']:.1f} ms, "
            f"{1e3 * found['bandwidth_gbit_s']:.0f} Mbit/s\n\n    {made.line}\n"
        )
        settings = json.dumps([vars(p) for p in chosen])
        command = [sys.executable, "-m", "benchmarks.predicted", "--worker", settings]
        first, _ = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        print("| setting | predicted, ms a step | measured | differs by | load |")
        print("|---" * 5 + "|")
        for prediction, text in zip(chosen, first.stdout or (), strict=False):
            measured = json.loads(text)
            name = f"{prediction.algorithm}, tau {prediction.tau}"
            name += f", {prediction.codec}" if prediction.codec else ""
            name += f", {prediction.fragments} fragments" if prediction.fragments > 1 else ""
            print(
                f"| {name} | {1e3 * prediction.step_s:.1f} | {1e3 * measured:.1f} | "
                f"{prediction.step_s / measured - 1:+.0%} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", default="20:100:820352")
    parser.add_argument("--step-ms", type=float, default=60.0)
    parser.add_argument("--inner", default="adamw")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    for text in given.links.split(","):
        rtt_ms, mbit_s, params = (float(part) for part in text.split(":"))
        table(rtt_ms, mbit_s, int(params), given.step_ms / 1e3, given.inner)


if __name__ == "__main__":
    main()
