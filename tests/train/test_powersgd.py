import pytest
import torch

from distoptim.sim.machines import Machines
from distoptim.sim.run import VirtualRun
from distoptim.train import methods
from distoptim.train.config import RunConfig
from distoptim.train.powersgd import FULL_STEPS
from tests.workers import run

CONFIG = RunConfig(algorithm="powersgd", data="synthetic", model="mlp", workers=2, lr=0.05)
N, M = 12, 20


def seen(rank, approximation_rank):
    """Payload per step, what was really handed to all-reduce, and the model, of one layer with a bias."""
    import torch.distributed as dist

    config = RunConfig(**{**CONFIG.to_dict(), "options": {"approximation_rank": approximation_rank}})
    torch.manual_seed(0)
    model = torch.nn.Linear(M, N)
    method = methods.build(model, config)
    reduce, sent, counted = dist.all_reduce, [0], []

    def count(tensor, *args, **kwargs):
        sent[0] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = count
    torch.manual_seed(1 + rank)
    for _ in range(FULL_STEPS + 2):
        method.step(torch.randn(8, M), torch.randint(N, (8,)))
        counted.append(method.traffic()["bytes"])
    dist.all_reduce = reduce
    return counted, sent[0], model.weight.detach()


@pytest.mark.parametrize("approximation_rank", [1, 2])
def test_bytes_are_those_of_the_factors(approximation_rank):
    (counted, sent, weight), (_, _, other) = run(seen, 2, approximation_rank)
    full, factors = 4 * (N * M + N), 4 * (approximation_rank * (N + M) + N)
    assert counted == [full, 2 * full, 2 * full + factors, 2 * full + 2 * factors]
    assert sent == 2 * full + 2 * factors
    assert torch.equal(weight, other)


def test_it_is_refused_where_there_is_no_ddp():
    with pytest.raises(ValueError, match="powersgd: torch's hook runs inside of DDP"):
        VirtualRun(CONFIG, Machines())


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="approximation_rank=0"):
        RunConfig(**{**CONFIG.to_dict(), "options": {"approximation_rank": 0}})
