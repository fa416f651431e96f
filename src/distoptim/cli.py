"""`distoptim`: the subcommands plan, probe and lighthouse, and those that other distributions add.

A distribution adds one by an entry point of the group `distoptim.commands`, which names a function
as cyclopts takes it; it is imported when it is called, or when the help lists it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError
from rich.console import Console
from rich.table import Table

from distoptim import algorithms, checks
from distoptim.comm import CommunicationError, Link
from distoptim.planning import planner
from distoptim.planning import probe as probing
from distoptim.planning.planner import Island, Job, Plan, Prediction
from distoptim.simulator.network import Gloo
from distoptim.version import __version__

COMMANDS = "distoptim.commands"
"""Group of the entry points that add subcommands."""

_PROBE_CHARACTERS = 10_000
"""A probe's file has a few hundred; what is longer is cut off, and so no JSON."""

_TABLE_WIDTH = 110


def _whole(_: object, tokens: Any) -> int:
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r}: allowed is an integer") from None


Whole = Annotated[int, Parameter(converter=_whole)]
"""An integer on the command line; cyclopts alone would round 2.5."""

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
"""An option that is there or not."""


def main() -> NoReturn:
    """Run the command line and exit with its code.

    Codes: 0 done, 1 a worker failed, 2 a wrong value or file, 128 + signal when stopped by one (130
        for Ctrl-C).
    """
    code = None
    try:
        code = application()(sys.argv[1:])
    except UnknownCommandError as error:
        alone = not entry_points(group=COMMANDS)
        more = " Those of the experiments: pip install 'distoptim[train]'" if alone else ""
        fail(f"{error}{more}", 2)
    except (CycloptsError, ValueError) as error:
        fail(str(error), 2)
    except CommunicationError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(code)


