"""What of a module is a statistic, a worker's own, or must be equal."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import distoptim
from distoptim.module_state import differences, digest, look, parts_of
from distoptim.spectral_norm import normalised, recompute_weights


class Holder(nn.Module):
    """Buffers of many kinds."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def kinds(module):
    parts = parts_of([module], ())
    return list(parts.statistics), list(parts.equal), list(parts.trained)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norms_have_statistics(norm):
    assert kinds(nn.Sequential(norm)) == (
        ["0.running_mean", "0.running_var"],
        [],
        ["0.weight", "0.bias"],
    )


def test_norms_without_statistics_have_none():
    assert kinds(nn.BatchNorm1d(2, track_running_stats=False, affine=False)) == ([], [], [])


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, hooked_spectral_norm])
def test_vectors_of_spectral_norm_are_a_workers_own(norm):
    statistics, equal, trained = kinds(nn.Sequential(norm(nn.Linear(4, 4))))
    assert (statistics, equal) == ([], [])
    assert len(trained) == 2


def test_generator_states_are_a_workers_own_and_other_bytes_are_not():
    module = Holder(rng=torch.get_rng_state(), image=torch.zeros(7, dtype=torch.uint8))
    assert kinds(module) == ([], ["image"], [])


def test_the_rest_is_to_be_equal_frozen_parameters_too():
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), Holder(mask=torch.ones(2)))
    assert kinds(module) == ([], ["0.weight", "0.bias", "1.mask"], [])


def test_what_is_declared_wins_and_goes_along_in_copies():
    module = nn.Sequential(
        Holder(mean=torch.ones(2), cache=torch.ones(2), later=None), nn.BatchNorm1d(2, affine=False)
    )
    distoptim.statistics(module, "0.mean")
    distoptim.local(module[0], ["cache", "later"])
    distoptim.local(module, "1.running_var")
    module[0].later = torch.ones(1)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert kinds(copied) == (["0.mean", "1.running_mean"], [], [])
    assert "mean" not in "".join(Holder(x=torch.ones(1)).state_dict())


def test_without_names_all_that_can_be_is_declared():
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    distoptim.statistics(teacher)
    statistics, equal, trained = kinds(teacher)
    assert len(statistics) == 6
    assert equal == trained == []
    distoptim.local(teacher)
    assert kinds(teacher) == ([], [], [])


def test_what_cannot_be_declared_is_refused():
    module = Holder(count=torch.zeros(2, dtype=torch.int64), wide=torch.ones(1).expand(8))
    with pytest.raises(
        ValueError, match="'counts' is no buffer or parameter of Holder; allowed are"
    ):
        distoptim.statistics(module, "counts")
    with pytest.raises(ValueError, match=r"'count' cannot be averaged: it is of dtype torch.int64"):
        distoptim.statistics(module, "count")
    with pytest.raises(ValueError, match=r"'wide' cannot be averaged: it is expanded to \[8\]"):
        distoptim.statistics(module, ["wide"])
    distoptim.local(module, "count")


def odd_tensors():
    with torch.inference_mode():
        made_in_inference = torch.ones(3)
    return {
        "infinite": torch.full((4, 4), float("-inf")).triu(1),
        "nan": torch.tensor(float("nan")),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
        "expanded": torch.ones(1).expand(8),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "inference": made_in_inference,
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "bool": torch.tensor([True, False]),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(3.0),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "meta": torch.ones(3, device="meta"),
        "lazy": nn.UninitializedBuffer(),
    }


def test_digests_are_equal_for_equal_tensors_of_any_kind_and_differ_otherwise():
    first, again = odd_tensors(), odd_tensors()
    assert {n: digest(t) for n, t in first.items()} == {n: digest(t) for n, t in again.items()}
    assert len({digest(t) for t in first.values()}) == len(first)
    assert digest(torch.eye(3).to_sparse()) != digest((2 * torch.eye(3)).to_sparse())
    # As soon as they are compared: who holds which could not be made equal.
    assert look(torch.eye(3).to_sparse()) != look(torch.eye(3))
    assert digest(torch.ones(2)) != digest(torch.ones(2, dtype=torch.float64))
    assert digest(torch.ones(2, 3)) != digest(torch.ones(3, 2))
    # Values, not memory order.
    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.t().contiguous().t())


def test_differences_come_in_the_order_of_names_with_the_first_rank():
    a = {"x": "1", "y": "1", "z": "1"}
    b = {"x": "1", "y": "2", "z": "1"}
    assert differences([[a], [a], [b]]) == {"y": 2}
    # A worker of two ranks, of which one shard differs; and a part that one does not have.
    assert differences([[a, a], [a, {"y": "1", "z": "0"}]]) == {"x": 1, "z": 1}
    assert differences([[a], [a]]) == {}


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, hooked_spectral_norm])
def test_a_spectral_norm_is_one_of_other_parameters_too(norm):
    torch.manual_seed(0)
    layer = norm(nn.Linear(16, 16)).eval()
    original = next(p for p in layer.parameters() if p.dim() == 2)
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    with torch.no_grad():
        original.add_(torch.randn(16, 16))
        with normalised(layer):
            layer(torch.ones(16))
            inside = torch.linalg.matrix_norm(layer.weight, 2).item()
        recompute_weights(layer)
    assert inside == pytest.approx(1, abs=0.01)
    for name, value in layer.named_buffers():
        assert torch.equal(value, buffers[name])
    assert layer.training is False
