"""Any command line ends well or with one line that says what is wrong: no traceback, and nothing begun."""

from __future__ import annotations

import json
import signal

import hypothesis.strategies as st
import pytest
from distoptim_experiments.cli import simulate, train
from distoptim_experiments.cli.options import algorithm_options, options_of
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from hypothesis import HealthCheck, given, settings

from distoptim.planning import probe

VALUES = st.sampled_from(
    [
        *(
            "",
            " ",
            "0",
            "1",
            "2",
            "4",
            "8",
            "-1",
            "0.5",
            "2.5",
            "1e3",
            "1e400",
            "-1e400",
            "nan",
            "inf",
        ),
        *(
            "None",
            "true",
            "x",
            "é",
            "a\nb",
            "[]",
            "{}",
            "1,2",
            ",",
            "1:2",
            "3" * 5000,
            "--tau",
            "-",
        ),
        *(
            "/",
            ".",
            "/dev/null",
            "/dev/full",
            "nowhere",
            "file",
            "tcp://x",
            "tcp://[::1]:1",
            "tcp://h:1",
        ),
        *("digits", "synthetic", "mlp", "local-sgd", "diloco", "ddp", "ddp,local-sgd", "int8+ef"),
    ]
)
TRAINS = [
    o.name.replace("_", "-")
    for o in (*options_of(RunConfig), *options_of(train.Folder), *algorithm_options())
]
OPTIONS = {
    "plan": [
        "step-s",
        "params",
        "workers",
        "latency-ms",
        "bandwidth-gbit-s",
        "probe",
        "all",
        "json",
    ],
    "probe": ["steps", "backend", "out"],
    "train": [*TRAINS, *(o.name.replace("_", "-") for o in options_of(train.TrainOptions))],
    "compare": [*TRAINS, "methods"],
    "simulate": [
        *TRAINS,
        *(o.name.replace("_", "-") for o in options_of(Machines)),
        *(o.name.replace("_", "-") for o in options_of(simulate.SimulateOptions)),
        *(o.name.replace("_", "-") for o in options_of(simulate.TimingOptions)),
    ],
    "report": ["out", "force"],
    "nonsense": ["help"],
}
STOPPED = 128 + signal.SIGTERM


@st.composite
def lines(draw):
    """A subcommand, a few words, a few options."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = draw(st.lists(VALUES, max_size=1 + (command in ("probe", "report"))))
    chosen = draw(st.lists(st.sampled_from(OPTIONS[command]), unique=True, max_size=4))
    line = [command, *words]
    for name in chosen:
        line.append(f"--{name.removeprefix('--')}")
        if draw(st.booleans()) or draw(st.booleans()):
            line.append(draw(VALUES))
    return line


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """What would start processes or train stops at once."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_local", lambda *_: signal.SIGTERM)
    monkeypatch.setattr(train, "run_worker", lambda *_: signal.SIGTERM)
    monkeypatch.setattr(train.comparison, "compare", lambda *_: signal.SIGTERM)
    monkeypatch.setattr(simulate.simulated, "run_all", stop)
    monkeypatch.setattr(simulate, "_time", stop)
    monkeypatch.setattr(probe, "probe_under_torchrun", lambda *_, **__: None)
    (tmp_path / "file").write_text(json.dumps({"latency_s": 1e-3, "params": [], "workers": 2}))


def check(invoke, line):
    code, out, error = invoke(*line)
    assert "Traceback" not in out + error, (line, error)
    assert code in (0, 2, 130, STOPPED), (line, code, error)
    if code == 2:
        assert error.startswith("Error: "), (line, error)
        # Values may be of several lines.
        assert error.count("\n") <= 1 + sum(word.count("\n") for word in line), (line, error)


fuzz = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.usefixtures("nothing_begins")
@settings(fuzz, max_examples=60)
@given(line=lines())
def test_one_line_says_what_is_wrong(invoke, line):
    check(invoke, line)


@pytest.mark.soak
@pytest.mark.usefixtures("nothing_begins")
@settings(fuzz, max_examples=3000)
@given(line=lines())
def test_one_line_says_what_is_wrong_in_thousands_of_lines(invoke, line):
    check(invoke, line)
