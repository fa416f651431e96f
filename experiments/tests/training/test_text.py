"""Training on text."""

from __future__ import annotations

import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.data import datasets as data
from distoptim_experiments.data import text
from distoptim_experiments.machines import Machines
from distoptim_experiments.models import registry as models
from distoptim_experiments.training import checkpoint, virtual
from distoptim_experiments.training.evaluation import evaluate
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.virtual import Virtual
from distoptim_experiments.training.world import World

from distoptim.testing.inspection import inspect
from distoptim.testing.processes import run
from experiments.tests.data.texts import written
from experiments.tests.training.ranks import train

WINDOW = torch.Size([text.CONTEXT])


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "text")


def config_of(folder, **changes):
    return RunConfig(
        **{
            "data": str(folder),
            "model": "gpt-small",
            "workers": 2,
            "tau": 3,
            "batch_size": 4,
            "steps": 6,
            "optimizer": "adamw",
            "lr": 3e-3,
            "clip_norm": 1.0,
            "log_every": 1,
            "evaluate_every": 4,
            "checkpoint_every": 0,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digits"}, "data='digits' with model='gpt-small': allowed is a file or folder"),
        ({"model": "cnn"}, "allowed is one of cifar10.*digits.*text goes with model=gpt"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"clip_norm": 0.0}, "clip_norm=0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_bad_combinations_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, **changes)


def test_fragments_can_be_asked_for(folder):
    config = config_of(folder, algorithm="streaming-diloco", options={"fragments": 2})
    workers = Virtual(Problem(config), Machines(), threads=1)
    assert len(inspect(workers.cluster.optimizers[0]).fragments) == 2


def test_an_untrained_model_knows_nothing_and_says_so_every_time(folder):
    d = data.load(str(folder))
    torch.manual_seed(0)
    model = models.build("gpt-small", WINDOW, 256)
    once, again = (evaluate(model, d.test_images, d.test_labels) for _ in range(2))
    assert once == again
    # Nats per byte; log 256 = 5.545, and a little more, since tied embeddings favour the byte just
    # read.
    assert 5.545 < once["test_loss"] < 5.8
    assert 0 <= once["test_accuracy"] < 0.2


def test_the_gradient_is_clipped_before_the_step(folder):
    config = config_of(
        folder,
        optimizer="sgd",
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        lr=1.0,
        clip_norm=0.01,
        workers=1,
        algorithm="local-sgd",
    )
    workers = Virtual(Problem(config), Machines(), threads=1)
    before = [p.detach().clone() for p in workers.cluster.models[0].parameters()]
    workers.step(0)
    after = [p.detach() for p in workers.cluster.models[0].parameters()]
    moved = torch.cat([(p - q).flatten() for p, q in zip(after, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def simulated(config, folder):
    """The record of a run of virtual workers."""
    virtual.run(config, Machines(), folder, threads=1)
    return records.read(folder)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
def test_virtual_workers_learn_the_text(folder, tmp_path, dtype):
    # A CPU may have no bfloat16 and take ten times as long for it.
    steps, loss = {"float32": (20, 3.0), "bfloat16": (10, 3.7)}[dtype]
    config = config_of(folder, steps=steps, log_every=5, batch_size=8, dtype=dtype)
    record = simulated(config, tmp_path / "run")
    losses = [line.loss for line in record.logs]
    assert losses[0] > 4
    assert losses[-1] < loss
    assert record.summary.test_loss < loss


def both_ways(rank, text_folder, folder, algorithm):
    world = World()
    config = config_of(text_folder, algorithm=algorithm)
    train(config, folder / "whole", world)
    train(config.replace(steps=4), folder / "parts", world)
    train(config, folder / "parts", world, resume=True)
    whole, parts = (
        checkpoint.load(folder / name, seat=world.seat)[0] for name in ("whole", "parts")
    )
    return [
        all(
            torch.equal(x, parts["workers"]["model"][k])
            for k, x in whole["workers"]["model"].items()
        ),
        whole["losses"] == parts["losses"],
    ]


@pytest.mark.parametrize("algorithm", ["overlap-local-sgd", "ddp"])
def test_a_resumed_run_is_bit_equal_and_virtual_workers_agree(folder, tmp_path, algorithm):
    assert run(both_ways, 2, folder, tmp_path, algorithm) == [[True, True]] * 2
    simulation = simulated(config_of(folder, algorithm=algorithm), tmp_path / "virtual").summary
    summary = records.read(tmp_path / "whole").summary
    assert summary.test_loss == pytest.approx(simulation.test_loss, rel=1e-4)


def test_the_command_trains_a_gpt(folder, invoke, tmp_path):
    data = ("--model", "gpt-small", "--data", folder, "--workers", "2", "--batch-size", "4")
    optimizer = ("--optimizer", "adamw", "--lr", "1e-3", "--clip-norm", "1")
    code, _, err = invoke("train", *data, *optimizer, "--steps", "4", "--folder", tmp_path / "run")
    assert code == 0, err
    assert records.read(tmp_path / "run").config.optimizer == "adamw"
