"""Start a run.

In processes of our own on this machine, or as the worker that somebody else has started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but not marked so

from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.loop import Observer, Run
from distoptim_experiments.training.world import Meeting, StopSignals, joined

# Imported once, by the server from which the workers are forked; what is not installed is passed
# over. Making any torch optimizer imports torch._dynamo, which takes longer than all the rest.
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "distoptim_experiments.training.launch",
    "sklearn.datasets",
]


class WorkerError(RuntimeError):
    """A worker failed; the others have been ended."""


@dataclass(frozen=True)
class Job:
    """What all workers of a run are told.

    Args:
        config: the run.
        folder: for record, checkpoints and tracebacks.
        resume: go on from the latest checkpoint there.
        tensorboard: also log for TensorBoard, in that folder.
        label: the run's name in tables; default its algorithm.
    """

    config: RunConfig
    folder: Path
    resume: bool = False
    tensorboard: bool = False
    label: str | None = None


def run_worker(
    job: Job, meeting: Meeting, observers: Sequence[Observer] = (), *, store: Store | None = None
) -> int:
    """Be one rank, to the end; returns the signal that stopped the run, or 0.

    Args:
        job: what all workers are told.
        meeting: where they meet.
        observers: get every line of the record, on rank 0.
        store: of the meeting, if there is a connection already.
    """
    torch.set_num_threads(1)
    observers = list(observers)
    if job.tensorboard and meeting.rank == 0:
        # It takes seconds to import, and is an extra.
        from distoptim_experiments.training.tensorboard import TensorBoard

        observers.append(TensorBoard(job.folder / "tensorboard"))
    with StopSignals() as signals, joined(meeting, job.config, store) as world:
        # Under torchrun every rank has made up a name of its own.
        job = replace(job, folder=world.gather(job.folder)[0])
        run = Run(
            job.config, world, job.folder, observers=observers, resume=job.resume, label=job.label
        )
        signum = run.train(signals)
        run.close()
        world.barrier()
    return signum


def run_local(job: Job, observers: Sequence[Observer] = ()) -> int:
    """Run with `config.ranks` processes on this machine; returns the signal that stopped the run,
    or 0.

    SIGINT and SIGTERM are passed on: the workers leave a checkpoint and end. The second one kills
        them.

    Raises:
        WorkerError: a worker failed; names its rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers: list[tuple[Any, Connection]] = []
    with StopSignals() as signals:
        try:
            for rank in range(job.config.ranks):
                receiver, sender = context.Pipe(duplex=False)
                meeting = Meeting("127.0.0.1", store.port, rank, job.config.ranks)
                process = context.Process(target=_main, args=(job, meeting, sender), daemon=True)
                process.start()
                sender.close()
                workers.append((process, receiver))
            return _watch(workers, signals, observers, job.config.island_size)
        finally:
            for process, _ in workers:
                process.kill()
                process.join()


def _watch(
    workers: list[tuple[Any, Connection]],
    signals: StopSignals,
    observers: Sequence[Observer],
    island_size: int,
) -> int:
    """Pass lines on to the observers and signals to the workers, until all workers have ended."""
    pending = {receiver: rank for rank, (_, receiver) in enumerate(workers)}
    signum = passed_on = 0
    while pending:
        for receiver in wait(list(pending), timeout=0.1):
            assert isinstance(receiver, Connection)
            rank = pending[receiver]
            try:
                kind, value = receiver.recv()
            except EOFError:
                workers[rank][0].join(5)
                raise WorkerError(
                    f"{_name(rank, island_size)} died: {_cause(workers[rank][0].exitcode)}"
                ) from None
            if kind == "line":
                for observer in observers:
                    observer(value)
            elif kind == "failed":
                raise WorkerError(f"{_name(rank, island_size)} failed: {value}")
            elif kind == "interrupted":
                return int(value)
            else:
                signum = value
                del pending[receiver]
        if signals.received and not passed_on:
            passed_on, signals.received = signals.received, 0
            for process, _ in workers:
                if process.is_alive():
                    os.kill(process.pid, passed_on)
        elif signals.received:
            return signals.received
    for process, _ in workers:
        process.join(10)
    return signum


def _name(rank: int, island_size: int) -> str:
    return f"worker {rank}" if island_size == 1 else f"rank {rank} (worker {rank // island_size})"


def _cause(exitcode: int | None) -> str:
    return (
        signal.Signals(-exitcode).name
        if exitcode is not None and exitcode < 0
        else f"exit code {exitcode}"
    )


def _main(job: Job, meeting: Meeting, sender: Connection) -> None:
    """A worker process."""
    try:
        signum = run_worker(job, meeting, [lambda line: sender.send(("line", line))])
        sender.send(("ended", signum))
    except KeyboardInterrupt:
        # Before this worker could take signals over: there is nothing to save.
        sender.send(("interrupted", int(signal.SIGINT)))
        os._exit(1)
    except BaseException as error:  # noqa: BLE001  # said by the parent
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        # A full disk may be what is wrong.
        with contextlib.suppress(OSError):
            job.folder.mkdir(parents=True, exist_ok=True)
            path = job.folder / f"traceback-rank-{meeting.rank}.txt"
            path.write_text(traceback.format_exc())
            said += f" ({path})"
        sender.send(("failed", said))
        # No farewell to the peers: they may wait for this worker in a collective.
        os._exit(1)
