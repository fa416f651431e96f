"""Workers of several ranks in `train`.

Equal to plain workers with the same batches, resumed, or refused.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.training import checkpoint, world
from distoptim_experiments.training.methods import registry
from distoptim_experiments.training.virtual import check_virtual
from distoptim_experiments.training.world import World

from distoptim.comm import emulate
from distoptim.testing.processes import run
from experiments.tests.training.killed import train_with_a_victim
from experiments.tests.training.ranks import TAIL, differing, made, train
from tests.helpers.marks import fsdp

KINDS = ["ddp", pytest.param("fsdp2", marks=fsdp)]
BASE = RunConfig(
    data="synthetic",
    model="mlp",
    workers=2,
    tau=3,
    batch_size=8,
    steps=10,
    log_every=2,
    evaluate_every=5,
    checkpoint_every=0,
    slowdown="exponential",
    slowdown_ms=0.1,
)
CASES = {
    "overlap": {"augment": True, "clip_norm": 0.5, "partition": "label-skew"},
    "levels": {
        "algorithm": "diloco",
        "levels": "1:2",
        "tau": 4,
        "workers": 4,
        "options": {"fragments": 2},
    },
    "gpt": {
        "model": "gpt-small",
        "optimizer": "adamw",
        "clip_norm": 1.0,
        "lr": 1e-3,
        "algorithm": "local-sgd",
        "schedule": "cosine",
    },
}


def config_of(case, folder, **changes):
    if case == "gpt":
        (folder / "text").write_text("To be, or not to be, that is the question. " * 300)
        changes["data"] = str(folder / "text")
    return BASE.replace(**{**CASES[case], **changes})


def in_double(rank, folder, config, resume=False):
    """Train in double precision, where other orders of sums hardly matter."""
    torch.set_default_dtype(torch.float64)
    load = data.load

    def doubled(*args, **options):
        d = load(*args, **options)
        if not d.train_images.is_floating_point():
            return d
        return dataclasses.replace(
            d, train_images=d.train_images.double(), test_images=d.test_images.double()
        )

    data.load = doubled
    train(config, folder, resume=resume)


def numbers(folder):
    record = records.read(folder)
    return [
        getattr(line, key)
        for line in record.logs + record.evaluations
        for key in ("step", "loss", "test_loss", "test_accuracy", "worker_accuracy")
        if hasattr(line, key)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of plain workers of each case, made once."""
    found = {}

    def folder(case):
        if case not in found:
            path = found[case] = tmp_path_factory.mktemp(case)
            config = config_of(case, path)
            run(in_double, config.workers, path, config)
        return found[case]

    return folder


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("overlap", "ddp"),
        ("levels", "ddp"),
        pytest.param("overlap", "fsdp2", marks=fsdp),
        pytest.param("gpt", "fsdp2", marks=[fsdp, pytest.mark.soak]),
    ],
)
def test_islands_equal_plain_workers_with_the_same_batches(plain, tmp_path, case, kind):
    config = config_of(case, tmp_path, island_size=2, island_kind=kind)
    run(in_double, config.ranks, tmp_path, config)
    assert numbers(tmp_path) == pytest.approx(numbers(plain(case)), rel=1e-9, abs=1e-11)
    one, other = (records.read(folder) for folder in (plain(case), tmp_path))
    assert one.start.parameters == other.start.parameters
    assert (other.config.workers, other.summary.syncs) == (
        config.workers,
        one.summary.syncs,
    )
    if case == "overlap":
        # DDP: each rank sends the whole model; FSDP2: its shard. And each one its tail, in numbers of
        # 8 bytes.
        tails = 8 * TAIL * one.summary.syncs
        factor = 2 if kind == "ddp" else 1
        assert other.summary.bytes - 2 * tails == factor * (one.summary.bytes - tails)
    if kind == "ddp":
        saved = [
            torch.load(checkpoint.latest(tmp_path) / f"rank-{rank}.pt", weights_only=True)[
                "workers"
            ]["model"]
            for rank in range(config.ranks)
        ]
        for first, second in zip(saved[::2], saved[1::2], strict=True):
            assert all(torch.equal(first[name], second[name]) for name in first)


def resumed_equals_uninterrupted(rank, folder, kind):
    ranks = World(2)
    config = BASE.replace(model="cnn-small", optimizer="adamw", island_size=2, island_kind=kind)
    train(config, folder / "whole", ranks)
    train(config.replace(steps=5), folder / "parts", ranks)
    train(config, folder / "parts", ranks, resume=True)
    (whole, own), (parts, _) = (
        checkpoint.load(folder / name, seat=ranks.seat) for name in ("whole", "parts")
    )
    assert own
    return differing(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, kind):
    assert run(resumed_equals_uninterrupted, 4, tmp_path, kind) == [[]] * 4
    whole, parts = (records.read(tmp_path / name) for name in ("whole", "parts"))
    # The first part has a line at its last step, 5, and the next one is of one step less.
    assert [line.loss for line in whole.logs[3:]] == [line.loss for line in parts.logs[4:]] != []
    assert whole.evaluations[-1].test_loss == parts.evaluations[-1].test_loss


