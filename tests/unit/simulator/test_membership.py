"""Virtual workers that are lost, leave and come back: what the others hold, and when."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distoptim import ALGORITHMS
from distoptim.simulator import Change, Cluster, Constant, Listed, Regular

WORKERS = 4
TAU = 4
STEP_S = 1.0
MEAN_S = 0.3


class Fixed:
    """A network on which every mean takes equally long."""

    def all_reduce_s(self, nbytes, workers):
        return MEAN_S


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def loss(model, rank, *, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 6, generator=generator)
    return (model(x) - x[:, :3]).square().mean()


def cluster(algorithm, changes, *, heartbeat_s=0.5, tau=TAU, **options):
    return Cluster(
        workers=WORKERS,
        model=model,
        threads=1,
        optimizer=lambda params, communicator: ALGORITHMS[algorithm](
            params, lr=0.1, tau=tau, communicator=communicator, **options
        ),
        compute=Constant(STEP_S),
        network=Fixed(),
        churn=None if changes is None else Listed(changes),
        heartbeat_s=heartbeat_s,
    )


def walk(workers, steps):
    for _ in range(steps):
        workers.step(partial(loss, step=workers.steps))


# One is lost in the middle of a round; two at once, of which one on the way of a mean, and both come back with one
# mean; one says goodbye.
CHANGES = [
    Change(6.0, 2, "lost"),
    Change(16.2, 1, "lost"),
    Change(16.2, 3, "lost"),
    Change(19.0, 1, "back"),
    Change(19.0, 2, "back"),
    Change(33.0, 0, "left"),
    Change(40.0, 0, "back"),
]
VARIED = [
    ("overlap-local-sgd", {"fragments": 3, "codec": "int8+ef"}),
    ("local-sgd", {"codec": "1bit+ef"}),
    ("diloco", {"fragments": 2}),
    ("co2", {}),
    ("cocod-sgd", {}),
    ("easgd", {"tau": 2, "fragments": 2}),
]


@pytest.mark.parametrize(("algorithm", "options"), VARIED)
def test_those_that_are_there_hold_the_same(algorithm, options):
    workers = cluster(algorithm, CHANGES, **options)
    there = set()
    for _ in range(15 * TAU):
        walk(workers, 1)
        there.add(tuple(workers.present))
        optimizers = [workers.optimizers[rank] for rank in workers.present]
        assert {o.local_step for o in optimizers} == {workers.steps}
        # Who has just come is ahead: with the mean of its first launch, which others have still to merge.
        counts = [[sync.merges for sync in o.engine.syncs] for o in optimizers]
        if all(count == counts[0] for count in counts) and optimizers[0].engine.shared_state()[0]:
            assert len({o.anchor_digest() for o in optimizers}) == 1
    assert {(0, 1, 3), (0,), (0, 1, 2), (1, 2)} <= there
    assert workers.present == [0, 1, 2]
    for rank in (1, 2):
        assert workers.optimizers[rank].stats()["catch_ups"] == 1
    change = max(
        float((a - b).detach().abs().max())
        for a, b in zip(workers.models[1].parameters(), model().parameters(), strict=True)
    )
    assert 0.01 < change < 10


def test_nobody_who_goes_changes_nothing():
    fixed = cluster("overlap-local-sgd", None)
    walk(fixed, 5 * TAU)
    elastic = cluster("overlap-local-sgd", [])
    walk(elastic, 5 * TAU)
    for one, other in zip(fixed.models, elastic.models, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert elastic.fabric.clocks == fixed.fabric.clocks


def test_a_mean_during_which_one_is_lost_never_comes_and_the_next_waits_for_the_heartbeat():
    """Launched at 4 s, it would end at 4.3 s."""
    workers = cluster("local-sgd", [Change(4.1, 1, "lost")], heartbeat_s=10.0)
    walk(workers, 2 * TAU)
    assert workers.present == [0, 2, 3]
    # Of the blocking mean at 4 s nobody waits longer than to 4.1 s; that of 8 local steps begins at 14.1 s.
    assert workers.seconds() == pytest.approx(4.1 + 10.0 + MEAN_S)
    assert workers.stats()["lost"] == 1
    assert workers.stats()["syncs"] == 1


def test_nobody_waits_for_one_that_leaves_and_no_mean_is_lost():
    workers = cluster("local-sgd", [Change(4.1, 1, "left")], heartbeat_s=10.0)
    walk(workers, 2 * TAU)
    assert workers.present == [0, 2, 3]
    assert workers.seconds() == pytest.approx(2 * TAU * STEP_S + 2 * MEAN_S)
    assert workers.stats()["lost"] == 0
    assert workers.stats()["syncs"] == 2


@pytest.mark.parametrize("stop", [17, 18, 21, 34])
def test_a_run_that_is_resumed_goes_on_bit_equal(stop):
    whole = cluster("overlap-local-sgd", CHANGES, fragments=3, codec="int8+ef")
    walk(whole, 12 * TAU)
    stopped = cluster("overlap-local-sgd", CHANGES, fragments=3, codec="int8+ef")
    walk(stopped, stop)
    again = cluster("overlap-local-sgd", CHANGES, fragments=3, codec="int8+ef")
    again.load_state_dict(stopped.state_dict())
    walk(again, 12 * TAU - stop)
    assert again.present == whole.present
    assert again.fabric.clocks == whole.fabric.clocks
    for rank in whole.present:
        ours = whole.models[rank].parameters()
        assert all(map(torch.equal, ours, again.models[rank].parameters()))


def test_one_every_so_often_is_away_for_a_while():
    changes = Regular(every_s=10.0, away_s=25.0, seed=3).changes(4)
    there = {0, 1, 2, 3}
    fewest = 4
    losses = []
    for _ in range(200):
        change = next(changes)
        (there.add if change.what == "back" else there.remove)(change.worker)
        fewest = min(fewest, len(there))
        if change.what == "lost":
            losses.append(change)
    assert fewest == 1
    assert {change.worker for change in losses} == {0, 1, 2, 3}
    assert all(change.seconds % 10.0 == 0 for change in losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(1.0, 4, "lost")], "there are 4 workers, from 0 on"),
        ([(1.0, 1, "back")], "it is there"),
        ([(1.0, 1, "lost"), (2.0, 1, "left")], "it is away"),
        ([(1.0, rank, "lost") for rank in range(4)], "nobody would be left"),
    ],
)
def test_what_cannot_happen_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cluster("local-sgd", [Change(*change) for change in changes])


def test_a_file_says_which_line_is_wrong(tmp_path):
    path = tmp_path / "churn.csv"
    path.write_text("# seconds,worker,what\n1.5,0,lost\n\n3,0,back\n")
    assert Listed.read(path).listed == [Change(1.5, 0, "lost"), Change(3.0, 0, "back")]
    path.write_text("1.5,0,lost\n2,0,gone\n")
    with pytest.raises(ValueError, match=r"churn.csv, line 2: expected seconds,worker,what .*gone"):
        Listed.read(path)


def test_gradients_of_workers_that_come_and_go_are_not_averaged():
    with pytest.raises(ValueError, match="allowed are workers with rounds"):
        Cluster(
            workers=2,
            model=model,
            optimizer=lambda params, communicator: ALGORITHMS["local-sgd"](
                params, lr=0.1, tau=1, communicator=communicator
            ),
            synchronous=True,
            churn=Listed([]),
        )
