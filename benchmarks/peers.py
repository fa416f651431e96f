"""What users would pick instead, over a slow link: milliseconds a step of each. Linux, root.

Two workers in namespaces of their own (`benchmarks.delay_line`), real TCP. A local step is 24 layers that
sleep, a third of it forward and two thirds backward, so that the load of the machine matters little; the
gradients and messages are real. A peer that is not installed is left out with a line that says so.

PowerSGD's hook gets all gradients in one bucket. With two it hangs after some steps: what follows its first message
waits for further ones inside callbacks, in gloo's two threads or the training thread, wherever the first one
happened to end, so that messages are not launched in one order on all workers.

Run: python -m benchmarks.peers [--mbit-s 100] [--rtt-ms 20] [--params 820352] [--step-ms 60]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

import distoptim
from benchmarks import peers_torchft
from benchmarks.delay_line import DelayLine

LAYERS = 24
WIDTH = 64
TAU = 8
ROUNDS = 5
WARM_UP = 2

Train = Callable[[], None]
"""One step: forward, backward, local step, averaging."""


class Sleep(torch.autograd.Function):
    """A layer: sleeps until its forward and its backward pass are due; the parameter gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: float, backward_ends: float) -> Tensor:
        sleep_until(ends)
        ctx.ends = backward_ends
        ctx.like = weight
        return x + weight[0, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        sleep_until(ctx.ends)
        return grad, torch.full_like(ctx.like, 1e-3), None, None


def sleep_until(at: float) -> None:
    """On the clock: what one sleep lasts too long, the next one is shorter."""
    time.sleep(max(0.0, at - time.perf_counter()))


class Sleeper(nn.Module):
    """A model of so many parameters whose step takes so long."""

    def __init__(self, params: int, step_s: float) -> None:
        super().__init__()
        rows = params // LAYERS // WIDTH
        self.weights = nn.ParameterList([torch.zeros(rows, WIDTH) for _ in range(LAYERS)])
        self._step_s = step_s

    def forward(self, x: Tensor) -> Tensor:
        """All layers, one after the other."""
        start = time.perf_counter()
        each_s = self._step_s / (3 * LAYERS)
        for i, weight in enumerate(self.weights):
            backward_ends = start + self._step_s - 2 * i * each_s
            x = Sleep.apply(x, weight, start + (i + 1) * each_s, backward_ends)
        return x


def methods(make: Callable[[], Sleeper]) -> Iterator[tuple[str, Train]]:
    """By name, how each trains; made one after the other."""
    model = make()
    yield "computation alone", stepper(model, adamw(model))
    for name, (hook, options) in HOOKS.items():
        ddp = DistributedDataParallel(make(), **options)
        hook(ddp)
        yield name, stepper(ddp, adamw(ddp))
    model = make()
    averager = PeriodicModelAverager(period=TAU, warmup_steps=0)
    yield "torch PostLocalSGD", stepper(model, PostLocalSGDOptimizer(adamw(model), averager))
    if find_spec("accelerate") is not None:
        yield "accelerate LocalSGD", accelerated(make())
    if find_spec("torchft") is not None:
        yield from peers_torchft.methods(make, adamw, stepper, TAU)
    for name, algorithm, options in OURS:
        model = make()
        optimizer = algorithm(adamw(model), **{"tau": TAU, "module": model, **options})
        yield name, stepper(model, optimizer, optimizer.average)
        optimizer.close()


def fp16(ddp: Any) -> None:
    """Gradients in half the bytes."""
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def power_sgd(ddp: Any) -> None:
    """Gradients as matrices of rank 2."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


HOOKS: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "DDP": (lambda ddp: None, {}),
    "DDP, fp16 hook": (fp16, {}),
    "DDP, PowerSGD hook, rank 2": (power_sgd, {"bucket_cap_mb": 2**40}),
}
"""By name, what is done with a DDP, and its options."""

OURS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("LocalSGD", distoptim.LocalSGD, {}),
    ("OverlapLocalSGD", distoptim.OverlapLocalSGD, {}),
    ("OverlapLocalSGD, int8", distoptim.OverlapLocalSGD, {"codec": "int8"}),
    ("OverlapLocalSGD, e3m0", distoptim.OverlapLocalSGD, {"codec": "e3m0"}),
    ("StreamingDiLoCo, 4 fragments", distoptim.StreamingDiLoCo, {"fragments": 4, "delay": 2}),
    ("GlobalMomentum, every step, e3m0", distoptim.GlobalMomentum, {"tau": 1}),
    ("GlobalMomentum, every step, 1bit", distoptim.GlobalMomentum, {"tau": 1, "codec": "1bit"}),
)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What all step with."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def stepper(model: nn.Module, optimizer: Any, average: Train = lambda: None) -> Train:
    """A training loop's body."""

    def train() -> None:
        model(torch.zeros(1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average()

    return train


def timed(train: Train, steps: int, rounds: int) -> list[float]:
    """Seconds of a step, of each of the rounds of so many steps."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            train()
        found.append((time.perf_counter() - start) / steps)
    return found


def accelerated(model: nn.Module) -> Train:
    """Hugging Face's LocalSGD."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    optimizer = adamw(model)
    prepared = accelerator.prepare_model(model)
    local = LocalSGD(
        accelerator=accelerator, model=prepared, local_sgd_steps=TAU, enabled=True
    ).__enter__()
    inside = stepper(prepared, optimizer, local.step)

    def train() -> None:
        with accelerator.no_sync(prepared):
            inside()

    return train


def worker(params: int, step_s: float) -> None:
    """Rank 0 prints a line of JSON for each method: its fastest round, since what other programs take of
    the processor only adds to it."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, train in methods(lambda: Sleeper(params, step_s)):
        for _ in range(WARM_UP * TAU):
            train()
        dist.barrier()
        cpu = time.process_time()
        rounds = timed(train, TAU, ROUNDS)
        cpu = (time.process_time() - cpu) / (ROUNDS * TAU)
        if dist.get_rank() == 0:
            found = {"method": name, "step_s": min(rounds), "cpu_s": cpu}
            print(json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit-s", type=float, default=100.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--params", type=int, default=820_352)
    parser.add_argument("--step-ms", type=float, default=60.0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.params, given.step_ms / 1e3)
        return
    command = [sys.executable, "-m", "benchmarks.peers", "--worker"]
    command += ["--params", str(given.params), "--step-ms", str(given.step_ms)]
    for package in ("accelerate", "torchft"):
        if find_spec(package) is None:
            print(f"{package} is not installed: its rows are left out\n")
    print("| method | ms a step | without communication | CPU, ms a step | load |")
    print("|---|---|---|---|---|")
    with DelayLine(2, rtt_s=given.rtt_ms / 1e3, gbit_s=given.mbit_s / 1e3) as line:
        first, second = line.start(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        alone = 0.0
        for text in first.stdout or ():
            found = json.loads(text)
            alone = alone or found["step_s"]
            print(
                f"| {found['method']} | {1e3 * found['step_s']:.1f} | {alone / found['step_s']:.0%} | "
                f"{1e3 * found['cpu_s']:.1f} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )
        code = first.wait() or second.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
