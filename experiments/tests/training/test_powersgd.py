import pytest
import torch
from distoptim_experiments.config import RunConfig
from distoptim_experiments.optimizers import check
from distoptim_experiments.training.methods import registry
from distoptim_experiments.training.methods.powersgd import FULL_STEPS
from distoptim_experiments.training.virtual import check_virtual

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


def test_it_is_refused_where_there_is_no_ddp():
    with pytest.raises(ValueError, match="powersgd: torch's hook runs inside of DDP"):
        check_virtual(CONFIG)


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="approximation_rank=0"):
        check(RunConfig(**{**CONFIG.to_dict(), "options": {"approximation_rank": 0}}))
