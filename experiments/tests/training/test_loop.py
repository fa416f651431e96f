import math

import pytest
import torch
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.training import checkpoint, virtual
from distoptim_experiments.training.loop import Run
from distoptim_experiments.training.problem import Problem
from distoptim_experiments.training.processes import Processes
from distoptim_experiments.training.signals import StopSignals
from distoptim_experiments.training.virtual import Virtual, check_virtual
from distoptim_experiments.training.world import World

from distoptim.comm import Link, emulate
from distoptim.testing.processes import run
from experiments.tests.training.ranks import TAIL, differing, train

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


# With tau = 3: before a launch, with a round in flight, and right at a sync.
RESUMED = {
    "overlap-local-sgd": (2, 5, 6),
    "cocod-sgd": (5,),
    "bmuf": (4,),
    "ddp": (4,),
    "powersgd": (5,),
}


def resumed_and_uninterrupted(rank, folder):
    """(algorithm, step at which it was stopped) -> where their checkpoints differ."""
    world = World()
    found = {}
    for algorithm, stops in RESUMED.items():
        config = SMALL.replace(algorithm=algorithm)
        train(config, folder / algorithm, world)
        whole, own = checkpoint.load(folder / algorithm, seat=world.seat)
        assert own
        for stop in stops:
            parts = folder / f"{algorithm}-{stop}"
            train(config.replace(steps=stop), parts, world)
            train(config, parts, world, resume=True)
            found[algorithm, stop] = differing(whole, checkpoint.load(parts, seat=world.seat)[0])
    return found


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path):
    cases = [(algorithm, stop) for algorithm, stops in RESUMED.items() for stop in stops]
    assert run(resumed_and_uninterrupted, 2, tmp_path) == [{case: [] for case in cases}] * 2
    for algorithm, stop in cases:
        whole = records.read(tmp_path / algorithm)
        parts = records.read(tmp_path / f"{algorithm}-{stop}")
        assert told(whole, stop) == told(parts, stop)
        assert whole.summary.syncs == parts.summary.syncs


def told(record, stop):
    """What a record says of all steps, and of evaluations but for one where the run was stopped."""
    logs = [(line.step, line.epoch, line.loss) for line in record.logs]
    evaluations = [
        (line.step, line.test_loss, line.test_accuracy)
        for line in record.evaluations
        if line.step != stop
    ]
    return logs, evaluations


def stops_when_told(rank, folder):
    return train(SMALL, folder, told=2 if rank == 1 else 0)


def resumes_at_another_size(rank, folder):
    config = SMALL.replace(workers=3)
    return train(config, folder, resume=True)


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
    train(config, folder)


class Blind:
    """Batches of which no pixel is a number."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        images, labels = next(self.batches)
        return images * math.nan, labels

    def state_dict(self):
        return self.batches.state_dict()


def blinded(config, sick):
    """The problem, of which the workers `sick` see nothing."""
    problem = Problem(config)
    batches = problem.batches
    problem.batches = lambda worker: Blind(batches(worker)) if worker in sick else batches(worker)
    return problem


def on_real_workers(rank, folder, config, sick):
    part = Run(Processes(blinded(config, sick), World(), StopSignals()), folder)
    part.train()
    part.close()


def real(folder, config, sick):
    run(on_real_workers, 2, folder, config, sick)
    return list(records.read_lines(folder / records.FILE))


def simulated(folder, config, sick):
    lines = []
    workers = Virtual(blinded(config, sick), Machines(), threads=1)
    Run(workers, folder, observers=[lines.append]).train()
    return lines


@pytest.mark.filterwarnings("ignore::distoptim.QuarantineWarning")
@pytest.mark.parametrize("trained", [real, simulated])
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
    train(SMALL.replace(algorithm=algorithm), folder)


@pytest.mark.parametrize("algorithm", ["local-sgd", "ddp"])
def test_the_summary_adds_up(tmp_path, algorithm):
    run(on_a_slow_link, 2, tmp_path, algorithm, backend="emulated")
    record = records.read(tmp_path)
    s = record.summary
    assert s.seconds == pytest.approx(s.computation_s + s.exposed_s + (s.overhead_s or 0.0))
    assert s.exposed_share == pytest.approx(s.exposed_s / s.computation_s)
    assert LINK.all_reduce_s(0, 2) * s.syncs <= s.exposed_s < s.seconds
    assert s.syncs == (3 if algorithm == "local-sgd" else 10)
    tail = TAIL if algorithm == "local-sgd" else 0
    assert s.bytes == s.syncs * 4 * (record.start.parameters + tail)
    assert [line.step for line in record.evaluations] == [4, 8, 10]
    assert record.logs[-1].exposed_share > 0
    assert record.logs[-1].tau == s.tau
    if algorithm == "ddp":
        # DDP does not say what it hides or works; there are no rounds.
        assert (s.overhead_s, s.hidden_s, s.tau) == (None, None, None)
    else:
        assert 0 < s.overhead_s < s.computation_s
        assert s.hidden_s >= 0
        assert (s.tau, s.staleness, s.quarantined) == (3, 0, 0)


def kinds(folder):
    """Of a record's lines, with their steps."""
    return [(line.kind, line.step) for line in records.read_lines(folder / records.FILE)]


