"""The subcommands simulate, plan and probe as a user calls them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from distoptim_experiments import records

from tests.helpers.shell import execute


@pytest.fixture
def distoptim(invoke):
    def run(*arguments, check=0):
        code, out, err = invoke(*arguments)
        assert code == check, err
        return SimpleNamespace(stdout=out, stderr=err)

    return run


LINK = ("--workers", "4", "--latency-ms", "10", "--bandwidth-gbit-s", "1")


def test_plan_prints_a_line_to_paste_and_json(distoptim):
    text = distoptim("plan", "--step-s", "0.1", "--params", "11e6", *LINK).stdout
    assert "optimizer = distoptim.OverlapBMUF(optimizer, tau=8)" in text
    made = json.loads(
        distoptim("plan", "--step-s", "0.1", "--params", "11e6", *LINK, "--json").stdout
    )
    assert made["best"]["speed_up"] > 5
    assert f"because: {made['best']['speed_up']:.1f} times as fast as DDP" in text
    assert made["best"]["tau"] == 8
    assert made["best"] in made["predictions"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--step-s", "0.1"), "missing: --params, --workers"),
        (("plan", "--step-s", "0.1", "--params", "1.5", *LINK), "params=1.5"),
        (
            (
                "plan",
                "--step-s",
                "0.1",
                "--params",
                "10",
                "--workers",
                "4",
                "--latency-ms",
                "1",
                "--bandwidth-gbit-s",
                "-2",
            ),
            "bandwidth_gbit_s=-2",
        ),
        (("simulate", "--workers", "0"), "workers=0"),
        (("simulate", "--bandwidth-gbit-s", "-1"), "bandwidth_gbit_s=-1"),
        (("simulate", "--methods", "adam"), "algorithm='adam'"),
        (("simulate", "--taus", "2;4"), "2;4"),
        (("simulate", "--timing", "--layers", "0"), "layers=0"),
        (("probe", "json:dumps"), "torchrun"),
    ],
)
def test_bad_values_give_one_line(distoptim, arguments, words):
    error = distoptim(*arguments, check=2).stderr
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_simulate_prints_a_table_and_goes_on(distoptim, tmp_path):
    arguments = (
        "simulate",
        "--methods",
        "ddp,easgd",
        "--taus",
        "2,4",
        "--steps",
        "6",
        "--workers",
        "3",
        "--model",
        "mlp",
        "--data",
        "synthetic",
        "--folder",
        str(tmp_path),
        "--alpha",
        "0.1",
        "--codec",
        "bf16",
    )
    text = distoptim(*arguments).stdout
    assert "3/3 runs" in text
    assert text.count("easgd") == 2
    options = {
        record.config.algorithm: record.config.options
        for record in map(records.read, tmp_path.iterdir())
    }
    assert options == {"ddp": {}, "easgd": {"alpha": 0.1, "codec": "bf16"}}
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*/record.jsonl"))
    distoptim(*arguments)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.glob("*/record.jsonl")) == before
    assert len(before) == 3


def test_timing_prints_and_draws(distoptim, tmp_path):
    text = distoptim("simulate", "--timing", "--params", "1e8", "--folder", str(tmp_path)).stdout
    assert "overlap-local-sgd" in text
    assert "layerwise-streaming-diloco-delay1" in text
    assert (tmp_path / "utilisation.png").stat().st_size > 10_000


def test_a_probe_under_torchrun_feeds_the_plan(distoptim, tmp_path):
    (tmp_path / "mycode.py").write_text(
        "import time, torch\n\ndef prepare():\n    return torch.nn.Linear(10, 10), lambda: time.sleep(0.01)\n"
    )
    execute("torchrun --nproc-per-node=2 -m distoptim probe mycode:prepare --steps 3", tmp_path)
    made = json.loads(distoptim("plan", "--probe", str(tmp_path / "probe.json"), "--json").stdout)
    assert made["predictions"][0]["algorithm"] == "ddp"


def test_a_damaged_probe_gives_one_line(distoptim, tmp_path):
    (tmp_path / "probe.json").write_text("[1]")
    error = distoptim("plan", "--probe", str(tmp_path / "probe.json"), check=2).stderr
    assert "probe.json: not a file that" in error
