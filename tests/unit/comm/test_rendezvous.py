"""Groups that are made at once ask once for all addresses."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from distoptim.comm.rendezvous import Rendezvous

RANKS = [3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]


class Counted:
    """A store of a worker, whose questions are counted."""

    def __init__(self, store):
        self._store = store
        self.asked = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def multi_get(self, keys):
        self.asked.append(len(keys))
        return self._store.multi_get(keys)


def group(rank, times):
    """What gloo does: tells an address and waits for everybody's; `times` over."""

    def make(store):
        found = []
        for i in range(times):
            store.set(f"{i}/{rank}", f"{rank}")
            for peer in range(len(RANKS)):
                store.wait([f"{i}/{peer}"], timedelta(seconds=20))
                found.append(store.get(f"{i}/{peer}"))
        return found

    return make


def test_all_groups_learn_all_addresses_by_one_question_for_each_address_of_one():
    hashed = dist.HashStore()
    stores = [Counted(hashed) for _ in RANKS]

    def worker(rank):
        rendezvous = Rendezvous(stores[rank], rank, RANKS, timedelta(seconds=20))
        return rendezvous.make({"a": group(rank, 1), "b": group(rank, 2), "c": group(rank, 1)})

    with ThreadPoolExecutor(len(RANKS)) as pool:
        everybody = list(pool.map(worker, range(len(RANKS))))
    addresses = [str(rank).encode() for rank in range(len(RANKS))]
    assert everybody == [{"a": addresses, "b": 2 * addresses, "c": addresses}] * len(RANKS)
    assert [store.asked for store in stores] == [[3 * len(RANKS), len(RANKS)]] * len(RANKS)


def test_who_has_not_come_is_named_and_the_program_s_store_keeps_its_timeout():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=77))
    rendezvous = Rendezvous(store, 0, RANKS[:2], timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match=r"ranks \[5\] have not come"):
        rendezvous.make({"a": group(0, 1), "b": group(0, 1)})
    assert store.timeout == timedelta(seconds=77)


def test_a_connection_that_does_not_end_is_left_alone():
    """As gloo's to a peer that has died after it told its address."""
    forever = threading.Event()
    rendezvous = Rendezvous(dist.HashStore(), 0, RANKS[:1], timedelta(seconds=0.1))
    try:
        with pytest.raises(RuntimeError, match=r"connections are not there after 0\.2 s"):
            rendezvous.make({"a": lambda _: forever.wait(), "b": lambda _: None})
    finally:
        forever.set()
