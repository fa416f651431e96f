"""Workers that die or stand still, programs that end in the middle of a round, and the harness that sees it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from distoptim import ALGORITHMS, CommunicationError
from distoptim.testing.inspection import inspect
from distoptim.testing.processes import WorkerFailure, free_port, run
from tests.helpers.real import parameters, train

TAU = 4
SHAPES = [(300, 300), (300,)]


def build(name, params, **options):
    return ALGORITHMS[name](params, lr=0.1, momentum=0.9, tau=TAU, **options)


def _survive(rank, victim, signal_number, name, timeout_s):
    """Two rounds of all; then one is gone with the next in flight."""
    params = parameters(0, *SHAPES)
    optimizer = build(name, params, timeout_s=timeout_s)
    train(optimizer, params, 2 * TAU, rank)
    if rank == victim:
        os.kill(os.getpid(), signal_number)
    with pytest.raises(CommunicationError) as caught:
        train(optimizer, params, 3 * TAU, rank)
    # It stays failed, and what there is can be saved.
    with pytest.raises(CommunicationError):
        optimizer.average()
    assert all(torch.isfinite(x).all() for x in [*params, *inspect(optimizer).shared()])
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    optimizer.close()
    optimizer.close()
    return str(caught.value), file.getvalue()


def _resume(rank, name, files):
    saved = torch.load(io.BytesIO(files[rank]), weights_only=True)
    params = [torch.nn.Parameter(torch.zeros_like(p)) for p in saved["model"]]
    optimizer = build(name, params)
    with torch.no_grad():
        torch._foreach_copy_(params, saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = params[0].detach().clone()
    train(optimizer, params, 3 * TAU, rank)
    optimizer.flush()
    with optimizer.averaged():
        mean = params[0].detach().clone()
    optimizer.close()
    return start, mean, optimizer.stats()["syncs"]


@pytest.mark.parametrize(
    ("name", "signal_number", "victim", "backend"),
    [
        ("overlap-local-sgd", signal.SIGKILL, 1, "gloo"),
        ("cocod-sgd", signal.SIGKILL, 0, "gloo"),
        ("overlap-local-sgd", signal.SIGSTOP, 1, "gloo"),
        pytest.param("local-sgd", signal.SIGSTOP, 3, "gloo", marks=pytest.mark.soak),
        ("easgd", signal.SIGKILL, 2, "emulated"),
        pytest.param("easgd", signal.SIGSTOP, 2, "emulated", marks=pytest.mark.soak),
    ],
)
def test_survivors_get_an_error_and_go_on_with_three(name, signal_number, victim, backend):
    """A death is noticed at once, far inside the timeout; a standstill only by it."""
    timeout_s = 5.0 if signal_number == signal.SIGSTOP else 300.0
    results = run(
        _survive,
        4,
        victim,
        signal_number,
        name,
        timeout_s,
        backend=backend,
        expect_exit={victim: -signal_number},
    )
    survivors = [rank for rank in range(4) if rank != victim]
    for rank in survivors:
        message, _ = results[rank]
        assert message.startswith(f"rank {rank}: mean of fragment 0 failed ")
        assert f"s after its launch (timeout {timeout_s:g} s)" in message
        assert "save them" in message
    resumed = run(_resume, 3, name, [results[rank][1] for rank in survivors])
    starts, means, syncs = zip(*resumed, strict=True)
    assert all(torch.equal(means[0], mean) for mean in means)
    assert torch.isfinite(means[0]).all()
    assert all(count >= 2 for count in syncs)
    if name in ("overlap-local-sgd", "easgd"):
        assert all(torch.equal(starts[0], start) for start in starts), "from the anchor"


# The end of a program, of which atexit and the interpreter's teardown are a part. Each program is
# two children of a process that has imported torch: unlike multiprocessing's, they end as a script
# does.

WAYS = [
    *(("gloo", way) for way in ("exit", "destroy", "close and destroy", "raise")),
    *(("emulated", way) for way in ("exit", "destroy")),
]

PROGRAM = """
import gc, json, os, sys, torch, torch._dynamo, torch.distributed as dist, distoptim
from distoptim.testing.inspection import inspect
gc.freeze()  # or every child goes through all of torch at its end, which takes most of its time
me = None
for backend, way, port in json.loads(sys.argv[1]):
    for rank in range(2):
        if me is None and os.fork() == 0:
            me = rank
            break
    if me is not None:
        break
    codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
    print(json.dumps([backend, way, codes]), flush=True)

if me is not None:
    torch.set_num_threads(1)
    if backend == "emulated":
        distoptim.comm.emulate(latency_s=0.02, bandwidth_gbit_s=1.0)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    params = [torch.nn.Parameter(torch.zeros(200_000))]
    optimizer = distoptim.CoCoDSGD(params, lr=0.1, tau=3)
    for _ in range(4):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        optimizer.average()
    assert inspect(optimizer).in_flight
    if "close" in way:
        optimizer.close()
    if "destroy" in way:
        dist.destroy_process_group()
    if "close" in way:
        optimizer.close()
    if way == "raise":
        raise KeyError
    sys.exit(0)
"""


def test_a_program_can_end_with_a_round_in_flight():
    ways = json.dumps([(backend, way, free_port()) for backend, way in WAYS])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, ways],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [[backend, way, [int(way == "raise")] * 2] for backend, way in WAYS]
    assert found == expected, result.stderr


# The harness itself


def _raise(rank):
    if rank == 1:
        raise KeyError("deliberate")
    time.sleep(60)


def _die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _exit_code(rank):
    if rank == 1:
        os._exit(7)


def _hang(rank):
    if rank == 1:
        time.sleep(60)


def _fine(rank, factor):
    return rank * factor


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_raise, "worker 1:\n(.|\n)*KeyError: 'deliberate'"),
        (_die, "worker 1 died with exit code -9"),
        (_exit_code, "worker 1 died with exit code 7"),
    ],
)
def test_the_harness_fails_with_a_worker(fn, message):
    with pytest.raises(WorkerFailure, match=message):
        run(fn, 2)


def test_the_harness_fails_when_a_worker_hangs():
    with pytest.raises(WorkerFailure, match=r"workers \[1\] did not end in time"):
        run(_hang, 2, timeout_s=3)


def test_the_harness_fails_when_a_worker_should_have_died():
    with pytest.raises(WorkerFailure, match="worker 1 ended with exit code 0, expected -9"):
        run(_fine, 2, 1, expect_exit={1: -9})


def test_the_harness_returns_by_rank():
    assert run(_fine, 3, 10) == [0, 10, 20]
