import contextlib
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from distoptim_experiments import optimizers, records
from distoptim_experiments.cli.options import MEANING, OWN, algorithm_options, config_of
from distoptim_experiments.cli.simulate import ONLY_REAL, SimulateOptions, TimingOptions
from distoptim_experiments.cli.train import CompareOptions, Folder, TrainOptions
from distoptim_experiments.config import RunConfig, algorithms
from distoptim_experiments.machines import Machines
from distoptim_experiments.settings import NoOption, Option
from distoptim_experiments.training import checkpoint
from distoptim_experiments.training.elastic import ElasticOptions
from distoptim_experiments.training.launch import WorkerError

import distoptim
from distoptim import __main__ as console
from distoptim import cli
from distoptim.algorithms import ALGORITHMS
from distoptim.testing.processes import free_port, run

TINY = (
    "--data",
    "synthetic",
    "--model",
    "mlp",
    "--workers",
    "2",
    "--batch-size",
    "8",
    "--log-every",
    "1",
)
ELSEWHERE = """
import distoptim

class HalfWay(distoptim.AveragingOptimizer):
    def __init__(self, params, *, tau, part_of_the_way: float = 0.5, **options):
        super().__init__(params, rule=None, tau=tau, **options)
"""


def test_version_and_help(invoke):
    version = f"distoptim, version {distoptim.__version__}\n"
    assert invoke("--version") == (0, version, "")
    assert "compare" in invoke()[1]
    code, out, _ = invoke("train", "--help")
    assert code == 0
    for part in (
        "─ Training ─",
        "─ Workers and network ─",
        "─ Results ─",
        "--tau INT",
        "[default: 4]",
        "Gbit/s",
        "bf16, int8, e3m0,",
        "--carry --no-carry",
        "--eager --no-eager",
        "--adacomm INT",
        "--tau-at STEP:TAU,...",
        "--levels PERIOD:SIZE,...",
        "--island-size INT",
        "--island-kind CHOICE",
        "[choices: ddp, fsdp2]",
        "--reset-inner --no-reset-inner",
    ):
        assert part in out
    assert invoke("train", "-h")[1] == out
    assert "--methods" in invoke("compare", "--help")[1]


def commands():
    app = cli.application()
    return {name: app[name] for name in app if not name.startswith("-")}


def options(command):
    """Of a subcommand, by name; positional arguments are none."""
    return {
        argument.field_info.name: argument
        for argument in commands()[command].assemble_argument_collection()
        if argument.names[0].startswith("--")
    }


def options_of_the_algorithms():
    return {name for algorithm in algorithms() for name in optimizers.own_options(algorithm)}


def test_the_help_of_every_command_lists_all_its_options(invoke):
    assert sorted(commands()) == [
        "compare",
        "lighthouse",
        "partition",
        "plan",
        "probe",
        "report",
        "reproduce",
        "simulate",
        "timeline",
        "train",
    ]
    for command in commands():
        code, out, err = invoke(command, "--help")
        assert (code, err) == (0, "")
        for argument in options(command).values():
            for name in argument.names:
                assert re.search(rf"{name}\b", out), (command, name)


@pytest.mark.parametrize(
    ("command", "models", "without"),
    [
        ("train", (RunConfig, Folder, TrainOptions, ElasticOptions), ()),
        ("compare", (RunConfig, Folder, CompareOptions), ("algorithm", "checkpoint_every")),
        (
            "simulate",
            (RunConfig, Machines, Folder, SimulateOptions, TimingOptions),
            {"algorithm", "tau", "seed", *ONLY_REAL} - {*Machines.model_fields},
        ),
    ],
)
def test_every_field_of_the_models_is_an_option_or_marked_as_none(command, models, without):
    wanted = options_of_the_algorithms()
    for model in models:
        for name, field in model.model_fields.items():
            (mark,) = [m for m in field.metadata if isinstance(m, (Option, NoOption))]
            assert field.description, name
            if isinstance(mark, Option) and name not in without:
                wanted.add(name)
    assert options(command).keys() == wanted


def test_an_algorithm_of_somebody_else_has_its_options(monkeypatch):
    class Mine(distoptim.LocalSGD):
        """Local SGD again.

        Args:
            strength: how hard it pulls.
        """

        def __init__(self, params, *, tau, strength=0.5, **rest):
            super().__init__(params, tau=tau, **rest)

    monkeypatch.setitem(ALGORITHMS, "mine", Mine)
    made = {option.name: option for option in algorithm_options()}
    assert made["strength"].help == "how hard it pulls. Of mine."
    assert made["strength"].kind is float
    assert "all but ddp and powersgd" in made["codec"].help
    assert config_of({"algorithm": "mine", "strength": 2.0}).options == {"strength": 2.0}


