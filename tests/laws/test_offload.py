"""Buffers in host memory hold the same numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distoptim import LocalSGD
from distoptim.comm import SingleWorker
from distoptim.testing.lockstep import Lockstep
from tests.helpers import toy


def trained(make, dtype):
    lockstep = Lockstep(make, [toy.start(dtype)] * 2)
    start = lockstep.x()
    for _ in range(2 * toy.TAU + 1):
        lockstep.step(toy.gradient)
    assert not torch.equal(lockstep.x(), start)
    return lockstep.x()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_no_number(dtype):
    for name, make in toy.once(int(dtype == torch.float32)).items():
        usual = trained(make, dtype)
        assert torch.equal(trained(partial(make, offload=True), dtype), usual), name


def test_offload_needs_somebody_who_carries_host_memory():
    class NcclAlone(SingleWorker):
        carries_host_memory = False

    params = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="offload=True beside nccl alone"):
        LocalSGD(params, lr=0.1, tau=1, offload=True, communicator=NcclAlone())
    with pytest.raises(ValueError, match="offload='yes'"):
        LocalSGD(params, lr=0.1, tau=1, offload="yes", communicator=SingleWorker())
