import json
import tomllib

import pytest
import torch
from distoptim_experiments import lr_schedule, optimizers
from distoptim_experiments.config import RunConfig, algorithms, compared
from distoptim_experiments.machines import Machines
from distoptim_experiments.optimizers import check

from distoptim.algorithms import ALGORITHMS
from distoptim.comm import SingleWorker
from distoptim.periods import AdaComm, PostLocal, Schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 0}, "tau=0: allowed is an integer, 1 or more"),
        ({"workers": 0}, "workers=0"),
        ({"batch_size": 1.5}, r"batch_size=1\.5"),
        ({"steps": 0}, "steps=0"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.5}, r"momentum=1\.5: allowed is a number in \[0, 1\)"),
        ({"momentum": -0.1, "optimizer": "adamw"}, r"momentum=-0\.1"),
        ({"nesterov": 1}, "nesterov=1: allowed is True or False"),
        ({"lr": -1.0, "optimizer": "adamw"}, r"lr=-1\.0: allowed is a number in \[0, 1e\+30\]"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"algorithm": "sgd"}, "algorithm='sgd': allowed is one of ddp, local-sgd"),
        ({"data": "cifar"}, "data='cifar': allowed is one of cifar10, cifar100, digits"),
        ({"model": "gpt"}, "model='gpt'"),
        ({"partition": "skew"}, "partition='skew'"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"latency_ms": -1.0}, "latency_ms=-1.0: allowed"),
        ({"bandwidth_gbit_s": 0.0}, "bandwidth_gbit_s=0.0: allowed"),
        (
            {"algorithm": "easgd", "options": {"alpha": 0.5}},
            r"alpha=0.5: allowed is a number in \(0, 0.4\)",
        ),
        (
            {"algorithm": "bmuf", "options": {"alpha": 0.5}},
            "bmuf takes no alpha; its options are fragments, pattern, b",
        ),
        (
            {"algorithm": "ddp", "options": {"alpha": 0.5}},
            "ddp takes no alpha; it has none of its own",
        ),
        ({"options": {"delay": 9}}, "delay=9: allowed is an integer, from 0 to 4"),
        ({"options": {"reset_inner": 1}}, "reset_inner=1: allowed is True or False"),
        ({"tau_at": "8"}, "tau_at='8': allowed are different integers with others behind a colon"),
        ({"tau_at": "5:2,5:3"}, "tau_at='5:2,5:3': allowed are different"),
        ({"tau_at": {5: 2}}, r"tau_at=\{5: 2\}: allowed"),
        ({"tau_at": "0:2"}, "tau_at='0:2': allowed are local steps from 1 on"),
        ({"tau_at": "9:0"}, "tau=0: allowed is an integer, 1 or more"),
        ({"tau_at": "9:2", "options": {"delay": 3}}, "delay=3: allowed is an integer, from 0 to 2"),
        (
            {"tau_at": "9:2", "adacomm": 5},
            "tau_at='9:2' with adacomm=5: each says how tau changes; give one",
        ),
        (
            {"hide_communication": True, "adacomm": 5},
            "hide_communication=True with adacomm=5: each",
        ),
        (
            {"hide_communication": True, "algorithm": "local-sgd"},
            "delay=0 with tau=HideCommunication",
        ),
        ({"adacomm": -1}, "adacomm=-1: allowed is an integer, 0 or more"),
        (
            {"adacomm": 5, "options": {"fragments": 2}},
            r"fragments=2: allowed is an integer from 1 to min\(tau=1",
        ),
        (
            {"algorithm": "ddp", "adacomm": 5},
            "adacomm=5: ddp averages gradients at every step, it has no rounds",
        ),
        ({"algorithm": "powersgd", "levels": "2:2"}, "levels='2:2': powersgd averages gradients"),
        ({"levels": "2"}, "levels='2': allowed"),
        ({"levels": "3:2"}, "4 is no multiple of 3"),
        ({"levels": "2:2", "tau_at": "9:5"}, "5 is no multiple of 2"),
        ({"levels": "2:2", "adacomm": 5}, "levels= beside tau=AdaComm"),
        (
            {"levels": "2:3"},
            "levels='2:3' with workers=4: allowed are group sizes below the number of workers",
        ),
        ({"levels": "2:4"}, "levels='2:4' with workers=4"),
        ({"levels": "2:4,4:2", "workers": 8, "tau": 8}, "levels='2:4,4:2' with workers=8"),
        ({"levels": "2:1"}, "group size of levels=1"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        check(RunConfig(**values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", algorithms())
def test_every_algorithm_has_a_valid_default(algorithm):
    assert check(RunConfig(algorithm=algorithm)).algorithm == algorithm


@pytest.mark.parametrize("algorithm", ["ddp", "overlap-local-sgd"])
def test_without_momentum_there_is_no_nesterov_form(algorithm):
    config = RunConfig(algorithm=algorithm, momentum=0.0)
    options = {} if algorithm == "ddp" else {"communicator": SingleWorker()}
    (group,) = optimizers.build(
        config, [torch.nn.Parameter(torch.zeros(1))], **options
    ).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.0, False)
    assert RunConfig(algorithm=algorithm, optimizer="adamw", momentum=0.0).momentum == 0


def test_own_options_are_read_from_the_constructor():
    assert optimizers.own_options("overlap-local-sgd") == {
        "fragments": int,
        "pattern": str,
        "alpha": float,
        "outer_momentum": float,
        "delay": int,
        "reset_inner": bool,
        "codec": str,
    }
    assert optimizers.own_options("bmuf")["nesterov_block"] is bool
    assert all(optimizers.own_options(name) for name in ALGORITHMS)


def test_taus_and_groups_are_read_from_text():
    config = RunConfig(
        tau=2, tau_at="6:4", post_local=3, levels="1:2", workers=4, options={"delay": 1}
    )
    assert RunConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert optimizers.period_of(config) == PostLocal(start=3, tau=Schedule({0: 2, 6: 4}))
    assert optimizers.period_of(RunConfig(adacomm=7)) == AdaComm(4, interval=7)
    assert RunConfig(tau=8, levels="2:2,4:4", workers=8).levels == "2:2,4:4"


CHANGED = {
    RunConfig: {
        "algorithm": "diloco",
        "tau_at": "9:2",
        "options": {"outer_lr": 0.7, "delay": 1, "carry": True, "codec": "int8"},
        "nesterov": False,
        "clip_norm": 1.5,
        "milestones": [3, 4.5],
        "steps": 7,
        "data_dir": '/a b/"c"',
    },
    Machines: {"slowdown": "pareto", "bandwidth_gbit_s": 2, "site_size": 2, "site_latency_ms": 0.5},
    lr_schedule.Schedule: {"kind": "steps", "steps": 9, "milestones": [3, 6]},
}


@pytest.mark.parametrize("model", CHANGED)
def test_a_model_comes_back_from_toml(model):
    made = model(**CHANGED[model])
    table = {name: value for name, value in made.to_dict().items() if value is not None}
    text = "\n".join(f"{name} = {toml(value)}" for name, value in table.items())
    again = model(**tomllib.loads(text))
    assert again == made
    # 2 stays 2, and 2.0 stays 2.0: names of finished runs are made of that.
    assert repr(again) == repr(made)


def toml(value):
    """As TOML writes it; of its values JSON writes all but tables alike."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml(x)}' for key, x in value.items())}}}"
    return json.dumps(value)


def test_what_is_changed_is_checked_again():
    assert RunConfig(tau=8).replace(lr=0.5) == RunConfig(tau=8, lr=0.5)
    with pytest.raises(ValueError, match="tau=0: allowed is an integer, 1 or more"):
        RunConfig().replace(tau=0)
    with pytest.raises(ValueError, match="taux: nothing of that name is known; allowed are algo"):
        RunConfig(taux=3)
    with pytest.raises(ValueError, match="milestones=3: allowed is a list, each of which is a num"):
        RunConfig(milestones=3)
    with pytest.raises(ValueError, match="kind: missing"):
        lr_schedule.Schedule(steps=3)


def test_in_a_comparison_methods_without_rounds_are_told_nothing_about_them():
    fields = RunConfig(adacomm=7, post_local=3, batch_size=9).to_dict()
    assert compared({**fields, "algorithm": "ddp"}) == RunConfig(algorithm="ddp", batch_size=9)
    assert compared({**fields, "algorithm": "bmuf"}).adacomm == 7


def test_no_link_is_emulated_unless_asked_for():
    assert RunConfig().link is None
    link = RunConfig(latency_ms=2.0).link
    assert link is not None
    assert link.latency_s == 0.002
    assert link.all_reduce_s(10**9, 2) == pytest.approx(0.004)