def test_real_and_virtual_workers_leave_the_same_record(tmp_path):
    config = SMALL.replace(checkpoint_every=4, algorithm="overlap-local-sgd", model="mlp")
    run(trained, 2, tmp_path / "real", config)
    virtual.run(config, Machines(), tmp_path / "virtual", threads=1)
    # Only real ones leave a checkpoint at the end, from which more steps can be made.
    *expected, last, summary = kinds(tmp_path / "real")
    assert (last, summary) == (("checkpoint", 10), ("summary", 10))
    assert kinds(tmp_path / "virtual") == [*expected, summary]
    assert not (tmp_path / "virtual" / checkpoint.FOLDER).exists()
    assert checkpoint.exists(tmp_path / "real")
    one, other = (records.read(tmp_path / name) for name in ("real", "virtual"))
    assert (other.logs[-1].exposed_share, other.logs[-1].tau) == (
        other.summary.exposed_share,
        other.summary.tau,
    )
    # A real one logs the loss of rank 0, a virtual one the mean over the workers.
    assert [e.test_loss for e in one.evaluations] == pytest.approx(
        [e.test_loss for e in other.evaluations], rel=1e-4
    )
    assert (one.summary.syncs, one.summary.bytes) == (other.summary.syncs, other.summary.bytes)


def resumed_by_real_ones(rank, folder, config):
    with pytest.raises(ValueError, match="a checkpoint of virtual workers, with which real ones"):
        train(config, folder, resume=True)


def test_workers_of_one_kind_do_not_go_on_from_a_checkpoint_of_the_other(tmp_path):
    config = SMALL.replace(model="mlp")
    workers = Virtual(Problem(config), Machines(), threads=1)
    Run(workers, tmp_path / "virtual").train()
    run(resumed_by_real_ones, 2, tmp_path / "virtual", config)
    run(trained, 2, tmp_path / "real", config)
    with pytest.raises(ValueError, match="a checkpoint of real workers, with which virtual ones"):
        virtual.run(config, Machines(), tmp_path / "real", threads=1)
    with pytest.raises(ValueError, match="workers=3: the checkpoint is of another number"):
        virtual.run(config.replace(workers=3), Machines(), tmp_path / "virtual", threads=1)


def test_virtual_workers_that_come_and_go_resume_bit_equal():
    """Also what those that are there have been dealt of the training set."""
    config = SMALL.replace(model="mlp", workers=3, tau=2, algorithm="overlap-local-sgd")
    machines = Machines(step_ms=100.0, lose_every_s=0.5, away_s=0.45, heartbeat_s=0.0)

    def made():
        return Virtual(Problem(config), machines, threads=1)

    def walk(workers, first, last):
        for step in range(first, last):
            workers.step(step)
        return workers

    whole = walk(made(), 0, 16)
    again = made()
    again.load_state_dict(walk(made(), 0, 9).state_dict(), own=True)
    walk(again, 9, 16)
    there = whole.cluster.present
    assert [line.what for line in whole.events()][:3] == ["lost", "back", "lost"]
    assert again.cluster.present == there
    for worker in there:
        ours = whole.cluster.models[worker].parameters()
        assert all(map(torch.equal, ours, again.cluster.models[worker].parameters()))


def test_gradients_are_not_averaged_among_machines_that_come_and_go():
    with pytest.raises(ValueError, match=r"ddp on machines that come and go .*: allowed is a meth"):
        check_virtual(RunConfig(algorithm="ddp", tau=1), Machines(lose_every_s=1.0))
