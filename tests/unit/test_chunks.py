"""Work in chunks.

Every element once, beside its counterpart, and algorithms with the same numbers as in one.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distoptim import CO2
from distoptim import chunks as module
from distoptim.algorithms import co2
from distoptim.chunks import chunked
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy

MAKERS = toy.spread()


@pytest.fixture
def cut(monkeypatch):
    """Chunks of at most two numbers where rows allow it."""
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(11),
        torch.arange(12).reshape(4, 3),
        torch.arange(12).reshape(4, 3).T,
        torch.arange(7).reshape(1, 7),
        torch.arange(36).reshape(3, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.tensor(5),
        torch.zeros(0, 3),
        torch.arange(6)[::2],
        torch.arange(3).expand(2, 3),
    ],
    ids=lambda x: str((list(x.shape), x.stride())),
)
def test_every_element_is_in_one_chunk_with_its_counterpart(cut, x):
    other = torch.arange(100, 100 + x.numel()).view(x.shape)
    found = list(chunked(x, other))
    assert [a.shape for a, _ in found] == [b.shape for _, b in found]
    pairs = [
        pair
        for a, b in found
        for pair in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)
    ]
    assert sorted(pairs) == sorted(
        zip(x.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True)
    )


def test_chunks_are_small_views_of_consecutive_memory(cut):
    x = torch.zeros(3, 2, 1, 1).to(memory_format=torch.channels_last)
    found = [part for (part,) in chunked(x)]
    assert [part.data_ptr() - x.data_ptr() for part in found] == [0, 8, 16]
    assert [part.numel() for part in found] == [2, 2, 2]


def test_what_is_small_is_whole():
    x = torch.zeros(1000)
    assert [part.data_ptr() for (part,) in chunked(x)] == [x.data_ptr()]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in toy.spread()),
        *((name, torch.float32) for name in toy.once(1)),
        *((name, torch.bfloat16) for name in toy.once(2)),
    ],
)
def test_no_algorithm_sees_the_chunked(name, dtype, request):
    def trajectory():
        workers = Lockstep(MAKERS[name], [toy.start(dtype)] * toy.WORKERS)
        return workers.run(4 * toy.TAU, toy.gradient)

    whole = trajectory()
    request.getfixturevalue("cut")
    # CO2 has a sum in it, the length of a move; of a bfloat16 the last digit may turn.
    tolerance = (
        {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        if "co2" in name
        else 0
    )
    torch.testing.assert_close(trajectory(), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_co2_moves_alike_whatever_the_number_of_threads(monkeypatch, dtype):
    found = []
    for file in (module, co2):
        monkeypatch.setattr(file, "CHUNK", 2)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        workers = Lockstep(partial(CO2, lr=0.1, tau=2), [toy.start(dtype)] * toy.WORKERS)
        found.append(workers.run(12, toy.gradient))
    assert torch.equal(*found)
