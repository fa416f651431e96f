"""Control data between real workers: any length, differences named by all, bounded waits, no groups in mid-training."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distoptim import OverlapLocalSGD
from distoptim.comm import CommunicationError, ProcessGroupCommunicator
from distoptim.comm.control import CHUNK_BYTES
from distoptim.testing.processes import run


def _messages(rank: int) -> list[Any]:
    communicator = ProcessGroupCommunicator()
    out = [
        communicator.all_gather_json({"rank": rank, "text": "ä" * (rank * length)}, what="a test")
        for length in (0, 1, CHUNK_BYTES // 2, 100_000)
    ]
    out.append(communicator.all_gather_json((rank, None, [True, 0.1, "x"], {"a": ()}, math.nan)))
    # Around the size of a chunk, where the text ends with it.
    for size in range(CHUNK_BYTES - 24, CHUNK_BYTES + 4):
        assert communicator.all_gather_json("x" * size if rank else "") == [
            "",
            "x" * size,
            "x" * size,
        ]
    communicator.close()
    return out


def test_messages_of_any_length_come_back_in_rank_order():
    for result in run(_messages, 3):
        for length, messages in zip((0, 1, CHUNK_BYTES // 2, 100_000), result, strict=False):
            assert messages == [{"rank": r, "text": "ä" * (r * length)} for r in range(3)]
        for rank, (first, *rest, number) in enumerate(result[-1]):
            assert first == rank
            assert rest == [None, [True, 0.1, "x"], {"a": []}]
            assert math.isnan(number)


def _calls(rank: int) -> tuple[str, list[object]]:
    communicator = ProcessGroupCommunicator()
    call = "load_state_dict()" if rank == 1 else "averaged()"
    with pytest.raises(CommunicationError) as caught:
        communicator.all_gather_json("x" * 9000 * rank, what=call)
    after = communicator.all_gather_json(rank, what="flush()")
    communicator.close()
    return str(caught.value), after


def test_workers_in_different_calls_are_told_so_on_all():
    for message, after in run(_calls, 3):
        assert message == (
            "workers are in different calls: rank 0 is in averaged(), rank 1 is in load_state_dict()"
        )
        assert after == [0, 1, 2]


def _absent(rank: int) -> list[str]:
    communicator = ProcessGroupCommunicator(timeout_s=2.0)
    out = []
    if rank != 1:
        with pytest.raises(CommunicationError) as caught:
            communicator.all_gather_json(rank, what="averaged()")
        out.append(str(caught.value))
        with pytest.raises(CommunicationError, match="closed"):
            communicator.all_reduce(torch.zeros(1))
    # Rank 1 comes here only, where nobody gets before having given up.
    dist.barrier()
    communicator.close()
    return out


def test_a_worker_that_does_not_come_is_an_error_with_the_call_and_the_limit():
    results = run(_absent, 3)
    for rank in (0, 2):
        assert results[rank][0].startswith(f"rank {rank}: averaged() (timeout 2 s) failed after ")


def _no_partner(rank: int) -> str:
    if rank == 0:
        with pytest.raises(CommunicationError) as caught:
            ProcessGroupCommunicator(timeout_s=2.0)
        message = str(caught.value)
    dist.barrier()
    return message if rank == 0 else ""


def test_nobody_waits_longer_for_a_communicator_that_others_do_not_make():
    assert run(_no_partner, 2)[0].startswith("rank 0: the making of groups (timeout 2 s) failed")


def _groups(rank: int) -> int:
    """Every kind of message there is, over groups that are there from the start."""
    params = [torch.nn.Parameter(torch.zeros(3000))]
    optimizer = OverlapLocalSGD(params, lr=0.1, tau=2, codec="int8")
    with mock.patch.object(dist, "new_group", side_effect=AssertionError("in mid-training")):
        for _ in range(5):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
            optimizer.average()
        with optimizer.averaged():
            pass
        optimizer.consensus_distance()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.flush()
    optimizer.close()
    return int(optimizer.stats()["syncs"])


@pytest.mark.parametrize("backend", ["gloo", "emulated"])
def test_no_group_is_made_after_the_start(backend):
    assert run(_groups, 3, backend=backend) == [4, 4, 4], "rounds 0 to 2, and the flush"
