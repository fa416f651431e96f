"""A run's record: a file of JSON lines, written as the run goes on and read for tables and figures.

Kinds of lines: "start" (configuration, versions, machine, time), "log" (step, epoch, seconds,
loss), "evaluation" (step, epoch, seconds, test_loss, test_accuracy), "checkpoint", "resume", and
"summary" at the end.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import distoptim

Line = dict[str, Any]
FILE = "record.jsonl"
DRAFT = f"{FILE}.draft"


class RecordWriter:
    """Appends lines; each is on its way to the disk when `write` returns.

    Args:
        path: of the file.
        after_step: on resume, lines of later steps are dropped: those steps are made again. None
            begins a new file.

    Raises:
        ValueError: naming the file, if it cannot be written, here or in `write`.
    """

    def __init__(self, path: Path, *, after_step: int | None = None) -> None:
        kept: list[Line] = []
        if after_step is not None and path.exists():
            kept = [
                line
                for line in read_lines(path)
                if line.get("step", 0) <= after_step and line["kind"] != "summary"
            ]
        draft, self._path = path.with_suffix(".draft"), path
        try:
            draft.write_text("".join(_text(line) for line in kept))
            os.replace(draft, path)
            self._file = path.open("a")
        except OSError as error:
            raise self._failed(error) from error

    def write(self, line: Line) -> None:
        """Append one line."""
        try:
            self._file.write(_text(line))
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _failed(self, error: OSError) -> ValueError:
        return ValueError(f"{self._path}: cannot be written: {error.strerror}")


@dataclass(frozen=True)
class Record:
    """A run as recorded: its lines by kind. `summary` is None while it has not ended."""

    config: dict[str, Any]
    start: Line
    logs: list[Line]
    evaluations: list[Line]
    summary: Line | None


def file(folder: Path) -> Path:
    """Of a run's folder the record.

    In it or, for little space, beside it as `FOLDER.record.jsonl`.
    """
    beside = folder.with_name(f"{folder.name}.{FILE}")
    return beside if beside.exists() and not (folder / FILE).exists() else folder / FILE


def folders(root: Path) -> list[Path]:
    """The folders of all runs below `root` that have a record, or the draft of one."""
    inside = {path.parent for name in (FILE, DRAFT) for path in root.rglob(name)}
    beside = {
        path.with_name(path.name.removesuffix(f".{FILE}")) for path in root.rglob(f"*.{FILE}")
    }
    return sorted(inside | beside)


def read(path: Path) -> Record:
    """The record in a file, or of a run's folder.

    Raises:
        ValueError: there is no such file, or a line in the middle of it is damaged. A last line
            that was cut off is left out.
    """
    path = path if path.is_file() else file(path)
    lines = list(read_lines(path))
    if not lines or lines[0]["kind"] != "start" or not isinstance(lines[0].get("config"), dict):
        raise ValueError(
            f"{path}:1: a record begins with a line of kind 'start' that has a 'config'"
        )
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    summaries = kinds.get("summary", [])
    return Record(
        lines[0]["config"],
        lines[0],
        kinds.get("log", []),
        kinds.get("evaluation", []),
        summaries[-1] if summaries else None,
    )


def finished(folder: Path) -> bool:
    """Whether there is a whole record of a run's folder, diverged or not.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = file(folder)
    return path.exists() and any(line["kind"] == "summary" for line in read_lines(path))


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a record, without a last one that was cut off.

    Raises:
        ValueError: naming file and line.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    for number, text in enumerate(texts, start=1):
        if number == len(texts) and not text.endswith("\n"):
            return
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON line: {error}") from error
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"{path}:{number}: not a line of a record: it has no 'kind'")
        yield line


def surroundings() -> Line:
    """What a result depends on besides its configuration; no names of hosts, users or folders."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "distoptim": distoptim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "system": platform.system(),
        },
    }


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the source tree the package was imported from, with "-dirty" if it has changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