def stops_when_told(rank, folder, config):
    return train(config, folder, told=2 if rank == config.ranks - 1 else 0)


def goes_on(rank, folder, config):
    return train(config, folder, resume=True)


def refuses_to_go_on(rank, folder, config):
    with pytest.raises(
        ValueError,
        match=r"island_size=\d: the checkpoint has island_kind='\w+', island_size=\d; sh",
    ):
        made(config, folder, World(config.island_size), resume=True)


@fsdp
def test_all_ranks_stop_together_and_fewer_islands_go_on(tmp_path):
    config = BASE.replace(steps=1000, island_size=2, island_kind="fsdp2")
    assert run(stops_when_told, 4, tmp_path, config) == [2] * 4
    steps = torch.load(checkpoint.latest(tmp_path) / "rank-3.pt", weights_only=True)["step"]
    assert 0 < steps < 1000
    run(refuses_to_go_on, 2, tmp_path, config.replace(island_kind="ddp", workers=1))
    run(refuses_to_go_on, 2, tmp_path, config.replace(island_kind="ddp", island_size=1))
    alone = config.replace(workers=1, steps=steps + 4)
    assert run(goes_on, 2, tmp_path, alone) == [0] * 2
    assert records.read(tmp_path).logs[-1].step == steps + 4


def test_plain_workers_go_on_as_ddp_islands_as_if_they_had_always_been_plain(plain, tmp_path):
    first, whole = (
        config_of("overlap", tmp_path, steps=5),
        config_of("overlap", tmp_path, island_size=2),
    )
    run(in_double, 2, tmp_path, first)
    run(in_double, 4, tmp_path, whole, True)
    expected = [line.loss for line in records.read(plain("overlap")).logs]
    assert [line.loss for line in records.read(tmp_path).logs][-2:] == pytest.approx(
        expected[-2:], rel=1e-9
    )


def backends(rank):
    emulate(latency_s=0.0, bandwidth_gbit_s=1000.0)
    config = BASE.replace(island_size=2)
    method = registry.build(torch.nn.Linear(3, 2), config)
    try:
        return dist.get_backend(method.inside), dist.get_backend(method.between)
    finally:
        method.close()


def test_the_emulated_link_lies_between_islands_only():
    assert run(backends, 4, backend="emulated") == [("gloo", "emulated")] * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"island_size": 0}, "island_size=0: allowed is an integer, 1 or more"),
        (
            {"island_size": 2, "island_kind": "hsdp"},
            "island_kind='hsdp': allowed is one of ddp, fsdp2",
        ),
        (
            {"island_kind": "fsdp2"},
            "island_kind='fsdp2' with island_size=1: one rank has nothing to shard",
        ),
        (
            {"island_size": 3},
            "batch_size=8 with island_size=3: a worker's ranks share its batch, allowed are multiples",
        ),
        (
            {"island_size": 2, "algorithm": "ddp"},
            "island_size=2: ddp averages the gradients of all ranks at every step",
        ),
        (
            {"island_size": 2, "algorithm": "powersgd"},
            "island_size=2: powersgd averages the gradients of all ranks",
        ),
        (
            {"island_size": 2, "hide_communication": True},
            "hide_communication=True with island_size=2: each rank of a",
        ),
        (
            {"island_size": 2, "adacomm": 5},
            "adacomm=5 with island_size=2: each rank of a worker would choose tau",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        BASE.replace(**values)
    assert "\n" not in str(error.value)


def test_virtual_workers_and_numbers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="island_size=2: a virtual worker is one machine"):
        check_virtual(BASE.replace(slowdown="none", slowdown_ms=0.0, island_size=2))
    with pytest.raises(
        ValueError, match="island_size=2 with 3 ranks: allowed is a number that divides it"
    ):
        world.workers_of(3, 2)
    assert world.workers_of(6, 2) == 3


@fsdp
@pytest.mark.soak
def test_islands_under_torchrun_survive_a_killed_rank(tmp_path):
    folder, _ = train_with_a_victim(
        tmp_path, ranks=4, steps=9, options="--island-size 2 --island-kind fsdp2"
    )
    record = records.read(folder)
    assert (record.config.workers, record.config.island_size) == (2, 2)
    assert [line.step for line in record.logs] == list(range(1, 10))
