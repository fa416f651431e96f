"""Start a run.

In processes of our own on this machine, or as the rank that somebody else has started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not marked so

from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.loop import Observer, Run
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.processes import Processes
from distoptim_experiments.training.rendezvous import (
    LOOPBACK,
    Rendezvous,
    loopback_interface,
    serve_on_loopback,
)
from distoptim_experiments.training.scalars import TensorBoard, WeightsAndBiases
from distoptim_experiments.training.signals import Stopped, StopSignals, interruptible
from distoptim_experiments.training.world import World, join

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
        wandb: also log to Weights & Biases.
        label: the run's name in tables; default its algorithm.
        keep_checkpoint: leave one at the end, from which more steps can be made.
    """

    config: RunConfig
    folder: Path
    resume: bool = False
    tensorboard: bool = False
    wandb: bool = False
    label: str | None = None
    keep_checkpoint: bool = True


def run_worker(
    job: Job,
    rendezvous: Rendezvous,
    observers: Sequence[Observer] = (),
    *,
    store: Store | None = None,
) -> int:
    """Be one rank, to the end; returns the signal that stopped the run, or 0.

    Args:
        job: what all workers are told.
        rendezvous: where they find each other.
        observers: get every line of the record, on rank 0.
        store: of the rendezvous, if there is a connection already.
    """
    torch.set_num_threads(1)
    with StopSignals() as signals:
        try:
            with signals.raising():
                world = interruptible(lambda: join(rendezvous, job.config, store))
        except Stopped as stopped:
            return stopped.signum
        signum = _run(job, world, signals, observers)
        # Not after an exception: peers may be anywhere, and this process is about to end.
        dist.destroy_process_group()
    return signum


def _run(job: Job, world: World, signals: StopSignals, observers: Sequence[Observer]) -> int:
    observers = list(observers)
    if job.tensorboard and world.seat.rank == 0:
        observers.append(TensorBoard(job.folder / "tensorboard"))
    if job.wandb and world.seat.rank == 0:
        observers.append(WeightsAndBiases(job.folder))
    # Under torchrun every rank has made up a name of its own.
    folder = Path(world.gather(str(job.folder))[0])
    run = Run(
        Processes(Problem(job.config), world, signals),
        folder,
        observers=observers,
        resume=job.resume,
        label=job.label,
        keep_checkpoint=job.keep_checkpoint,
    )
    signum = run.train()
    run.close()
    world.barrier()
    return signum


def run_local(job: Job, observers: Sequence[Observer] = ()) -> int:
    """Run with `config.ranks` processes on this machine; returns the signal that stopped the run,
    or 0.

    SIGINT and SIGTERM are passed on: the workers leave a checkpoint and end. The second one kills
    them. They also end when this process does, however that comes.

    Raises:
        WorkerError: a worker failed; names its rank.
        ValueError: TMPDIR is too long a path to start processes with.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = serve_on_loopback()
    workers: list[tuple[Any, Connection]] = []
    with StopSignals() as signals:
        try:
            for rank in range(job.config.ranks):
                receiver, sender = context.Pipe(duplex=False)
                rendezvous = Rendezvous(LOOPBACK, store.port, rank, job.config.ranks)
                process = context.Process(target=_main, args=(job, rendezvous, sender), daemon=True)
                _start(process)
                sender.close()
                workers.append((process, receiver))
            return _watch(workers, signals, observers, job.config.island_size)
        finally:
            for process, _ in workers:
                process.kill()
                process.join()


def _start(process: Any) -> None:
    try:
        process.start()
    except OSError as error:
        # The server that forks the workers listens on a socket in a temporary folder.
        if "AF_UNIX path too long" not in str(error):
            raise
        raise ValueError(
            f"TMPDIR={tempfile.gettempdir()}: too long for a socket in it; allowed is a path of about "
            "70 characters"
        ) from error


def _watch(
    workers: list[tuple[Any, Connection]],
    signals: StopSignals,
    observers: Sequence[Observer],
    island_size: int,
) -> int:
    """Pass lines on to the observers and signals to the workers, until all workers have ended."""
    pending = {receiver: rank for rank, (_, receiver) in enumerate(workers)}
    signum = 0
    passed_on = 0
    while pending:
        for receiver in wait(list(pending), timeout=0.1):
            assert isinstance(receiver, Connection)
            rank = pending[receiver]
            kind, value = _received(
                receiver, workers[rank][0], name=_name(rank, island_size), told=passed_on
            )
            if kind == "line":
                for observer in observers:
                    observer(value)
            elif kind == "interrupted":
                return int(value)
            else:
                signum = value
                del pending[receiver]
        if signals.received and passed_on:
            return signals.received
        if signals.received:
            passed_on = signals.received
            _pass_on(workers, passed_on)
            # The next one ends them.
            signals.received = 0
    for process, _ in workers:
        process.join(10)
    # One that came when the last workers were about to end, too.
    return signum or signals.received or passed_on


def _received(receiver: Connection, process: Any, *, name: str, told: int) -> tuple[str, Any]:
    """What a worker says.

    Args:
        receiver: from it.
        process: the worker's.
        name: of the worker.
        told: the signal that was passed on, or 0; it may die of it before it can take signals over.

    Raises:
        WorkerError: it has failed, or has died without a word.
    """
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join(5)
        if told and process.exitcode == -told:
            return "interrupted", told
        raise WorkerError(f"{name} died: {_cause(process.exitcode)}") from None
    if kind == "failed":
        raise WorkerError(f"{name} failed: {value}")
    return kind, value


def _pass_on(workers: list[tuple[Any, Connection]], signum: int) -> None:
    for process, _ in workers:
        if process.is_alive():
            os.kill(process.pid, signum)


def _name(rank: int, island_size: int) -> str:
    return f"worker {rank}" if island_size == 1 else f"rank {rank} (worker {rank // island_size})"


def _cause(exitcode: int | None) -> str:
    return (
        signal.Signals(-exitcode).name
        if exitcode is not None and exitcode < 0
        else f"exit code {exitcode}"
    )


def _main(job: Job, rendezvous: Rendezvous, sender: Connection) -> None:
    """A worker process."""
    end_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    try:
        signum = run_worker(job, rendezvous, [lambda line: sender.send(("line", line))])
        sender.send(("ended", signum))
    except KeyboardInterrupt:
        # Before this worker could take signals over: there is nothing to save.
        sender.send(("interrupted", int(signal.SIGINT)))
        os._exit(1)
    except BaseException as error:  # noqa: BLE001  # said by the parent
        # Where the parent has gone, whatever else fails is a consequence, and nobody listens.
        if _parent().is_alive():
            with contextlib.suppress(OSError):
                sender.send(("failed", _told(error, job.folder, rendezvous.rank)))
        # No farewell to the peers: they may wait for this worker in a collective.
        os._exit(1)


def _told(error: BaseException, folder: Path, rank: int) -> str:
    """An error in one line, with the file in which its traceback is."""
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # A full disk may be what is wrong.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"traceback-rank-{rank}.txt"
        path.write_text(traceback.format_exc())
        said += f" ({path})"
    return said


def end_with_parent() -> None:
    """End this process as soon as the one that asked for it has ended, by whatever signal.

    Without a trace: what it wrote is whole at any moment, and its peers end with it. No signal of
    the kernel's would do, since the server that forked this process lives on.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    _parent().join()
    os._exit(1)


def _parent() -> Any:
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that was started by multiprocessing"
    return parent
