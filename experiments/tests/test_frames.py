"""Runs as tables, in files and of records."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from distoptim_experiments import frames
from distoptim_experiments.report import report, runs

from experiments.tests.report.records import lines, put


def filled(folder):
    put(folder / "final", "a", lines(options={"alpha": 0.1, "delay": 2}, latency_ms=1.5))
    put(folder / "final", "b", lines(seed=1, diverged=True))
    put(folder / "trials", "c", lines(label="CoCoD-SGD"))
    return frames.read(folder)


def test_the_files_hold_what_the_records_do(tmp_path):
    before = filled(tmp_path)
    assert list(before.ended.stage) == ["final", "final", "trial"]
    assert list(before.ended.options) == ['{"alpha": 0.1, "delay": 2}', "{}", "{}"]
    assert [path.name for path in frames.write(tmp_path)] == [frames.RUNS, frames.CURVES]
    for place in ("final", "trials"):
        for path in (tmp_path / place).rglob("*.jsonl"):
            path.unlink()
    after = frames.read(tmp_path)
    pd.testing.assert_frame_equal(after.ended, before.ended, check_exact=True)
    # Of trials no picture is drawn; losses are rounded to six digits.
    curves = before.curves[before.curves.run != "trials/c"]
    assert len(after.curves) == len(curves) == 22
    pd.testing.assert_frame_equal(
        after.curves.reset_index(drop=True), curves.reset_index(drop=True), rtol=1e-5
    )


def test_studies_below_a_folder_are_read_together_and_named_by_their_places(tmp_path):
    for name in ("one", "two"):
        filled(tmp_path / name)
        frames.write(tmp_path / name)
    assert len(frames.read(tmp_path).ended) == 6
    assert set(frames.read(tmp_path).ended.run) >= {"one/final/a", "two/trials/c"}


def test_a_run_older_than_a_setting_was_made_as_by_its_default(tmp_path):
    filled(tmp_path)
    path, _ = frames.write(tmp_path)
    table = pd.read_csv(path, dtype=str)
    table["timeline"] = ["", "True", "True"]
    table["nesterov"] = ["", "False", "False"]
    table.to_csv(path, index=False)
    for record in tmp_path.rglob("*.jsonl"):
        record.unlink()
    found = frames.read(tmp_path).ended
    assert list(found.timeline) == [False, True, True]
    assert list(found.nesterov) == [True, False, False]


def test_curves_are_thinned_from_their_ends():
    steps = range(1, 121)
    curves = pd.DataFrame({"run": "a", "step": steps, "epoch": 1.0, "seconds": 1.0, "loss": 1.0})
    assert list(frames.thinned(curves, 50).step) == list(range(3, 121, 3))
    assert list(frames.thinned(curves, 120).step) == list(steps)


@pytest.mark.parametrize(
    ("line", "table", "values", "said"),
    [
        (0, "config", {"data": ""}, "without data"),
        (0, "config", {"lr": math.nan}, "without lr"),
        (0, "surroundings", {"date": ""}, "without date"),
        (-1, None, {"seconds": math.nan, "diverged": True}, "without computation_s, seconds"),
        (-1, None, {"bytes": 10**30}, None),
        (0, "surroundings", {"machine": {"processor": "", "cores": 1, "system": ""}}, None),
    ],
)
def test_odd_records_are_left_out_by_name_or_shown(tmp_path, line, table, values, said):
    odd = lines(label="CoCoD-SGD")
    (odd[line] if table is None else odd[line][table]).update(values)
    put(tmp_path / "final", "a", lines())
    put(tmp_path / "final", "b", odd)
    found = runs.named(frames.read(tmp_path))
    assert len(found.ended) == (2 if said is None else 1)
    assert found.notes == ([] if said is None else [f"damaged, left out: final/b: {said}"])
    report.write(found, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("runs.csv", lambda text: "", "No columns to parse"),
        ("runs.csv", lambda text: text.replace("exposed_s", "exp"), "no column exposed_s"),
        ("runs.csv", lambda text: text.replace(",200,", ",many,"), "invalid literal|could not"),
        ("runs.csv", lambda text: text.replace("False", "no"), "expected True or False"),
        ("runs.csv", lambda text: text.replace("Local SGD", ""), "a row without label"),
        ("curves.csv", lambda text: text.replace("loss", "less"), "no column loss"),
        ("curves.csv", None, "No such file"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, change, words):
    filled(tmp_path)
    frames.write(tmp_path)
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"{name}: .*({words})") as raised:
        frames.read(tmp_path)
    assert "\n" not in str(raised.value)
