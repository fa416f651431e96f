import copy

import pytest
import torch
from distoptim_experiments.config import RunConfig
from distoptim_experiments.optimizers import check
from distoptim_experiments.training.low_rank import LowRankMean
from distoptim_experiments.training.methods import registry
from distoptim_experiments.training.methods.powersgd import FULL_STEPS

from distoptim.testing.processes import run

CONFIG = RunConfig(algorithm="powersgd", data="synthetic", model="mlp", workers=2, lr=0.05)
N, M = 12, 20


def seen(rank, approximation_rank):
    """Payload per step, what was really handed to all-reduce, and the model, of one layer with a bias."""
    import torch.distributed as dist

    config = RunConfig(
        **{**CONFIG.to_dict(), "options": {"approximation_rank": approximation_rank}}
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(M, N)
    method = registry.build(model, config)
    reduce, sent, counted = dist.all_reduce, [0], []

    def count(tensor, *args, **kwargs):
        sent[0] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = count
    torch.manual_seed(1 + rank)
    for _ in range(FULL_STEPS + 2):
        method.step(torch.randn(8, M), torch.randint(N, (8,)))
        counted.append(method.costs().bytes)
    dist.all_reduce = reduce
    return counted, sent[0], model.weight.detach()


@pytest.mark.parametrize("approximation_rank", [1, 2])
def test_bytes_are_those_of_the_factors(approximation_rank):
    (counted, sent, weight), (_, _, other) = run(seen, 2, approximation_rank)
    full, factors = 4 * (N * M + N), 4 * (approximation_rank * (N + M) + N)
    assert counted == [full, 2 * full, 2 * full + factors, 2 * full + 2 * factors]
    assert sent == 2 * full + 2 * factors
    assert torch.equal(weight, other)


def large_model():
    """Some matrices of one shape and some of others, of 1 MB and more, which DDP would send in several buckets."""
    torch.manual_seed(0)
    wide = 512
    return torch.nn.Sequential(
        torch.nn.Linear(M, wide),
        torch.nn.Linear(wide, wide),
        torch.nn.Linear(wide, wide),
        torch.nn.Linear(wide, 2 * wide),
        torch.nn.Linear(2 * wide, N),
    )


def stopped_and_not(rank, stop):
    """How many of all tensors differ after 6 steps."""

    def steps(method, first, last):
        for step in range(first, last):
            g = torch.Generator().manual_seed(100 * rank + step)
            method.step(torch.randn(8, M, generator=g), torch.randint(N, (8,), generator=g))

    models = [large_model() for _ in range(3)]
    whole, first, second = (registry.build(model, CONFIG) for model in models)
    steps(whole, 0, 6)
    steps(first, 0, stop)
    models[2].load_state_dict(models[1].state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    steps(second, stop, 6)
    a, b = (
        [
            *model.parameters(),
            *method.state_dict()["error_dict"].values(),
            *method.state_dict()["q_memory_dict"].values(),
        ]
        for model, method in ((models[0], whole), (models[2], second))
    )
    return sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_errors_and_factors_are_kept(stop):
    assert run(stopped_and_not, 2, stop) == [0, 0]


def test_virtual_workers_lose_nothing_in_the_sum_and_go_on_where_they_stopped():
    """What a factor misses is added to the next; means have the rank of the factors."""
    made = [LowRankMean(rank=2, seed=0) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    given, got = torch.zeros(N, M), torch.zeros(N, M)
    for step in range(8):
        workers = [torch.randn(N, M, generator=g) for _ in range(3)]
        bias = [torch.randn(N, generator=g) for _ in range(3)]
        mean = torch.stack(bias).mean(0)
        given += torch.stack(workers).mean(0)
        if step == 5:
            made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
        again = [w.clone() for w in workers]
        made[0]([workers, bias])
        if step >= 5:
            made[1]([again, [b.clone() for b in bias]])
            assert torch.equal(again[0], workers[0])
        assert torch.equal(bias[2], mean)
        assert torch.equal(workers[0], workers[2])
        assert torch.linalg.matrix_rank(workers[0]) == (N if step < FULL_STEPS else 2)
        got += workers[0]
    errors = torch.stack(made[0].state_dict()["errors"]["0"]).mean(0)
    torch.testing.assert_close(got + errors, given)
    full, factors = 4 * (N * M + N), 4 * (2 * (N + M) + N)
    assert made[0].nbytes == FULL_STEPS * full + 6 * factors


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="approximation_rank=0"):
        check(RunConfig(**{**CONFIG.to_dict(), "options": {"approximation_rank": 0}}))
