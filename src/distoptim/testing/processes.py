"""The one harness for real worker processes: gloo over loopback.

A worker's failure fails the test.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

# A bound for what hangs, wide enough for a machine that is busy with other things.
TIMEOUT_S = 300.0
LOOPBACK = "127.0.0.1"

# Imported once, by the server from which the workers are forked. Making any torch optimizer imports
# torch._dynamo, which takes seconds.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "distoptim"]
"""Add what your workers import, before the first `run`."""


class WorkerFailure(AssertionError):
    """A worker raised, died or did not end in time."""


def run(
    fn: Callable[..., Any],
    workers: int,
    *args: Any,
    backend: str | None = "gloo",
    timeout_s: float = TIMEOUT_S,
    expect_exit: dict[int, int] | None = None,
) -> list[Any]:
    """Call fn(rank, *args) in `workers` processes with a process group, and return their results by
    rank.

    Args:
        fn: a function of a test module.
        backend: of the process group; None makes none, and workers find the environment variables
            that torchrun sets.
        expect_exit: rank -> exit code of workers that are meant to die without a result (-9 for
            SIGKILL).
    """
    context = forking()
    expected = expect_exit or {}
    # Kept, so that nobody else gets the port before the workers' store has it.
    listener = None if backend is None else socket.create_server((LOOPBACK, 0))
    port = free_port() if listener is None else listener.getsockname()[1]
    receivers: list[Connection] = []
    processes = []
    for rank in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_main,
            args=(sender, fn, rank, workers, port, backend, args, None if rank else listener),
            daemon=True,
        )
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    if listener is not None:
        listener.close()
    try:
        return _collect(processes, receivers, expected, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def forking() -> ForkServerContext:
    """What workers are forked from: one server, which has imported all of `PRELOAD`."""
    context = multiprocessing.get_context("forkserver")
    # Frozen last, when all the rest is there.
    context.set_forkserver_preload([*PRELOAD, "distoptim.testing.frozen"])
    return context


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def _collect(
    processes: list[Any], receivers: list[Connection], expected: dict[int, int], deadline: float
) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    pending = {r: i for i, r in enumerate(receivers) if i not in expected}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerFailure(f"workers {sorted(pending.values())} did not end in time")
        for receiver in [r for r in pending if r in ready]:
            rank = pending.pop(receiver)
            try:
                failed, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                raise WorkerFailure(
                    f"worker {rank} died with exit code {processes[rank].exitcode}"
                ) from None
            if failed:
                raise WorkerFailure(f"worker {rank}:\n{results[rank]}")
    for rank, process in enumerate(processes):
        code = expected.get(rank, 0)
        if code == -19:
            continue
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode != code:
            raise WorkerFailure(
                f"worker {rank} ended with exit code {process.exitcode}, expected {code}"
            )
    return results


def _main(
    sender: Connection,
    fn: Callable[..., Any],
    rank: int,
    workers: int,
    port: int,
    backend: str | None,
    args: tuple[Any, ...],
    listener: socket.socket | None,
) -> None:
    torch.set_num_threads(1)
    try:
        if backend is None:
            os.environ.update(torchrun_variables(rank, workers, port))
        else:
            _join(backend, rank, workers, port, listener)
        sender.send_bytes(pickle.dumps((False, fn(rank, *args))))
    except BaseException:  # noqa: BLE001  # raised again in the test
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(backend: str, rank: int, workers: int, port: int, listener: socket.socket | None) -> None:
    if backend == "emulated":
        from distoptim.comm import emulate

        emulate(latency_s=0.0, bandwidth_gbit_s=1000.0)
    timeout = timedelta(seconds=TIMEOUT_S - 60)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, not marked so
        LOOPBACK,
        port,
        workers,
        is_master=listener is not None,
        timeout=timeout,
        # The store owns the socket from here on.
        master_listen_fd=None if listener is None else listener.detach(),
        # The other kind takes no socket in torch 2.6.
        use_libuv=False,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=timeout)
    # A worker that is done before another has connected to it would fail that one.
    dist.barrier()


def torchrun_variables(rank: int, workers: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets on one host, without a store of its own."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }
