"""Streams: means in parts over several groups are those over one, and fail as one."""

from __future__ import annotations

import itertools
import resource
import sys

import pytest
import torch

from distoptim import LocalSGD, OverlapLocalSGD
from distoptim.comm import CommunicationError, Link, ProcessGroupCommunicator, SingleWorker
from distoptim.comm.streams import MOST_CHOSEN, choose, spans
from distoptim.testing.processes import run

SIZE = 30_001


def trained(rank, *, steps=7, **options):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, SIZE))]
    optimizer = OverlapLocalSGD(params, lr=0.1, tau=2, timeout_s=20.0, **options)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        params[0].grad = torch.randn(SIZE, generator=generator)
        optimizer.step()
        optimizer.average()
    optimizer.flush()
    return optimizer, params[0].detach().clone()


def parts_and_failures(rank):
    out = {}
    for codec in (None, "int8"):
        for streams in (1, 3, "auto"):
            optimizer, x = trained(rank, codec=codec, streams=streams)
            out[codec, streams] = x, optimizer.engine.communicator.streams, optimizer.link()
            optimizer.close()
    optimizer, _ = trained(rank, streams=3)
    # One stream's connections go away.
    groups = vars(optimizer.engine.communicator)["_groups"]
    if rank:
        del groups["means 3"]
    try:
        trained_further(optimizer)
    except CommunicationError as error:
        out["failure"] = str(error), dict(groups)
    try:
        trained_further(optimizer)
    except CommunicationError as error:
        out["again"] = str(error)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if rank:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        trained(rank, streams=64)
    except ValueError as error:
        out["refused"] = str(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return out


def trained_further(optimizer):
    (p,) = (p for group in optimizer.param_groups for p in group["params"])
    for _ in range(4):
        p.grad = torch.zeros(SIZE)
        optimizer.step()
        optimizer.average()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts files in /proc")
def test_means_in_parts_are_means_and_fail_as_one():
    results = run(parts_and_failures, 3)
    for result in results:
        for codec in (None, "int8"):
            whole, one, _ = result[codec, 1]
            parts, three, _ = result[codec, 3]
            chosen, auto, link = result[codec, "auto"]
            assert (one, three, auto) == (1, 3, 1)
            assert link == results[0][codec, "auto"][2]
            assert 0 < link.latency_s < 1
            assert torch.equal(whole, chosen)
            # Sums of three floats in another order; codes are added in rank order.
            torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6 if codec is None else 0)
        error, left = result["failure"]
        assert "mean of fragment 0 failed" in error
        assert left == {}
        assert result["again"] == error
        assert (
            "streams=64: the limit of open files of one of the workers allows" in result["refused"]
        )


def test_auto_is_for_large_messages_over_long_links():
    far = Link(0.1, 1.0)
    assert choose(100_000_000, far, 2) == MOST_CHOSEN
    assert choose(4_000_000, far, 2) == 1
    assert choose(100_000_000, Link(0.1, 0.02), 2) == 4
    assert choose(100_000_000, Link(0.001, 10.0), 2) == 1


@pytest.mark.parametrize(("numel", "streams"), [(1, 4), (10, 3), (1_000_000, 8), (7, 7)])
def test_parts_are_the_whole(numel, streams):
    found = spans(numel, 4 * numel, streams, least=0)
    assert found[0].start == 0
    assert found[-1].stop == numel
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    assert len(spans(numel, 4 * numel, streams)) <= max(1, 4 * numel // 2**18)


@pytest.mark.parametrize("streams", [0, 65, "many", 1.5])
def test_numbers_of_streams_that_are_refused(streams):
    with pytest.raises(ValueError, match="streams="):
        LocalSGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, tau=1, streams=streams)


def test_a_communicator_has_its_own_streams():
    params = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="streams=2 beside communicator="):
        LocalSGD(params, lr=0.1, tau=1, streams=2, communicator=SingleWorker())
    with pytest.raises(ValueError, match="streams='x'"):
        ProcessGroupCommunicator(streams="x")


def alone(rank):
    communicator = ProcessGroupCommunicator(streams=2)
    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = LocalSGD(params, lr=0.1, tau=1, communicator=communicator)
    optimizer.average()
    optimizer.close()
    return communicator.link


def test_a_group_of_one_has_no_link_to_measure():
    assert run(alone, 1) == [None]
