"""The front of accuracy against bytes and latency."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from distoptim_experiments.studies import front

COLUMNS = [
    "label",
    "algorithm",
    "tau",
    "bytes",
    "staleness",
    "test_accuracy",
    "validation_accuracy",
    "seed",
]
RUNS = [
    ("DDP", "ddp", 1, 4000, math.nan, 0.90, 0.91, 0),
    ("DDP", "ddp", 1, 4000, math.nan, 0.92, 0.91, 1),
    ("few bits", "global-momentum", 1, 140, 1.0, 0.90, 0.90, 0),
    ("few bits", "global-momentum", 1, 140, 1.0, 0.91, 0.90, 1),
    ("late", "overlap-bmuf", 8, 500, 8.0, 0.89, 0.88, 0),
    ("waits", "local-sgd", 8, 140, 0.0, 0.91, 0.91, 0),
]


@pytest.fixture
def runs():
    table = pd.DataFrame(RUNS, columns=COLUMNS)
    return table.assign(
        model="cnn-small", partition="iid", step=525, options="{}", lr=0.1, diverged=False
    )


def test_methods_are_told_by_their_distance_to_ddp_and_their_share_of_its_bytes(runs):
    (task,) = front.tasks(runs)
    found = front.cells(runs, task).set_index("label")
    assert found.share.to_dict() == {"DDP": 1, "few bits": 0.035, "late": 0.125, "waits": 0.035}
    assert found.behind.to_dict() == pytest.approx(
        {"DDP": 0, "few bits": 0.5, "late": 2, "waits": 0}
    )
    assert found.spread["few bits"] == pytest.approx(0.5**0.5)
    assert found.delay.to_dict() == {"DDP": 0, "few bits": 1, "late": 8, "waits": 0}


def test_the_best_of_a_budget_hides_its_latency_and_is_chosen_on_the_validation_set(runs):
    found = front.cells(runs, front.tasks(runs)[0])
    assert front.best(found, 1 / 8, 1).label == "few bits"
    assert front.best(found, 1 / 8, 2).label == "late"
    assert front.best(found, 1 / 27, 2) is None
    table = front.front(runs)
    assert table[0] == ["a message takes", "bytes, at most", "IID, 525 steps"]
    assert ["1 step", "1/27", "+0.50 +- 0.71 (few bits)"] in table
    assert ["8 steps", "1/8", "+2.00 (late)"] in table
    assert front.everything(runs)[1:] == [
        ["DDP", "+0.00 +- 1.41"],
        ["few bits", "+0.50 +- 0.71, 1/28.6"],
        ["late", "+2.00, 1/8"],
        ["waits", "+0.00, 1/28.6"],
    ]


def test_pictures_are_drawn_of_what_there_is(runs):
    for picture in (front.by_bytes(runs), front.by_latency(runs)):
        assert picture.startswith(b"\x89PNG")
