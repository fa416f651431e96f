import math

import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.loop import Run
from distoptim_experiments.training.virtual import VirtualRun
from distoptim_experiments.training.world import StopSignals, World

from distoptim.comm import Link, emulate
from distoptim.testing.processes import run

SMALL = RunConfig(
    data="synthetic",
    workers=2,
    tau=3,
    batch_size=8,
    steps=10,
    log_every=1,
    evaluate_every=4,
    checkpoint_every=0,
)


LINK = Link(latency_s=0.01, bandwidth_gbit_s=10.0)


def flatten(value, name=""):
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flatten(value[key], f"{name}/{key}").items()}
    if isinstance(value, list):
        return {
            k: v for i, item in enumerate(value) for k, v in flatten(item, f"{name}/{i}").items()
        }
    return {name: value}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train(config, folder, world, *, resume=False, told=0):
    """Run to the end, or until the signal `told`; returns what it stopped for."""
    signals = StopSignals()
    signals.received = told
    part = Run(config, world, folder, resume=resume)
    signum = part.train(signals)
    part.close()
    return signum


def resumed_equals_uninterrupted(rank, folder, algorithm, stop):
    world = World()
    config = SMALL.replace(algorithm=algorithm)
    train(config, folder / "whole", world)
    train(config.replace(steps=stop), folder / "parts", world)
    train(config, folder / "parts", world, resume=True)
    (whole, mine), (parts, _) = (
        checkpoint.load(folder / name, world=world) for name in ("whole", "parts")
    )
    assert mine
    whole, parts = flatten(whole), flatten(parts)
    timing = ("/seconds", "/exposed_s", "/overhead_s", "/hidden_s")
    return sorted(
        key
        for key in whole.keys() | parts.keys()
        if not key.endswith(timing) and not same(whole.get(key), parts.get(key))
    )


# With tau = 3: before a launch, with a round in flight, and right at a sync.
@pytest.mark.parametrize(
    ("algorithm", "stop"),
    [
        ("overlap-local-sgd", 2),
        ("overlap-local-sgd", 5),
        ("overlap-local-sgd", 6),
        ("cocod-sgd", 5),
        ("bmuf", 4),
        ("ddp", 4),
        ("powersgd", 5),
    ],
)
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, algorithm, stop):
    assert run(resumed_equals_uninterrupted, 2, tmp_path, algorithm, stop) == [[], []]
    whole, parts = (records.read(tmp_path / name) for name in ("whole", "parts"))
    for kind, keys in (
        ("logs", ("step", "epoch", "loss")),
        ("evaluations", ("step", "test_loss", "test_accuracy")),
    ):
        a, b = (
            [
                [getattr(line, key) for key in keys]
                for line in getattr(r, kind)
                if kind == "logs" or line.step != stop
            ]
            for r in (whole, parts)
        )
        assert a == b
    assert whole.summary.syncs == parts.summary.syncs


def stops_when_told(rank, folder):
    return train(SMALL, folder, World(), told=2 if rank == 1 else 0)


def resumes_at_another_size(rank, folder):
    config = SMALL.replace(workers=3)
    return train(config, folder, World(), resume=True)


def test_all_stop_together_when_one_is_told_and_another_number_of_workers_goes_on(tmp_path):
    assert run(stops_when_told, 2, tmp_path) == [2, 2]
    step = torch.load(checkpoint.latest(tmp_path) / "rank-0.pt", weights_only=True)["step"]
    assert 0 < step < SMALL.steps
    assert run(resumes_at_another_size, 3, tmp_path) == [0, 0, 0]
    assert [line.step for line in records.read(tmp_path).logs] == list(range(1, 11))


def test_adacomm_is_told_the_loss(tmp_path):
    config = SMALL.replace(algorithm="local-sgd", tau=4, adacomm=4, steps=20, evaluate_every=20)
    run(trained, 2, tmp_path, config)
    record = records.read(tmp_path)
    # It falls with the loss, and where the loss is stuck.
    assert record.summary.tau < 4
    assert record.config.adacomm == 4


def trained(rank, folder, config):
    train(config, folder, World())


