"""Does `plan` say what then happens? Probe a link, plan, take its line, train with it, and measure; with
the settings that it is compared with. Linux, root: real TCP over `benchmarks.delay_line`.

A local step sleeps, so that the load of the machine matters little; messages are real. With several
links (RTT in ms:Mbit/s:parameters, behind commas) each is a table. With more workers than cores the
figures are bound by the processor, and marked so.

On a machine that is busy with other things the probe finds these, too; `--known` predicts for the step and
the link as they are set.

Run: python -m benchmarks.predicted [--known] [--links 20:100:820352] [--workers 2] [--codecs e3m0] [--streams auto]
    [--step-ms 60] [--inner adamw]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
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

TAU = 8
ROUNDS = 5
SETTINGS = ("ddp", "local-sgd", "overlap-local-sgd", "streaming-diloco")

Setting = tuple[Prediction, int | str]
"""What is predicted, and on how many streams."""


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
    options = {name: setting[name] for name in ("codec", "fragments", "streams") if setting[name]}
    optimizer = distoptim.ALGORITHMS[setting["algorithm"]](
        sgd(model), tau=setting["tau"], module=model, **options
    )
    return stepper(model, optimizer, optimizer.average), optimizer.close


def worker(settings: list[dict[str, Any]]) -> None:
    """Rank 0 prints seconds per step of each setting's fastest round, a line each: what other programs
    take of the processor only adds to it."""
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
            print(json.dumps(min(rounds)), flush=True)
        end()
        dist.barrier()
    dist.destroy_process_group()


def probed(line: DelayLine, out: Path) -> dict[str, Any]:
    """What `distoptim probe` under torchrun writes."""
    command = (
        f"exec torchrun --nnodes={line.hosts} --nproc-per-node=1 --node-rank=$RANK "
        "--master-addr=$MASTER_ADDR --master-port=29600 "
        f"-m distoptim probe benchmarks.predicted:prepare --out {out}"
    )
    for process in line.start(["sh", "-c", command], stderr=subprocess.DEVNULL):
        process.wait()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def known(rtt_ms: float, mbit_s: float, params: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a probe would find where nothing else takes time."""
    return {
        "step_s": given.step_ms / 1e3,
        "params": params,
        "workers": given.workers,
        "latency_s": rtt_ms / 1e3,
        "bandwidth_gbit_s": mbit_s / 1e3,
    }


def planned(found: dict[str, Any], given: argparse.Namespace) -> tuple[Plan, list[Setting]]:
    """What the plan recommends, and what it says of the settings."""
    link = Link(found["latency_s"], found["bandwidth_gbit_s"])
    job = Job(found["step_s"], found["params"], found["workers"], Gloo(link))
    made = plan(job, inner=given.inner)
    settings: list[Setting] = [(made.best, "auto")]
    for text in given.streams.split(","):
        streams = int(text) if text.isdecimal() else text
        others = plan(
            replace(job, network=Gloo(link, streams)),
            algorithms=SETTINGS[1:],
            taus=[TAU],
            codecs=[codec for codec in given.codecs.split(",") if codec],
        )
        settings += [
            (p, streams)
            for p in others.predictions
            if p.algorithm != "streaming-diloco" or not p.codec
        ]
    # DDP knows no streams.
    return made, list({(p, p.algorithm == "ddp" or s): (p, s) for p, s in settings}.values())


def named(prediction: Prediction, streams: int | str) -> str:
    """A row's name."""
    name = f"{prediction.algorithm}, tau {prediction.tau}"
    name += f", {prediction.codec}" if prediction.codec else ""
    name += f", {prediction.fragments} fragments" if prediction.fragments > 1 else ""
    known_to_all = streams == "auto" or prediction.algorithm == "ddp"
    return name if known_to_all else f"{name}, streams {streams}"


def table(rtt_ms: float, mbit_s: float, params: int, given: argparse.Namespace) -> None:
    """One link: the probe, the plan and what was measured."""
    os.environ.update(PREDICTED_PARAMS=str(params), PREDICTED_STEP_S=str(given.step_ms / 1e3))
    with (
        TemporaryDirectory() as folder,
        DelayLine(given.workers, rtt_s=rtt_ms / 1e3, gbit_s=mbit_s / 1e3) as line,
    ):
        found = known(rtt_ms, mbit_s, params, given)
        if not given.known:
            found = probed(line, Path(folder, "probe.json"))
        made, settings = planned(found, given)
        bound = ", bound by the processor" if given.workers > (os.cpu_count() or 1) else ""
        print(
            f"\nRTT {rtt_ms:g} ms, {mbit_s:g} Mbit/s, {4 * params / 1e6:.3g} MB, {given.workers} workers{bound}; "
            f"{'known' if given.known else 'the probe'}: a step of {1e3 * found['step_s']:.1f} ms, {1e3 * found['latency_s']:.1f} ms, "
            f"{1e3 * found['bandwidth_gbit_s']:.0f} Mbit/s\n\n    {made.line}\n"
        )
        told = json.dumps([{**vars(p), "streams": streams} for p, streams in settings])
        command = [sys.executable, "-m", "benchmarks.predicted", "--worker", told]
        first, *_ = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        print("| setting | predicted, ms a step | measured | differs by | load |")
        print("|---" * 5 + "|")
        for setting, text in zip(settings, first.stdout or (), strict=False):
            measured = json.loads(text)
            step_s = setting[0].step_s
            print(
                f"| {named(*setting)} | {1e3 * step_s:.1f} | {1e3 * measured:.1f} | "
                f"{step_s / measured - 1:+.0%} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", default="20:100:820352")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--codecs", default="e3m0")
    parser.add_argument("--streams", default="auto")
    parser.add_argument("--step-ms", type=float, default=60.0)
    parser.add_argument("--inner", default="adamw")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    for text in given.links.split(","):
        rtt_ms, mbit_s, params = (float(part) for part in text.split(":"))
        table(rtt_ms, mbit_s, int(params), given)


if __name__ == "__main__":
    main()