def test_all_commands_that_train_have_all_options_of_the_algorithms():
    wanted = options_of_the_algorithms()
    for command in ("train", "compare", "simulate"):
        own = {
            name
            for name, argument in options(command).items()
            if argument.parameter.group[0].name == OWN
        }
        assert own == wanted, command
    assert MEANING.keys() == wanted


def test_virtual_workers_are_not_said_to_be_processes(invoke):
    workers = re.search(r"--workers INT +(.*?) +--", invoke("simulate", "--help")[1], re.DOTALL)
    assert (
        " ".join(workers[1].replace("│", "").split())
        == "How many there are, without a process of their own. [default: 16]"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "--tau", "0"), "tau=0: allowed is an integer, 1 or more"),
        (("train", "--tau", "x"), "--tau: 'x': allowed is an integer, 1 or more"),
        (
            ("train", "--algorithm", "sgd"),
            'Invalid value "sgd" for --algorithm. Choose from: "ddp", "local-sgd"',
        ),
        (("train", "--algorithm", "bmuf", "--alpha", "0.5"), "bmuf takes no alpha"),
        (("train", "--algorithm", "diloco", "--delay", "2", "--no-carry"), "delay=2 without carry"),
        (
            ("train", "--adacomm", "5", "--hide-communication"),
            "hide_communication=True with adacomm=5",
        ),
        (
            ("train", "--equal-time", "2"),
            "equal_time=2.0: how many rounds an epoch has is not known",
        ),
        (
            ("train", "--equal-time", "2", "--steps", "9", "--adacomm", "5"),
            "adacomm=5 with equal_time=2.0",
        ),
        (("simulate", "--speeds", "1,0"), "speeds=0.0: allowed is a number in (0, 1e+09]"),
        (("simulate", "--levels", "2:2"), "Unknown option"),
        (("simulate", "--island-size", "2"), "Unknown option"),
        (("train", "--island-size", "5"), "batch_size=32 with island_size=5"),
        (
            (
                "train",
                "--init",
                "tcp://localhost:1",
                "--rank",
                "0",
                "--world-size",
                "3",
                "--island-size",
                "2",
            ),
            "island_size=2 with 3 ranks: allowed is a number that divides it",
        ),
        (("train", "--alpha", "3"), "alpha=3.0: allowed is a number in [0, 1]"),
        (("train", "--tau", "2.5"), "--tau: '2.5': allowed is an integer, 1 or more"),
        (("train", "--taux", "3"), "Unknown option"),
        (("trian",), 'Unknown command "trian"'),
        (("train", "--data", "mnist"), "needs --data-dir, the folder with train-images-idx3-ubyte"),
        (
            ("train", "--data", "mnist", "--data-dir", "nowhere"),
            "nowhere: missing train-images-idx3-ubyte",
        ),
        (("train", "--resume", "nowhere"), "nowhere: no checkpoint there to resume from"),
        (("train", "--rank", "1"), "--rank and --world-size go with --init"),
        (
            ("train", "--init", "tcp://localhost", "--rank", "0", "--world-size", "2"),
            "expected tcp://HOST:PORT",
        ),
        (
            ("train", "--init", "tcp://localhost:1", "--rank", "2", "--world-size", "2"),
            "0 <= rank < world size",
        ),
        (("compare", "--methods", "ddp,ddp"), "a list of different methods"),
        (("compare", "--methods", "ddp,x"), "algorithm='x': allowed is one of"),
        (
            ("compare", "--methods", "ddp,bmuf", "--alpha", "0.5"),
            "ddp, bmuf: none of them takes alpha; it is an option of easgd, overlap-local-sgd",
        ),
        (
            ("simulate", "--approximation-rank", "2"),
            "overlap-local-sgd: none of them takes approximation_rank",
        ),
        (
            ("simulate", "--methods", "ddp,easgd", "--alpha", "3"),
            "alpha=3.0: allowed is a number in (0, 0.11",
        ),
        (
            ("simulate", "--timing", "--alpha", "0.5"),
            "--alpha 0.5: has an effect only without --timing",
        ),
        (("compare", "--latency-ms", "-1"), "latency_ms=-1.0: allowed is a number in [0, inf)"),
    ],
)
def test_a_wrong_value_gives_one_line(invoke, args, message):
    code, out, err = invoke(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


def test_compare_leaves_table_picture_and_records(invoke, tmp_path):
    code, out, err = invoke(
        "compare", *TINY, "--steps", "6", "--evaluate-every", "3", "--alpha", "0.3"
    )
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {folder.relative_to(tmp_path)}/comparison.png" in out
    table = [line.split() for line in out.splitlines() if "%" in line and line.split()[0].islower()]
    methods = ["ddp", "local-sgd", "easgd", "cocod-sgd", "bmuf", "overlap-local-sgd"]
    methods += ["global-momentum"]
    assert [row[0] for row in table if row[0] in methods][-7:] == methods
    for name in methods:
        record = records.read(folder / name)
        assert record.config.algorithm == name
        assert record.config.options == (
            {"alpha": 0.3} if name in ("easgd", "overlap-local-sgd") else {}
        )
        assert [line.step for line in record.logs] == [1, 2, 3, 4, 5, 6]
        assert record.summary.step == 6
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = invoke("compare", *TINY, "--steps", "6", "--folder", folder)
    assert (code, err) == (
        2,
        f"Error: --folder {folder}: there are runs in it; give another folder\n",
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_tau_that_is_measured_is_simulated_once(invoke):
    assert (
        "1/1 runs"
        in invoke(
            "simulate",
            *TINY,
            "--methods",
            "overlap-local-sgd",
            "--hide-communication",
            "--steps",
            "1",
        )[1]
    )


def test_train_then_resume_for_longer(invoke, tmp_path):
    code, out, err = invoke(
        "train", *TINY, "--algorithm", "easgd", "--alpha", "0.2", "--steps", "5", "--folder", "a"
    )
    assert (code, err) == (0, "")
    assert "easgd" in out
    code, out, err = invoke("train", "--resume", "a", "--steps", "9")
    assert (code, err) == (0, "")
    record = records.read(tmp_path / "a")
    assert [line.step for line in record.logs] == list(range(1, 10))
    resumed = [
        line for line in records.read_lines(tmp_path / "a" / records.FILE) if line.kind == "resume"
    ]
    assert resumed[0].config == record.config.replace(steps=9)
    assert record.config.options == {"alpha": 0.2}


def test_train_with_flags_of_the_algorithm_a_table_of_tau_and_levels(invoke, tmp_path):
    code, _, err = invoke(
        "train",
        *TINY,
        "--workers",
        "4",
        "--algorithm",
        "diloco",
        "--delay",
        "2",
        "--carry",
        "--tau",
        "4",
        "--tau-at",
        "6:2",
        "--levels",
        "1:2",
        "--steps",
        "12",
        "--folder",
        "a",
    )
    assert (code, err) == (0, "")
    record = records.read(tmp_path / "a")
    assert record.config.options == {"delay": 2, "carry": True}
    # Launched at 4, 8, 10 and 12, of which the last is on its way; and a mean of each pair after
    # every step.
    assert record.summary.syncs == 3 + 12
    assert record.summary.tau == 2
    code, _, err = invoke("train", "--resume", "a", "--steps", "13", "--no-carry")
    assert (code, err) == (
        2,
        "Error: delay=2 without carry: adopting a late anchor throws away the local steps made "
        "meanwhile; use delay=0, or carry=True, which keeps them, or OverlapLocalSGD, which "
        "pulls instead\n",
    )


@pytest.mark.parametrize("left", [records.FILE, f"{checkpoint.FOLDER}/latest"])
def test_a_folder_with_a_run_is_refused_without_resume(invoke, tmp_path, left):
    (tmp_path / "a" / left).parent.mkdir(parents=True)
    (tmp_path / "a" / left).write_text("step-6")
    assert invoke("train", *TINY, "--folder", "a") == (
        2,
        "",
        "Error: --folder a: there is a run in it; go on with --resume a, or with --auto-resume beside --folder, "
        "or give another folder\n",
    )
    assert (tmp_path / "a" / left).read_text() == "step-6"


@pytest.fixture
def begun(tmp_path):
    """A folder with what a resumed run is asked about."""
    config = RunConfig(
        data="synthetic", model="mlp", seed=3, algorithm="local-sgd", options={"codec": "int8"}
    )
    (tmp_path / "a" / checkpoint.FOLDER).mkdir(parents=True)
    (tmp_path / "a" / checkpoint.FOLDER / "latest").write_text("step-6")
    writer = records.RecordWriter(tmp_path / "a" / records.FILE)
    writer.write(
        records.Start(
            label="local-sgd",
            config=config,
            surroundings=records.surroundings(),
            steps=1,
            steps_per_epoch=1,
            parameters=1,
        )
    )
    writer.close()


@pytest.mark.parametrize(
    ("args", "now", "before"),
    [
        (("--algorithm", "bmuf"), "algorithm='bmuf'", "algorithm='local-sgd'"),
        (("--data", "digits"), "data='digits'", "data='synthetic'"),
        (("--model", "cnn"), "model='cnn'", "model='mlp'"),
        (("--optimizer", "adamw"), "optimizer='adamw'", "optimizer='sgd'"),
        (("--seed", "5"), "seed=5", "seed=3"),
        (("--momentum", "0.5"), "momentum=0.5", "momentum=0.9"),
        (("--no-nesterov",), "nesterov=False", "nesterov=True"),
        (("--partition", "label-skew"), "partition='label-skew'", "partition='iid'"),
        (("--augment",), "augment=True", "augment=False"),
        (("--codec", "bf16"), "codec='bf16'", "codec='int8'"),
        (("--fragments", "2"), "fragments=2", "the default fragments"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_by_name(invoke, begun, args, now, before):
    words = f"Error: {now}: a was begun with {before}, and goes on only with that\n"
    assert invoke("train", "--resume", "a", *args) == (2, "", words)
    assert invoke("train", "--folder", "a", "--auto-resume", *args) == (2, "", words)


def test_what_a_run_was_begun_with_may_be_said_again(invoke, begun):
    # Refused for another reason, after that.
    said = (
        "--data",
        "synthetic",
        "--seed",
        "3",
        "--codec",
        "int8",
        "--momentum",
        "0.9",
        "--workers",
        "0",
    )
    assert (
        invoke("train", "--resume", "a", *said)[2]
        == "Error: workers=0: allowed is an integer, 1 or more\n"
    )
    assert invoke("train", "--resume", "a", "--folder", "b")[2] == (
        "Error: --resume a with --folder b: a run goes on in its own folder\n"
    )


def test_a_picture_goes_where_it_was_told_to_and_over_nothing(invoke, tmp_path):
    command = ("partition", "--data", "synthetic", "--workers", "2", "--out")
    assert invoke(*command, "foo")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["foo"]
    assert (tmp_path / "foo").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "foo").write_text("mine")
    (tmp_path / "utilisation.png").write_text("mine")
    for args, where in (
        ((*command, "foo"), "--out foo: is there"),
        ((*command, "."), "--out .: is there"),
        ((*command, "a.xyz"), "a.xyz: allowed are the suffixes"),
        (("simulate", "--timing", "--folder", "."), "--folder .: utilisation.png is in it"),
    ):
        code, _, err = invoke(*args)
        assert code == 2
        assert err.startswith(f"Error: {where}")
        assert err.count("\n") == 1
    assert (tmp_path / "foo").read_text() == (tmp_path / "utilisation.png").read_text() == "mine"
    assert invoke(*command, "foo", "--force")[0] == 0
    assert (tmp_path / "foo").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 9000,
        "[" * 90_000,
        "[1]",
        '{"latency_s": "x"}',
        '{"latency_s": 1, "step_s": 1, "params": "3", "workers": 2, "bandwidth_gbit_s": 1}',
        '{"latency_s": 1, "step_s": 1, "params": 1e999, "workers": 2, "bandwidth_gbit_s": 1}',
        '{"latency_s": 1, "step_s": 1, "params": 3, "workers": 2.5, "bandwidth_gbit_s": 1}',
        '{"latency_s": 1, "step_s": [1], "params": 3, "workers": 2, "bandwidth_gbit_s": 1}',
    ],
)
def test_a_probe_that_is_none_gives_one_line(invoke, tmp_path, text):
    (tmp_path / "probe.json").write_text(text)
    code, _, err = invoke("plan", "--probe", "probe.json")
    assert code == 2
    assert re.match(r"Error: (probe.json: not a file|\w+=.*: allowed is)", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [("plan", "--probe"), ("reproduce",)])
def test_a_device_is_not_read_for_ever(invoke, command):
    code, _, err = invoke(*command, "/dev/full")
    assert code == 2
    assert re.match(r"Error: (--probe )?/dev/full: .*no (such )?file\n", err)


@pytest.mark.parametrize(
    "args",
    [
        ("simulate", *TINY, "--steps", "1", "--methods", "ddp", "--folder", "file"),
        ("simulate", "--timing", "--folder", "file"),
        ("partition", "--workers", "2", "--out", "file/x.png"),
    ],
)
def test_a_file_where_a_folder_is_wanted_gives_one_line(invoke, tmp_path, args):
    (tmp_path / "file").touch()
    code, _, err = invoke(*args)
    assert code == 2
    assert err.startswith("Error: file")
    assert err.endswith((": Not a directory\n", ": File exists\n"))
    assert err.count("\n") == 1


def press_ctrl_c(record):
    """As a terminal does: to the command and its workers alike, once these have made steps."""
    deadline = time.monotonic() + 300
    while not (record.exists() and '"kind":"log"' in record.read_text().replace(" ", "")):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(invoke, tmp_path):
    pressed = threading.Thread(target=press_ctrl_c, args=(tmp_path / "a" / records.FILE,))
    pressed.start()
    code, _, err = invoke("train", *TINY, "--steps", 10**6, "--folder", "a")
    pressed.join()
    assert (code, err) == (130, "Stopped; go on with: distoptim train --resume a\n")
    step = int(checkpoint.latest(tmp_path / "a").name.removeprefix("step-"))
    code, _, err = invoke("train", "--resume", "a", "--steps", step + 3)
    assert (code, err) == (0, "")
    assert [line.step for line in records.read(tmp_path / "a").logs] == list(range(1, step + 4))


def _by_tcp(rank, port, folder):
    """What it prints, apart from what the other one does."""
    os.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    # An IPv6 address where there are any; torchrun's tests have the others.
    host = "[::1]" if socket.has_dualstack_ipv6() else "127.0.0.1"
    meeting = ("--init", f"tcp://{host}:{port}", "--rank", str(rank), "--world-size", "2")
    sys.argv = ["distoptim", "train", *TINY, "--steps", "4", *meeting, "--folder", "a"]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        console.main()
    return end.value.code, said.getvalue()


def test_two_commands_meet_by_tcp(tmp_path):
    first, second = run(_by_tcp, 2, free_port(), tmp_path, backend=None)
    assert first[0] == 0
    assert "overlap-local-sgd" in first[1]
    assert second == (0, "")
    assert records.read(tmp_path / "a").summary.step == 4


def test_a_worker_that_failed_gives_one_line_and_another_code(invoke, monkeypatch):
    def fails(*_):
        raise WorkerError("worker 1 died: SIGKILL")

    monkeypatch.setattr("distoptim_experiments.cli.train.run_local", fails)
    code, _, err = invoke("train", *TINY)
    assert (code, err) == (1, "Error: worker 1 died: SIGKILL\n")


def test_what_is_not_installed_is_said_in_one_line(invoke, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda group: ())
    message = (
        'Unknown command "train". Available commands: plan, probe, lighthouse. '
        "Those of the experiments: pip install 'distoptim[train]'"
    )
    assert invoke("train") == (2, "", f"Error: {message}\n")
    monkeypatch.delitem(sys.modules, "distoptim.cli")
    monkeypatch.delattr(distoptim, "cli")
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    message = "the command line needs cyclopts: pip install 'distoptim[cli]'"
    assert invoke("plan") == (2, "", f"Error: {message}\n")


def test_the_help_knows_installed_algorithms_and_imports_nothing_that_draws_or_learns(tmp_path):
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    offer = tmp_path / "elsewhere-1.dist-info"
    offer.mkdir()
    (offer / "METADATA").write_text("Name: elsewhere\nVersion: 1\n")
    (offer / "entry_points.txt").write_text(
        "[distoptim.algorithms]\nhalf-way = elsewhere:HalfWay\n"
    )
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); sys.argv = ['distoptim', 'train', '--help']\n"
        "from distoptim.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print({'matplotlib', 'pandas', 'sklearn', 'seaborn'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.endswith("set()\n")
    assert "--part-of-the-way" in done.stdout
    assert "Of half-way." in done.stdout


def test_of_an_option_given_twice_the_last_one_counts(invoke):
    assert "tau=0" in invoke("train", "--tau", "5", "--tau", "0")[2]
