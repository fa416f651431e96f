"""The link there is, timed: for the planner, by the workers that torchrun started."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from distoptim.comm.link import Link
from distoptim.comm.process_group import ProcessGroupCommunicator
from distoptim.comm.streams import MOST_CHOSEN

SMALL = 2**10
LARGE = 4 * 2**20
"""Elements of the two all-reduces: one shows the latency, both together the rate.

The small one too has a piece for every segment of gloo's ring: of one element alone two workers have the mean
after one round trip, of all other messages after two, n workers after 2 (n-1).
"""

TIMEOUT_S = 600.0

LEAST = 2**18
"""Of a smaller model's all-reduce the rate could not be told."""


@contextlib.contextmanager
def joined(backend: str | None = None) -> Iterator[int]:
    """Be in the process group of the workers that torchrun started; yields the rank.

    Args:
        backend: of torch.distributed; default nccl with a GPU, else gloo.

    Raises:
        ValueError: there is only one worker.
    """
    dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
    if dist.get_world_size() < 2:
        raise ValueError("one worker has no link: allowed are 2 or more")
    yield dist.get_rank()
    # Not where an exception passes: it ends the process, and the peers need not hear of it twice.
    dist.destroy_process_group()


def agree(told: Mapping[str, int], device: torch.device) -> None:
    """See that all workers say the same; collective.

    Raises:
        ValueError: on all workers, if they do not.
    """
    own = torch.tensor(list(told.values()), device=device)
    everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, own)
    for i, name in enumerate(told):
        values = [row[i].item() for row in everybody]
        if len(set(values)) > 1:
            raise ValueError(f"{name}, by rank: {values}; allowed is the same number on all")


def slowest(value: float, device: torch.device) -> float:
    """The largest of the workers' values; collective."""
    largest = torch.tensor([value], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def measure(*, repeats: int, device: torch.device, params: int = LARGE) -> Link:
    """Latency and rate, in the formula of `Link.all_reduce_s`; collective.

    Args:
        repeats: of each all-reduce, after one for warming up; the median counts.
        device: where the buffers are.
        params: of the model, whose mean the larger one is like, from `LEAST` to `LARGE` elements.
    """
    numel = min(max(params, LEAST), LARGE)
    # A single connection of gloo does not show what a long link can carry.
    streams = MOST_CHOSEN if dist.get_backend() == "gloo" and device.type == "cpu" else 1
    communicator = ProcessGroupCommunicator(streams=streams)
    if streams > 1:
        communicator.prepare(4 * numel)
    small = _all_reduce_s(communicator, SMALL, repeats, device)
    large = _all_reduce_s(communicator, numel, repeats, device)
    communicator.close()
    n = dist.get_world_size()
    bits = 2 * (n - 1) / n * (numel - SMALL) * 4 * 8
    return Link(small / (2 * (n - 1)), bits / max(large - small, 1e-9) / 1e9)


def now(device: torch.device) -> float:
    """Seconds on the host's clock, when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _all_reduce_s(
    communicator: ProcessGroupCommunicator, numel: int, repeats: int, device: torch.device
) -> float:
    buffer = torch.ones(numel, device=device)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = now(device)
        communicator.all_reduce(buffer).wait(TIMEOUT_S)
        seconds.append(now(device) - start)
    return slowest(statistics.median(seconds[1:]), device)
