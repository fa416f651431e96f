"""Any constructor argument gives a working optimizer or a ValueError that names the value and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect
import math
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import distoptim
from distoptim import (
    ALGORITHMS,
    BMUF,
    CO2,
    EASGD,
    DiLoCo,
    LocalSGD,
    OverlapLocalSGD,
    SlowMo,
    StreamingDiLoCo,
    comm,
    simulator,
)
from distoptim.comm import Link, SingleWorker, emulate
from distoptim.comm.codecs import ErrorFeedback, Int8
from distoptim.periods import AdaComm, PostLocal
from distoptim.settings import SyncSettings
from distoptim.testing import inspection
from tests.helpers.toy import alone

ODD = st.sampled_from(
    [
        None,
        True,
        False,
        math.nan,
        math.inf,
        -math.inf,
        -1,
        -0.5,
        0,
        0.0,
        1,
        1.0,
        2,
        0.5,
        1e-300,
        1e30,
        10**9,
        10**400,
        -(10**400),
        "",
        "0.5",
        b"1",
        [],
        [1],
        (),
        {},
        1j,
        object(),
        int,
        np.float32(0.5),
        np.int64(2),
        np.nan,
        torch.tensor(0.5),
        torch.tensor(math.nan),
        torch.tensor([0.5, 0.5]),
        torch.tensor([]),
        torch.tensor(1j),
    ]
)
TAU = st.one_of(st.integers(1, 6), ODD)
UNIT = st.one_of(st.floats(0, 1), st.floats(), ODD)

FLAG = st.one_of(st.booleans(), ODD)
FACTORY = st.sampled_from(
    [
        None,
        partial(torch.optim.Adam, lr=0.1),
        1,
        torch.optim.SGD([torch.zeros(1)]),
        lambda anchors: anchors,
        lambda anchors: torch.optim.SGD([torch.zeros(1)]),
    ]
)
OUTER = {"delay": TAU, "outer_lr": UNIT, "outer_momentum": UNIT, "outer_nesterov": FLAG}

COMMON = {
    "lr": UNIT,
    "momentum": UNIT,
    "dampening": UNIT,
    "weight_decay": UNIT,
    "nesterov": st.one_of(st.booleans(), ODD),
    "size": st.one_of(st.none(), st.just(1), ODD),
    "group": st.none(),
    "communicator": st.one_of(st.just(SingleWorker()), ODD),
    "fragments": TAU,
    "timeout_s": UNIT,
    "pattern": st.one_of(st.sampled_from(["sequential", "strided"]), ODD),
    "average_in_step": st.one_of(st.booleans(), ODD),
    "reset_inner": st.one_of(st.booleans(), ODD),
    "gmf": UNIT,
    "codec": st.one_of(st.sampled_from(["int8", "2bit+ef", "int8+ef+ef", "+ef", Int8()]), ODD),
    "module": st.one_of(st.sampled_from([torch.nn.Linear(1, 1), torch.nn.ReLU]), ODD),
    "sync_module": FLAG,
    "offload": FLAG,
    "levels": ODD,
    "device_mesh": ODD,
    "streams": st.one_of(TAU, st.just("auto")),
}
OWN = {
    "local-sgd": {"delay": TAU, "outer_momentum": UNIT, "carry": FLAG},
    "easgd": {"delay": TAU, "alpha": UNIT},
    "cocod-sgd": {"delay": TAU},
    "bmuf": {
        "block_momentum": UNIT,
        "block_lr": UNIT,
        "nesterov_block": FLAG,
        "delay": TAU,
        "carry": FLAG,
    },
    "slowmo": {"slow_momentum": UNIT, "slow_lr": UNIT, "delay": TAU, "carry": FLAG},
    "overlap-local-sgd": {"delay": TAU, "alpha": UNIT, "outer_momentum": UNIT},
    "overlap-bmuf": {"block_momentum": UNIT, "gain": UNIT, "delay": TAU},
    "global-momentum": {
        "gain": UNIT,
        "delay": TAU,
        "global_momentum": UNIT,
        "momentum_key": st.one_of(st.sampled_from(["momentum", "lr", "params", "nesterov"]), ODD),
    },
    "diloco": {**OUTER, "outer": FACTORY, "carry": FLAG, "local_weight": UNIT},
    "streaming-diloco": {**OUTER, "outer": FACTORY, "local_weight": UNIT},
    "eager-diloco": {**OUTER, "eager": FLAG},
    "co2": {"delay": TAU, "outer_lr": UNIT, "outer_momentum": UNIT, "clip": UNIT},
}


@st.composite
def constructions(draw):
    """An algorithm, and a few of its arguments."""
    name = draw(st.sampled_from(sorted(OWN)))
    strategies = {**COMMON, **OWN[name]}
    chosen = draw(st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=4))
    return name, {"tau": draw(TAU), **{key: draw(strategies[key]) for key in chosen}}


@given(constructions())
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@pytest.mark.filterwarnings("ignore:one worker")
def test_a_working_optimizer_or_a_value_error(construction):
    name, options = construction
    # Zeros, so that huge values of what is legal stay finite.
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(()))]
    try:
        optimizer = ALGORITHMS[name](params, **options)
    except ValueError as error:
        assert str(error)  # noqa: PT017  # both outcomes are right
        return
    for _ in range(min(2 * options["tau"], 12)):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if not options.get("average_in_step"):
            optimizer.average()
    assert all(torch.isfinite(p).all() for p in params)


def test_all_algorithms_are_tried():
    assert ALGORITHMS.keys() == OWN.keys()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LocalSGD, {"tau": 0}, r"tau=0: allowed is an integer, 1 or more"),
        (LocalSGD, {"tau": 2.0}, r"tau=2.0: allowed is an integer"),
        (LocalSGD, {"tau": True}, r"tau=True: allowed is an integer"),
        (LocalSGD, {"tau": 4, "delay": 5}, r"delay=5: allowed is an integer, from 0 to 4"),
        (
            LocalSGD,
            {"tau": 4, "delay": 1, "outer_momentum": 0.5},
            r"delay=1 without carry: .*OverlapLocalSGD",
        ),
        (
            LocalSGD,
            {"tau": 4, "outer_momentum": 1},
            r"outer_momentum=1: allowed is a number in \[0, 1\)",
        ),
        (LocalSGD, {"tau": 4, "gmf": 0.1, "outer_momentum": 0.1}, r"two names of one thing"),
        (EASGD, {"tau": 4, "gmf": 0.1}, r"gmf=0.1: EASGD has no outer momentum; allowed is 0"),
        (OverlapLocalSGD, {"tau": 4, "alpha": 1.5}, r"alpha=1.5: allowed is a number in \[0, 1\]"),
        (
            BMUF,
            {"tau": 4, "delay": 1},
            r"delay=1 without carry: .*throws away the local steps.*carry=True",
        ),
        (SlowMo, {"tau": 4, "delay": 4}, r"delay=4 without carry"),
        (DiLoCo, {"tau": 4, "delay": 4}, r"delay=4 without carry"),
        (
            DiLoCo,
            {"tau": 4, "delay": 5, "carry": True},
            r"delay=5: allowed is an integer, from 0 to 4",
        ),
        (
            DiLoCo,
            {"tau": 4, "delay": 4, "carry": True, "local_weight": 0.5},
            r"local_weight=0.5 with carry=True: two ways",
        ),
        (
            DiLoCo,
            {"tau": 4, "outer": torch.optim.Adam, "outer_lr": 0.1},
            r"outer_lr=0.1 with outer: belongs to the outer",
        ),
        (DiLoCo, {"tau": 4, "outer": 3}, r"outer=3: allowed is a function"),
        (
            DiLoCo,
            {"tau": 4, "outer": lambda anchors: 3},
            r"outer: makes 3; allowed is a torch optimizer",
        ),
        (
            StreamingDiLoCo,
            {"tau": 4, "local_weight": 0},
            r"local_weight=0 with delay=1: .*thrown away",
        ),
        (
            StreamingDiLoCo,
            {"tau": 4, "local_weight": 1},
            r"local_weight=1: allowed is a number in \[0, 1\)",
        ),
        (CO2, {"tau": 4, "clip": 0}, r"clip=0: allowed is a number in \(0"),
        (OverlapLocalSGD, {"tau": 4, "alpha": 1}, r"alpha=1 with delay=4: .*thrown away"),
        (BMUF, {"tau": 4, "block_lr": 0}, r"block_lr=0: allowed is a number in \(0, 1e\+30\]"),
        (SlowMo, {"tau": 4, "slow_lr": math.nan}, r"slow_lr=nan: allowed"),
        (SlowMo, {"tau": 4, "lr": math.inf}, r"lr=inf: allowed"),
        (SlowMo, {"tau": 4, "lr": torch.tensor(-1.0)}, r"lr=-1.0: allowed"),
        (SlowMo, {"tau": 4, "timeout_s": 0}, r"timeout_s=0: allowed"),
        (
            SlowMo,
            {"tau": 4, "fragments": 5},
            r"fragments=5: allowed is an integer from 1 to min\(tau=4, 2 parameters\)",
        ),
        (SlowMo, {"tau": 4, "size": 2}, r"size=2, but the process group has 1 worker"),
        (SlowMo, {"tau": 4, "reset_inner": 1}, r"reset_inner=1: allowed is True or False"),
        (SlowMo, {"tau": 4, "communicator": "gloo"}, r"communicator='gloo'"),
        (SlowMo, {"tau": 4, "communicator": SingleWorker}, r"allowed is an instance"),
        (SlowMo, {"tau": 4, "levels": torch.zeros(2)}, r"levels=tensor.*allowed is a mapping"),
        (SlowMo, {"tau": 4, "codec": Int8}, r"codec=<class.*allowed is a Codec"),
        (DiLoCo, {"tau": 4, "outer": torch.optim.LBFGS}, r"outer: LBFGS cannot step"),
        (DiLoCo, {"tau": 4, "outer": torch.optim.SparseAdam}, r"outer: SparseAdam cannot step"),
        *(
            (
                LocalSGD,
                {"tau": tau, "average_in_step": True},
                r"average_in_step=True with tau=.*loss",
            )
            for tau in (AdaComm(4), PostLocal(start=2, tau=AdaComm(4)))
        ),
    ],
)
def test_messages_name_value_and_range(make, options, message):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        make(params, **{"communicator": SingleWorker(), **options})


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "lr", [math.nan, math.inf, -0.1, True, "0.1", [0.1], {}, torch.tensor(math.nan), torch.zeros(2)]
)
def test_learning_rates_of_groups(name, lr):
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": lr}]
    given = torch.optim.AdamW(params)
    given.param_groups[0]["lr"] = lr
    for made, group in ((groups, 1), (given, 0)):
        with pytest.raises(ValueError, match=f"lr of param group {group}=.*: allowed is a number"):
            alone(ALGORITHMS[name], made, tau=4)


@pytest.mark.parametrize(
    "p", [torch.zeros(3, device="meta"), torch.zeros(1).expand(3), torch.zeros(3).to_sparse()]
)
def test_parameters_that_cannot_be_averaged(p):
    with pytest.raises(ValueError, match=r"cannot average a parameter: .*(load|allowed)"):
        alone(LocalSGD, [torch.nn.Parameter(p)], tau=4, lr=0.1)


@pytest.mark.parametrize("codec", ["int8", None, Int8, ErrorFeedback(Int8())], ids=repr)
def test_error_feedback_takes_a_codec(codec):
    with pytest.raises(ValueError, match=r"ErrorFeedback\(.*allowed is a Codec"):
        ErrorFeedback(codec)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_unknown_keywords_are_refused(name):
    with pytest.raises(TypeError, match="outer_momentun"):
        alone(ALGORITHMS[name], [torch.nn.Parameter(torch.zeros(2))], tau=4, outer_momentun=0.5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_tau_is_a_keyword(name):
    with pytest.raises(TypeError):
        ALGORITHMS[name]([torch.nn.Parameter(torch.zeros(2))], 4)


PUBLIC = [
    value
    for package in (distoptim, comm, simulator)
    for value in map(vars(package).get, package.__all__)
    if inspect.isclass(value)
    # Of torch; an exception takes what any does, a protocol is not made.
    and value.__module__.startswith("distoptim.")
    and not issubclass(value, Exception)
    and not getattr(value, "_is_protocol", False)
]


@pytest.mark.parametrize("kind", dict.fromkeys(PUBLIC), ids=lambda kind: kind.__name__)
def test_signatures_show_every_argument(kind):
    """As tooltips and `help()` read them."""
    kinds = {p.kind for p in inspect.signature(kind).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_signatures_show_the_options_of_all(name):
    shown = inspect.signature(ALGORITHMS[name]).parameters.keys()
    # Some algorithms choose their delay themselves.
    assert {f.name for f in dataclasses.fields(SyncSettings)} <= shown | {"delay"}


@pytest.mark.parametrize("lr", [0.1, 1, np.float32(0.5), torch.tensor(0.1)], ids=repr)
def test_learning_rates_of_all_kinds(lr):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = alone(LocalSGD, [p], tau=1, lr=lr)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.average()
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - float(lr)))


@pytest.mark.parametrize(
    "parts",
    [
        lambda a, b: [[a]],
        lambda a, b: [[a, b], [b]],
        lambda a, b: [[a, b], []],
        lambda a, b: [[a], [torch.zeros(2)]],
        lambda a, b: "ab",
        lambda a, b: 1.5,
        lambda a, b: None,
        lambda a, b: [a, b],
    ],
)
def test_fragments_that_do_not_cut_the_parameters(parts):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match="fragments"):
        alone(LocalSGD, [a, b], tau=4, fragments=parts(a, b))


def test_fragments_as_modules():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, k) for k in (1, 2, 3)))
    optimizer = alone(StreamingDiLoCo, model.parameters(), tau=4, fragments=[model[0::2], model[1]])
    assert [f.numel for f in inspection.inspect(optimizer).fragments] == [2 + 6, 4]


@pytest.mark.parametrize(
    ("pattern", "sizes"), [("sequential", [1 + 2 + 3, 4 + 5]), ("strided", [1 + 3 + 5, 2 + 4])]
)
def test_fragments_by_pattern(pattern, sizes):
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 2, 3, 4, 5)]
    optimizer = alone(LocalSGD, params, tau=4, fragments=2, pattern=pattern)
    assert [f.numel for f in inspection.inspect(optimizer).fragments] == sizes


def test_patterns_that_do_not_exist_or_do_not_fit():
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match="pattern='random': allowed is 'sequential' or 'strided'"):
        alone(LocalSGD, params, tau=4, fragments=2, pattern="random")
    with pytest.raises(ValueError, match="pattern='strided' is for a number of fragments"):
        alone(LocalSGD, params, tau=4, fragments=[[p] for p in params], pattern="strided")


def test_fragments_by_hand():
    a, b = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3))
    optimizer = alone(LocalSGD, [a, b], tau=5, fragments=[[b], [a]])
    assert [(f.numel, f.offset) for f in inspection.inspect(optimizer).fragments] == [
        (3, 0),
        (2, 2),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"latency_s": value, "bandwidth_gbit_s": 1.0}
        for value in (-1, math.nan, math.inf, "1", None, True)
    ]
    + [{"latency_s": 0.0, "bandwidth_gbit_s": value} for value in (0, -1, math.nan, "1", None)],
)
def test_links(options):
    for make in (Link, emulate):
        with pytest.raises(ValueError, match="allowed is"):
            make(**options)
