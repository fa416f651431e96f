"""How the processes of a command end with it, and what they leave open to others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distoptim_experiments import records
from distoptim_experiments.config import RunConfig
from distoptim_experiments.training.launch import Job, run_worker
from distoptim_experiments.training.rendezvous import at_url

from distoptim.testing.processes import forking, free_port

TRAIN = (
    *(sys.executable, "-m", "distoptim", "train", "--data", "synthetic", "--model", "mlp"),
    *("--workers", "2", "--batch-size", "8", "--log-every", "1"),
)
# A bound for what hangs, wide enough for a machine that is busy with other things.
PATIENCE_S = 120.0
PROC = Path("/proc")
linux = pytest.mark.skipif(not PROC.is_dir(), reason="looks at other processes through /proc")


def until(holds):
    """Wait until `holds()` is true; returns what it says."""
    deadline = time.monotonic() + PATIENCE_S
    while not (said := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return said


def tree(pid):
    """A process and all that it has started."""
    found = [pid]
    for task in (PROC / str(pid) / "task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return found


def state(pid):
    """A letter, as in ps; Z is one that has ended and of which nobody has asked."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return (PROC / str(pid) / "stat").read_text().rpartition(") ")[2][0]
    return "Z"


def listening(pids):
    """The addresses at which processes wait for connections, as in /proc/net/tcp."""
    sockets = set()
    for pid in pids:
        for descriptor in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                sockets.update(re.findall(r"^socket:\[(\d+)\]$", str(descriptor.readlink())))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in (PROC / "net" / table).read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


@contextlib.contextmanager
def in_training(folder) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command whose two workers have made steps, and all its processes."""
    command = subprocess.Popen(
        [*TRAIN, "--steps", "1000000", "--folder", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    record = folder / records.FILE
    try:
        until(
            lambda: (
                command.poll() is not None or (record.exists() and '"log"' in record.read_text())
            )
        )
        assert command.poll() is None, command.communicate()
        yield command, tree(command.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)


@linux
@pytest.mark.parametrize(
    ("signum", "send"),
    [
        (signal.SIGKILL, os.kill),
        pytest.param(signal.SIGHUP, os.killpg, marks=pytest.mark.soak),
        pytest.param(signal.SIGQUIT, os.killpg, marks=pytest.mark.soak),
        pytest.param(signal.SIGQUIT, os.kill, marks=pytest.mark.soak),
    ],
    ids=["killed", "terminal closed", "Ctrl-\\", "quit"],
)
def test_all_processes_end_with_the_command_and_say_nothing(tmp_path, signum, send):
    with in_training(tmp_path / "run") as (command, pids):
        # The command, two workers, the server that forked them and the tracker of its resources.
        assert len(pids) == 5
        # Its store and its workers, at 127.0.0.1 and no interface that another machine could reach.
        assert listening([command.pid]) == {"0100007F"}
        assert listening(pids) == {"0100007F"}
        send(command.pid, signum)
        assert command.communicate(timeout=PATIENCE_S)[1] == ""
        assert command.returncode == -signum
        until(lambda: all(state(pid) == "Z" for pid in pids))


def be_a_rank(folder, url, rank):
    config = RunConfig(data="synthetic", model="mlp", workers=2)
    os._exit(run_worker(Job(config, folder), at_url(url, rank, 2)))


def test_a_signal_ends_the_wait_for_a_peer(tmp_path):
    """Of rank 0 for those that have not come yet, and of rank 1 for a rank 0 that does not answer."""
    host, family = (
        ("::1", socket.AF_INET6) if socket.has_dualstack_ipv6() else ("127.0.0.1", socket.AF_INET)
    )

    def start(rank, port):
        url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        process = forking().Process(target=be_a_rank, args=(tmp_path, url, rank), daemon=True)
        process.start()
        return process

    with socket.create_server((host, 0), family=family) as silent:
        silent.settimeout(PATIENCE_S)
        port = free_port()
        ranks = [start(0, port), start(1, silent.getsockname()[1])]
        with silent.accept()[0], until(lambda: answered(host, port)):
            for process, signum in zip(ranks, (signal.SIGINT, signal.SIGTERM), strict=True):
                os.kill(process.pid, signum)
                process.join(PATIENCE_S)
                assert process.exitcode == signum


def answered(host, port):
    with contextlib.suppress(ConnectionRefusedError):
        return socket.create_connection((host, port))
    return None


@pytest.mark.soak
def test_a_long_folder_for_temporary_files_is_named_in_one_line(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = subprocess.run(
        [*TRAIN, "--steps", "1", "--folder", str(tmp_path / "run")],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    # Later versions of Python put the socket elsewhere.
    if done.returncode:
        assert re.fullmatch(rf"Error: TMPDIR={long}: too long .*\n", done.stderr)