class Blind:
    """Batches of which no pixel is a number."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        images, labels = next(self.batches)
        return images * math.nan, labels

    def state_dict(self):
        return self.batches.state_dict()


def on_real_workers(rank, folder, config, sick):
    part = Run(config, World(), folder)
    if rank in sick:
        part._batches = Blind(part._batches)
    part.train(StopSignals())
    part.close()


def real(folder, config, sick):
    run(on_real_workers, 2, folder, config, sick)
    return list(records.read_lines(folder / records.FILE))


def virtual(folder, config, sick):
    made, lines = VirtualRun(config, Machines(), threads=1), []
    for rank in sick:
        made._batches[rank] = Blind(made._batches[rank])
    made.train(lines.append)
    return lines


@pytest.mark.filterwarnings("ignore::distoptim.QuarantineWarning")
@pytest.mark.parametrize("trained", [real, virtual])
def test_a_run_diverges_when_no_worker_is_finite_not_when_one_is_not(tmp_path, trained):
    """The same rule for both kinds of workers; means leave out the one that sees nothing."""
    # Of rounds of 3, so that at the end its parameters are not finite.
    config = SMALL.replace(algorithm="local-sgd", model="mlp", steps=14, log_every=2)
    *lines, summary = trained(tmp_path / "one", config, [1])
    assert not summary.diverged
    assert summary.step == 14
    assert math.isfinite(summary.test_loss)
    logs = [line.loss for line in lines if line.kind == "log"]
    assert len(logs) == 7
    assert all(map(math.isfinite, logs))
    *_, summary = trained(tmp_path / "all", config.replace(steps=10**6), [0, 1])
    assert summary.diverged
    assert summary.step < 10**6


def on_a_slow_link(rank, folder, algorithm):
    emulate(latency_s=LINK.latency_s, bandwidth_gbit_s=LINK.bandwidth_gbit_s)
    train(SMALL.replace(algorithm=algorithm), folder, World())


@pytest.mark.parametrize("algorithm", ["local-sgd", "ddp"])
def test_the_summary_adds_up(tmp_path, algorithm):
    run(on_a_slow_link, 2, tmp_path, algorithm, backend="emulated")
    record = records.read(tmp_path)
    s = record.summary
    assert s.seconds == pytest.approx(s.computation_s + s.exposed_s + (s.overhead_s or 0.0))
    assert s.exposed_share == pytest.approx(s.exposed_s / s.computation_s)
    assert LINK.all_reduce_s(0, 2) * s.syncs <= s.exposed_s < s.seconds
    assert s.syncs == (3 if algorithm == "local-sgd" else 10)
    # The payload of an averaging algorithm has one element more: the worker's weight.
    assert s.bytes == s.syncs * 4 * (record.start.parameters + (algorithm == "local-sgd"))
    assert [line.step for line in record.evaluations] == [4, 8, 10]
    if algorithm == "ddp":
        # DDP does not say what it hides or works; there are no rounds.
        assert (s.overhead_s, s.hidden_s, s.tau) == (None, None, None)
    else:
        assert 0 < s.overhead_s < s.computation_s
        assert s.hidden_s >= 0
        assert (s.tau, s.staleness, s.quarantined) == (3, 0, 0)


def test_an_unfinished_checkpoint_is_not_the_latest(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint there to resume from"):
        checkpoint.latest(tmp_path)
    good = tmp_path / checkpoint.FOLDER / "step-5"
    good.mkdir(parents=True)
    (good.parent / "latest").write_text("step-5")
    (good.parent / "step-9").mkdir()
    assert checkpoint.latest(tmp_path) == good


def test_a_damaged_checkpoint_is_named(tmp_path):
    class Alone:
        rank, size = 0, 1

    folder = tmp_path / checkpoint.FOLDER / "step-5"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("step-5")
    path = folder / "rank-0.pt"
    for damage in (
        lambda: path.write_bytes(b"no"),
        lambda: path.write_bytes(b"l" * 9),
        lambda: torch.save([1], path),
    ):
        damage()
        with pytest.raises(ValueError, match="damaged") as error:
            checkpoint.load(tmp_path, world=Alone())
        assert str(error.value) == f"{path}: damaged, not a checkpoint"
    path.unlink()
    with pytest.raises(ValueError, match=r"rank-0\.pt: cannot be read: No such file"):
        checkpoint.load(tmp_path, world=Alone())
