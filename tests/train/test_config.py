import pytest

from distoptim.algorithms import ALGORITHMS
from distoptim.train import optimizers
from distoptim.train.config import RunConfig


@pytest.mark.parametrize(("values", "message"), [
    ({"tau": 0}, "tau=0: allowed is an integer, 1 or more"),
    ({"workers": 0}, "workers=0"),
    ({"batch_size": 1.5}, r"batch_size=1\.5"),
    ({"steps": 0}, "steps=0"),
    ({"checkpoint_every": -1}, "checkpoint_every=-1"),
    ({"seed": -1}, "seed=-1"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"momentum": 0.0}, "Nesterov"),
    ({"timeout_s": 0.0}, "timeout_s"),
    ({"algorithm": "sgd"}, "algorithm='sgd': allowed is one of ddp, local-sgd"),
    ({"data": "cifar"}, "data='cifar': allowed is one of cifar10, cifar100, digits"),
    ({"model": "gpt"}, "model='gpt'"),
    ({"partition": "skew"}, "partition='skew'"),
    ({"dtype": "float8"}, "dtype='float8'"),
    ({"latency_ms": -1.0}, "latency_ms=-1.0: allowed"),
    ({"bandwidth_gbit_s": 0.0}, "bandwidth_gbit_s=0.0: allowed"),
    ({"algorithm": "easgd", "options": {"alpha": 0.5}}, r"alpha=0.5: allowed is a number in \(0, 0.4\)"),
    ({"algorithm": "bmuf", "options": {"alpha": 0.5}}, "bmuf takes no alpha; its options are fragments, block_mom"),
    ({"algorithm": "ddp", "options": {"alpha": 0.5}}, "ddp takes no alpha; it has none of its own"),
    ({"options": {"delay": 9}}, "delay=9: allowed is an integer, from 0 to 4"),
])
def test_a_wrong_value_is_named_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        RunConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", optimizers.names())
def test_every_algorithm_has_a_valid_default(algorithm):
    assert RunConfig(algorithm=algorithm).algorithm == algorithm


def test_own_options_are_read_from_the_constructor():
    assert optimizers.own_options("overlap-local-sgd") == {
        "fragments": int, "alpha": float, "outer_momentum": float, "delay": int, "codec": str}
    assert optimizers.own_options("bmuf")["nesterov_block"] is bool
    assert all(optimizers.own_options(name) for name in ALGORITHMS)


def test_no_link_is_emulated_unless_asked_for():
    assert RunConfig().link is None
    link = RunConfig(latency_ms=2.0).link
    assert link is not None
    assert link.latency_s == 0.002
    assert link.all_reduce_s(10**9, 2) == pytest.approx(0.004)
