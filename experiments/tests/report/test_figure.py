import itertools
import struct

import pytest
from distoptim_experiments.records import Record
from distoptim_experiments.report.figure import draw, smooth, spread
from distoptim_experiments.report.table import note, table
from rich.console import Console


def record(name, seconds=10.0):
    config = {
        "algorithm": name,
        "model": "cnn",
        "data": "digits",
        "batch_size": 32,
        "tau": 4,
        "lr": 0.05,
        "workers": 4,
        "latency_ms": 3.0,
        "bandwidth_gbit_s": 0.5,
    }
    start = {"workers": 4, "machine": {"cores": 2, "processor": "some CPU"}}
    logs = [{"seconds": seconds * i / 10, "loss": 2.0 / (i + 1)} for i in range(1, 11)]
    summary = {
        "seconds": seconds,
        "computation_s": 0.7 * seconds,
        "exposed_s": 0.3 * seconds,
        "exposed_share": 3 / 7,
        "test_accuracy": 0.98765,
        "test_loss": 0.04321,
        "bytes": 12_345_678,
        "syncs": 99,
    }
    return Record(config, start, logs, [], summary)


@pytest.mark.parametrize(
    "names", [["ddp"], ["ddp", "bmuf", "overlap-local-sgd"], [f"method-{i}" for i in range(9)]]
)
def test_a_picture_of_the_promised_size_is_drawn(tmp_path, names):
    draw([record(name, 10.0 - i) for i, name in enumerate(names)], tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">2I", content[16:24]) == (1920, 720)


def test_the_table_fits_a_narrow_terminal_and_shows_every_figure():
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115  # open as long as the console
    console.print(table([record("overlap-local-sgd")]))
    row = console.export_text().splitlines()[-1].split()
    assert row == ["overlap-local-sgd", "98.77%", "0.043", "10.0", "42.9%", "12.3", "99"]


def test_the_note_tells_effective_learning_rates():
    assert "0.69 times" in note([record("ddp"), record("overlap-local-sgd")])
    assert "4 times" in note([record("bmuf")])
    assert note([record("ddp")]) == "All learning rates are 0.05, as given."


@pytest.mark.parametrize(
    "heights",
    [
        [0.5],
        [0.1, 0.9],
        [0.5, 0.5, 0.5],
        [0.02, 0.01, 0.0, 0.5],
        [0.99, 0.98, 0.97, 1.0],
        [0.3, 0.33, 0.36, 0.2, 0.9, 0.91],
        [-0.2, 1.3],
    ],
)
def test_labels_keep_their_order_and_do_not_touch(heights):
    places = spread(heights, gap=0.1)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    assert all(places[b] - places[a] >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in places)


def test_labels_that_have_room_stay_where_they_are():
    assert spread([0.2, 0.8, 0.5], gap=0.1) == [0.2, 0.8, 0.5]


def test_smoothing_keeps_the_start_and_follows():
    assert smooth([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    assert smooth([0.0, 1.0], weight=0.25) == [0.0, 0.25]
