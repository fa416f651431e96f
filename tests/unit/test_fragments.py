"""What becomes of parameters after the optimizer was made is noticed before anything is sent."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from distoptim import ALGORITHMS, LocalSGD, OverlapLocalSGD
from distoptim.comm import SingleWorker
from tests.helpers.failures import documented
from tests.helpers.toy import alone


class Silent(SingleWorker):
    """Says when something is sent."""

    def __init__(self):
        self.sent = 0

    def all_reduce(self, buffer):
        self.sent += 1
        return super().all_reduce(buffer)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))


def step(module, optimizer):
    dtype = module[1].weight.dtype
    x = torch.ones(2, module[0].in_features, dtype=dtype)
    module(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.average()


def run(module, optimizer, steps):
    for _ in range(steps):
        step(module, optimizer)


def unfreeze(module, optimizer):
    module[0].requires_grad_(True)


def convert(module, optimizer):
    module.double()


def swap(module, optimizer):
    module[1].bias = nn.Parameter(torch.zeros(2))


def extend(module, optimizer):
    module.append(nn.Linear(2, 2))


def extend_a_part(module, optimizer):
    module[1].register_parameter("scale", nn.Parameter(torch.ones(1)))


def rebind(module, optimizer):
    module[1].bias.data = module[1].bias.data[:1]


def add_group(module, optimizer):
    optimizer.inner.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def replace_in_group(module, optimizer):
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(4, 3))


CHANGES = {
    unfreeze: "parameter '0.weight' was unfrozen after the optimizer was made",
    convert: "parameter '1.weight' was torch.float32 [2, 4] on cpu when the optimizer was made and is "
    "torch.float64 [2, 4] on cpu now",
    swap: "parameter '1.bias' was replaced after the optimizer was made",
    extend: "parameter '2.weight' was added after the optimizer was made",
    extend_a_part: "parameter '1.scale' was added after the optimizer was made",
    rebind: "parameter '1.bias' was torch.float32 [2] on cpu when the optimizer was made and is "
    "torch.float32 [1] on cpu now",
    add_group: "parameter \"param_groups[1]['params'][0]\" was added after the optimizer was made",
    # Under the name that the module had for the old one there is still the old one.
    replace_in_group: "parameter \"param_groups[0]['params'][0]\" was added after",
}
OF_GROUPS = (unfreeze, convert, rebind, add_group, replace_in_group)


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("change", [unfreeze, convert], ids=lambda c: c.__name__)
def test_nothing_is_sent_after_a_change(change, algorithm, codec, fragments):
    module, quiet = model(), Silent()
    optimizer = ALGORITHMS[algorithm](
        module.parameters(), lr=0.1, tau=4, fragments=fragments, codec=codec, communicator=quiet
    )
    step(module, optimizer)
    before = quiet.sent
    change(module, optimizer)
    with pytest.raises(ValueError, match=r"was unfrozen|is torch[.]float64"):
        run(module, optimizer, 4)
    assert quiet.sent == before


@pytest.mark.parametrize("named", [True, False], ids=["module", "groups"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_every_change_is_noticed_and_named(change, named):
    module = model()
    optimizer = alone(
        LocalSGD, module.parameters(), lr=0.1, tau=2, module=module if named else None
    )
    step(module, optimizer)
    change(module, optimizer)
    if named or change in OF_GROUPS:
        text = re.escape(CHANGES[change]) if named else 'parameter "param_groups'
        for call in (optimizer.average, optimizer.flush, optimizer.consensus_distance):
            with documented(text):
                call()
        with documented(text), optimizer.averaged():
            pass


def test_what_changes_nothing_of_the_mean_is_no_error():
    module = model()
    optimizer = alone(LocalSGD, module.parameters(), lr=0.1, tau=1, module=module)
    step(module, optimizer)
    # Frozen later: goes on to be averaged; and unfrozen again.
    module[1].bias.requires_grad_(False)
    step(module, optimizer)
    module[1].bias.requires_grad_(True)
    step(module, optimizer)
    module[1].weight.data = module[1].weight.data.clone()
    module[0].weight.data = module[0].weight.data.clone()
    module.add_module("dropout", nn.Dropout())
    module.add_module("adapter", nn.Linear(2, 2).requires_grad_(False))
    step(module, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    step(module, optimizer)
    assert optimizer.stats()["steps"] == 5


def test_what_another_optimizer_trains_is_no_error():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    both = [
        alone(LocalSGD, part.parameters(), lr=0.1, tau=1, module=module)
        for part in module.children()
    ]
    for optimizer in both:
        step(module, optimizer)


def test_frozen_in_mid_run_and_resumed():
    module = model()
    optimizer = alone(OverlapLocalSGD, module.parameters(), lr=0.1, tau=2)
    step(module, optimizer)
    module[1].bias.requires_grad_(False)
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        step(module, optimizer)
    assert optimizer.stats()["syncs"] == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_watch_their_own_module(copied):
    module = model()
    optimizer = alone(LocalSGD, module.parameters(), lr=0.1, tau=1, module=module)
    step(module, optimizer)
    module, optimizer = copied((module, optimizer))
    step(module, optimizer)
    module[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' was unfrozen"):
        step(module, optimizer)
