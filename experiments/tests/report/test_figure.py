import io
import struct

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.report.figure import draw, smooth
from distoptim_experiments.report.table import note, table
from rich.console import Console


def record(name, seconds=10.0, **changes):
    config = RunConfig(latency_ms=3.0, bandwidth_gbit_s=0.5)
    config = config.model_copy(update={"algorithm": name, **changes})
    start = records.Start(
        label=name,
        config=config,
        surroundings=records.surroundings(),
        steps=10,
        steps_per_epoch=10,
        parameters=1,
    )
    logs = [
        records.Log(step=i, epoch=i / 10, seconds=seconds * i / 10, loss=2.0 / (i + 1))
        for i in range(1, 11)
    ]
    summary = records.Summary(
        step=10,
        diverged=False,
        test_accuracy=0.98765,
        test_loss=0.04321,
        seconds=seconds,
        exposed_s=0.3 * seconds,
        overhead_s=None if name == "ddp" else 0.1 * seconds,
        hidden_s=None,
        bytes=12_345_678,
        syncs=99,
    )
    return records.Record(start, logs, [], summary)


@pytest.mark.parametrize("names", [["ddp"], ["ddp", *(f"method-{i}" for i in range(8))]])
def test_a_picture_of_the_promised_size_is_drawn(tmp_path, names):
    draw([record(name, 10.0 - i) for i, name in enumerate(names)], tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">2I", content[16:24]) == (1920, 720)


def test_the_table_fits_a_narrow_terminal_and_shows_every_figure():
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(table([record("overlap-local-sgd"), record("ddp")]))
    figures = ["98.77%", "0.043", "10.0"]
    rows = [line.split() for line in console.export_text().splitlines()[-2:]]
    assert rows == [
        ["overlap-local-sgd", *figures, "50.0%", "16.7%", "12.3", "99"],
        # DDP's overhead is within what is exposed.
        ["ddp", *figures, "42.9%", "-", "12.3", "99"],
    ]


def test_the_note_tells_effective_learning_rates():
    overlap = "overlap-local-sgd"
    assert "0.69 times" in note([record("ddp"), record(overlap)])
    # (1 - alpha) / (1 - alpha outer_momentum)
    assert "0.97 times" in note([record(overlap, options={"alpha": 0.1})])
    assert "0.4 times" in note([record(overlap, options={"outer_momentum": 0.0})])
    assert "0.32 times" in note([record(overlap, options={"alpha": 0.7, "outer_momentum": 0.1})])
    # The factor is that of a mean a whole round late.
    assert "times" not in note([record(overlap, options={"delay": 0})])
    assert "4 times in BMUF" in note([record("bmuf")])
    assert "10 times in BMUF" in note([record("bmuf", options={"block_momentum": 0.9})])
    assert note([record("ddp")]) == "All learning rates are 0.05, as given."


def test_smoothing_keeps_the_start_and_follows():
    assert smooth([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    assert smooth([0.0, 1.0], weight=0.25) == [0.0, 0.25]
