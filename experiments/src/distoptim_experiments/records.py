"""A run's record: a file of JSON lines, written as the run goes on and read for tables and pictures.

Each kind of line is a model here; nothing else is written, and nothing else is read. Where a run's
time went has one word for one thing, in records, in `stats()` and in reports: see `Summary`.
"""

from __future__ import annotations

import os
import platform
import subprocess
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, core_schema

import distoptim
from distoptim_experiments.config import RunConfig
from distoptim_experiments.machines import Machines
from distoptim_experiments.settings import Settings

FILE = "record.jsonl"
S = TypeVar("S", bound=Settings)


class AsRecorded:
    """Annotates settings in a line: their types are checked, ranges and names are not. What was run
    may need a model, a file or a GPU that the process which reads the record does not have."""

    def __get_pydantic_core_schema__(
        self, source: type[Settings], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """What pydantic reads and writes the field with."""
        return core_schema.no_info_plain_validator_function(
            partial(_as_recorded, source),
            serialization=core_schema.plain_serializer_function_ser_schema(source.to_dict),
        )


def _as_recorded(kind: type[S], values: object) -> S:
    if isinstance(values, kind):
        return values
    return kind.model_construct(**dict(_types(kind).model_validate(values)))


@cache
def _types(kind: type[Settings]) -> type[BaseModel]:
    """A model with the types of the fields alone."""
    fields: dict[str, Any] = {
        name: (field.annotation, field.get_default(call_default_factory=True))
        for name, field in kind.model_fields.items()
    }
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


class _Model(BaseModel, ABC):
    """Values that do not change; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Machine(_Model):
    """The computer a run was made on, without its name."""

    processor: str
    cores: int
    system: str


class Surroundings(_Model):
    """What a result depends on besides its configuration; no names of hosts, users or folders.

    Attributes:
        date: ISO 8601, UTC.
        commit: of the source tree, with "-dirty" if it had changes; None outside of one.
    """

    date: str
    distoptim: str
    torch: str
    python: str
    commit: str | None
    machine: Machine


class Line(_Model, ABC):
    """A line of a record.

    Attributes:
        kind: which model it is.
        step: local steps made when it was written.
    """

    kind: str
    step: int = Field(ge=0)


class Start(Line):
    """The first line.

    Attributes:
        label: the method's name in tables.
        machines: the virtual machines; None for real ones.
        steps: local steps of the whole run.
        parameters: numbers in the model.
    """

    kind: Literal["start"] = "start"
    step: int = 0
    label: str
    config: Annotated[RunConfig, AsRecorded()]
    machines: Annotated[Machines, AsRecorded()] | None = None
    surroundings: Surroundings
    steps: int
    steps_per_epoch: int
    parameters: int


class Resume(Line):
    """Another process goes on, from a checkpoint."""

    kind: Literal["resume"] = "resume"
    config: Annotated[RunConfig, AsRecorded()]
    surroundings: Surroundings
    steps: int


class Log(Line):
    """How far the run is.

    Attributes:
        loss: mean training loss since the last such line, in nats; NaN where none was finite.
        exposed_share: as in `Summary`, so far, of rank 0 alone; of virtual workers their mean. None
            where nothing was computed.
        tau: local steps in a round now; None for a method without rounds.
    """

    kind: Literal["log"] = "log"
    epoch: float
    seconds: float
    loss: float
    exposed_share: float | None = None
    tau: float | None = None


class Evaluation(Line):
    """How good the workers' mean is; losses in nats, accuracies as shares of 1.

    Attributes:
        worker_accuracy: the mean over single workers of their own accuracy, on fewer samples.
    """

    kind: Literal["evaluation"] = "evaluation"
    epoch: float
    seconds: float
    test_loss: float
    test_accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    worker_accuracy: float | None = None


class Checkpoint(Line):
    """A checkpoint was written, at this path in the run's folder."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str


class Membership(Line):
    """Where workers come and go: something that has happened to one; see `distoptim.comm.roll.Event`.

    Attributes:
        time: in seconds since 1970.
        members: names of those in the mean after it.
    """

    kind: Literal["membership"] = "membership"
    time: float
    what: str
    worker: str
    why: str
    members: list[str]


class Summary(Line):
    """The last line: how it ended, and where the time went.

    `seconds` are those of the training steps, without evaluation and checkpoints: computation,
    exposed communication and overhead together. All are means over the ranks.

    Attributes:
        diverged: it ended early, or no better than guessing.
        exposed_s: seconds for which the computation waited for communication.
        overhead_s: seconds of the rest of `average()`: forming payloads, coding, merging. None
            where it is not measured apart: torch's DDP does that while the others wait. On virtual
            workers it takes none of their time.
        hidden_s: seconds of communication beside the computation. None where it is not measured.
        bytes: payload of each worker, of all of its ranks.
        syncs: means that were merged.
        tau: local steps in a round at the end; None for a method without rounds.
        staleness: mean local steps from launch to merge.
        quarantined: payloads that were not finite and were left out.
    """

    kind: Literal["summary"] = "summary"
    diverged: bool
    test_loss: float | None = None
    test_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    worker_accuracy: float | None = None
    seconds: float
    exposed_s: float
    overhead_s: float | None
    hidden_s: float | None
    bytes: int
    syncs: int
    tau: float | None = None
    staleness: float | None = None
    quarantined: float | None = None

    @property
    def computation_s(self) -> float:
        """Seconds that are neither exposed communication nor overhead."""
        return self.seconds - self.exposed_s - (self.overhead_s or 0.0)

    @property
    def exposed_share(self) -> float:
        """Exposed communication, as a share of the computation."""
        return self.exposed_s / self.computation_s

    @property
    def overhead_share(self) -> float | None:
        """Overhead, as a share of the computation; None where it is not measured apart."""
        return None if self.overhead_s is None else self.overhead_s / self.computation_s


AnyLine = Annotated[
    Start | Resume | Log | Evaluation | Checkpoint | Membership | Summary,
    Field(discriminator="kind"),
]
_LINES: TypeAdapter[AnyLine] = TypeAdapter(AnyLine)


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
        kept: list[AnyLine] = []
        if after_step is not None and path.exists():
            kept = [
                line
                for line in read_lines(path)
                if line.step <= after_step and not isinstance(line, Summary)
            ]
        draft = path.with_suffix(".draft")
        self._path = path
        try:
            draft.write_text("".join(_text(line) for line in kept))
            draft.replace(path)
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

    start: Start
    logs: list[Log]
    evaluations: list[Evaluation]
    summary: Summary | None

    @property
    def config(self) -> RunConfig:
        """What was run."""
        return self.start.config


def file(folder: Path) -> Path:
    """Of a run's folder the record.

    In it or, for little space, beside it as `FOLDER.record.jsonl`.
    """
    beside = folder.with_name(f"{folder.name}.{FILE}")
    return beside if beside.exists() and not (folder / FILE).exists() else folder / FILE


def folders(root: Path) -> list[Path]:
    """The folders of all runs below `root` that have a record, whole or not."""
    inside = {path.parent for path in root.rglob(FILE)}
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
    if not lines or not isinstance(lines[0], Start):
        raise ValueError(f"{path}:1: a record begins with a line of kind 'start'")
    summaries = [line for line in lines if isinstance(line, Summary)]
    return Record(
        lines[0],
        [line for line in lines if isinstance(line, Log)],
        [line for line in lines if isinstance(line, Evaluation)],
        summaries[-1] if summaries else None,
    )


def finished(folder: Path) -> bool:
    """Whether there is a whole record of a run's folder, diverged or not.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = file(folder)
    return path.exists() and any(isinstance(line, Summary) for line in read_lines(path))


def read_lines(path: Path) -> Iterator[AnyLine]:
    """The lines of a record, without a last one that was cut off.

    Raises:
        ValueError: naming file and line, and what is wrong there.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    for number, text in enumerate(texts, start=1):
        if number == len(texts) and not text.endswith("\n"):
            return
        try:
            yield _LINES.validate_json(text)
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: not a line of a record: {_said(error)}") from None


def surroundings() -> Surroundings:
    """Those of this process."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return Surroundings(
        date=datetime.now(UTC).isoformat(timespec="milliseconds"),
        distoptim=distoptim.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        commit=_commit(),
        machine=Machine(
            processor=_processor(),
            cores=len(cores) if cores is not None else os.cpu_count() or 1,
            system=platform.system(),
        ),
    )


def _text(line: Line) -> str:
    return line.model_dump_json() + "\n"


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    # What follows the kind, which the discriminator puts first.
    where = ".".join(map(str, first["loc"][1:]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the source tree the package was imported from, with "-dirty" if it has changes outside of
    results, where a study that goes on writes."""
    commit = _git("describe", "--always", "--abbrev=12")
    if not commit:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude,top)results")
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    """What git says of the source tree; nothing outside of one."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