def application() -> App:
    """The command line with all subcommands."""
    app = App(
        name="distoptim",
        help="Train with communication hidden behind computation.",
        version=f"distoptim, version {__version__}",
        help_flags=("--help", "-h"),
        # The last one counts, so that a script's options can be overridden behind them.
        default_parameter=Parameter(allow_repeating=True),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    # The list of commands shows their docstrings; a command has no need of the others.
    lists = all(argument.startswith("-") for argument in sys.argv[1:])
    for entry in entry_points(group=COMMANDS):
        app.command(entry.load() if lists else entry.value, name=entry.name)
    app.command(plan)
    app.command(probe)
    app.command(lighthouse)
    return app


def lighthouse(*, bind: str, heartbeat_timeout_s: float = 5.0) -> None:
    """Tell workers that come and go (distoptim.Elastic) who is alive; runs until SIGTERM or Ctrl-C.

    It has no authentication: bind it to an address that only the workers reach.

    Args:
        bind: ADDRESS:PORT at which it listens.
        heartbeat_timeout_s: a worker that has not been heard of for so long is taken for dead.
    """
    checks.number("heartbeat_timeout_s", heartbeat_timeout_s, 0.1, 3600)
    checks.address("bind", bind)
    # It would print every question of every worker.
    os.environ.setdefault("RUST_LOG", "warn")
    try:
        from torchft.coordination import LighthouseServer
    except ImportError:
        fail("lighthouse needs torchft: pip install 'distoptim[elastic]'", 2)
    try:
        server = LighthouseServer(
            bind=bind,
            min_replicas=1,
            join_timeout_ms=60_000,
            quorum_tick_ms=20,
            heartbeat_timeout_ms=int(heartbeat_timeout_s * 1000),
        )
    except RuntimeError as error:
        raise ValueError(f"--bind {bind}: {error}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"lighthouse at {bind}, heartbeat timeout {heartbeat_timeout_s:g} s", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()
    server.shutdown()


def plan(
    *,
    step_s: float | None = None,
    params: float | None = None,
    workers: Whole | None = None,
    latency_ms: float | None = None,
    bandwidth_gbit_s: float | None = None,
    measured: Annotated[Path | None, Parameter(name="--probe")] = None,
    inner: str = "sgd",
    streams: str = "auto",
    speeds: str = "",
    island_size: Whole = 1,
    island_latency_ms: float = 0.0,
    island_gbit_s: float = math.inf,
    everything: Annotated[Flag, Parameter(name="--all")] = False,
    as_json: Annotated[Flag, Parameter(name="--json")] = False,
) -> None:
    """Say what will pay on a link, and what to write for it.

    Args:
        step_s: Seconds of one local step without communication.
        params: Number of parameters (11e6 is fine).
        workers: Number of workers.
        latency_ms: Milliseconds one message takes.
        bandwidth_gbit_s: Each worker's rate, in Gbit/s.
        measured: What `distoptim probe` wrote; options given here win.
        inner: The inner optimizer, sgd or adamw: which algorithm trains best depends on it.
        streams: Connections at once in a mean, 1 to 64 or auto.
        speeds: Of the workers, in turn, as in 1,1,0.5: a local step takes so much less time than step-s.
        island_size: Ranks with a faster link among them, as of one host, which share the link above; workers are then
            the islands, and a local step is that of a rank.
        island_latency_ms: Milliseconds one message takes inside an island.
        island_gbit_s: Each rank's rate inside an island, in Gbit/s.
        everything: Every algorithm and tau, not the best tau of each.
        as_json: Print JSON for machines.
    """
    known = _known(
        measured,
        {
            "step_s": step_s,
            "params": params,
            "workers": workers,
            "latency_ms": latency_ms,
            "bandwidth_gbit_s": bandwidth_gbit_s,
        },
    )
    link = Link(known["latency_ms"] / 1e3, known["bandwidth_gbit_s"])
    count = _count("params", known["params"])
    workers = _count("workers", known["workers"])
    network = Gloo(link, _streams(streams))
    algorithms.load_entry_points()
    island = None
    if checks.integer("island_size", island_size, 1) > 1:
        island = Island(island_size, Gloo(Link(island_latency_ms / 1e3, island_gbit_s), streams=1))
    job = Job(known["step_s"], count, workers, network, _numbers("speeds", speeds), island)
    made = planner.plan(job, inner=inner)
    if as_json:
        print(json.dumps(made.as_dict(), indent=1))
    else:
        _print(made, everything)


def probe(
    target: Annotated[str, Parameter(name="MODULE:FUNCTION")],
    /,
    *,
    steps: Whole = 20,
    backend: str | None = None,
    out: Path = Path("probe.json"),
) -> None:
    """Time a step and the link between the workers; run it under torchrun.

    MODULE:FUNCTION is called once and returns a step (a function without arguments: one local step,
    no communication) or a pair (model, step).

    Args:
        target: Where that function is.
        steps: Local steps to time.
        backend: Of torch.distributed; default nccl with a GPU, else gloo.
        out: Where rank 0 writes the figures for `distoptim plan --probe`.
    """
    measured = probing.probe_under_torchrun(target, steps=steps, backend=backend)
    if measured is not None:
        out.write_text(json.dumps(measured.as_dict(), indent=1) + "\n")
        print(
            f"step {measured.step_s * 1e3:.1f} ms, {measured.params:,} parameters, {measured.workers} workers, "
            f"latency {measured.latency_s * 1e3:.2f} ms, {measured.bandwidth_gbit_s:.2f} Gbit/s -> {out}"
        )


def _streams(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: allowed are numbers, as in 1,1,0.5") from None


def _known(measured: Path | None, given: dict[str, float | None]) -> dict[str, float]:
    """The probe's figures, overridden by the options; all must be there."""
    known: dict[str, Any] = {} if measured is None else _read(measured)
    known.update({name: value for name, value in given.items() if value is not None})
    missing = [
        f"--{name.replace('_', '-')}"
        for name in given
        if not known.get(name) and known.get(name) != 0
    ]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)} (or --probe FILE)")
    return known


def _read(measured: Path) -> dict[str, Any]:
    """What a probe wrote, with the latency in milliseconds."""
    # A device would be read for ever.
    if not measured.is_file():
        raise ValueError(f"--probe {measured}: there is no such file")
    try:
        with measured.open(encoding="utf-8") as file:
            known = json.loads(file.read(_PROBE_CHARACTERS))
        return {**known, "latency_ms": known["latency_s"] * 1e3}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{measured}: not a file that `distoptim probe` wrote ({error})"
        ) from error


def _count(name: str, value: float) -> int:
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name}={value!r}: allowed is a whole number, 1 or more")
    return int(value)


def _method(p: Prediction) -> str:
    name = p.algorithm if p.round_s is None else f"{p.algorithm}, equal time"
    return name if p.ranks == 1 else f"{name}, islands of {p.ranks}"


def _print(made: Plan, everything: bool) -> None:
    out = Table(
        "method",
        "codec",
        "tau",
        "fragments",
        "s/step",
        "times DDP",
        "exposed",
        "copies",
        "GB",
        "sent, GB/hour",
        box=None,
    )
    out.columns[0].no_wrap = True
    for column in out.columns[2:]:
        column.justify = "right"
    best: dict[tuple[str, str | None, bool, int], Prediction] = {}
    for p in made.predictions:
        kind = (p.algorithm, p.codec, p.round_s is None, p.ranks)
        if kind not in best or p.step_s < 0.95 * best[kind].step_s:
            best[kind] = p
    for p in made.predictions if everything else best.values():
        out.add_row(
            _method(p),
            p.codec or "",
            str(p.tau),
            str(p.fragments),
            f"{p.step_s:.4g}",
            f"{p.speed_up:.2f}",
            f"{p.exposed_share:.1%}",
            f"{p.copies:.3g}",
            f"{p.gbytes:.3g}",
            f"{p.gbytes_per_hour:.3g}",
            style="bold" if p == made.best else None,
        )
    console = Console(soft_wrap=True)
    # Rather longer lines than cut ones.
    console.print(out, width=max(console.width, _TABLE_WIDTH))
    console.print(f"\n{made.line}", highlight=False, markup=False)
    console.print(f"because: {made.reason}", highlight=False, markup=False)
