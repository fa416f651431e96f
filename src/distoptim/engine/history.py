"""What a worker did, span after span: the last ones in memory, all of them in a file, as a trace for a viewer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, final
from urllib.parse import quote

from distoptim.comm import Communicator

# In memory; of some 150 bytes each.
KEPT = 16_384
FORMAT = 1
# As torch's profiler shows them.
_LABELS = {name: f"distoptim::{name}" for name in ("launch", "wait", "merge")}
# Between two writes, or a run that is killed would leave no file.
_FLUSH_S = 1.0


class Span(NamedTuple):
    """A piece of one worker's time.

    Attributes:
        name: "step" (computation, from one `average()` to the next), "wait" (it stood still for a
            mean), "merge", "launch", "in flight" (a mean on its way, while the others go on), "lost" (a mean
            that will never come) or "catch up".
        start_s: in seconds of the worker's clock; from an unknown zero, unless the clock is virtual.
        end_s: in the same seconds, >= start_s.
        step: local steps counted by then.
        fragment: whose mean, from 0; -1 where of none.
    """

    name: str
    start_s: float
    end_s: float
    step: int
    fragment: int


def trace(spans: Sequence[Span], *, worker: int) -> dict[str, Any]:
    """Spans as a trace that chrome://tracing and Perfetto open: the worker, and below it the network."""
    zero = min((span.start_s for span in spans), default=0.0)
    names = {0: "worker", 1: "means in flight"}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": worker, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in names.items()
    ]
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": worker,
                "tid": int(span.name == "in flight"),
                "name": _LABELS.get(span.name, span.name),
                "ts": (span.start_s - zero) * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "args": {"step": span.step, "fragment": span.fragment},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


@final
class Recording:
    """Writes the spans of a worker to a file of JSON lines, a few at a time.

    The first line says whose they are; then a list a span; and a line for what happened to members,
    where workers come and go. One that goes on from a checkpoint adds to its file, with a first line
    again.

    Args:
        folder: made if it is not there; the file in it is "worker-RANK.jsonl", or has the name of a
            worker that comes and goes.
        communicator: of the worker.
        algorithm: its name in pictures.
        after: the last span that is not to be written; None: all are.
    """

    def __init__(
        self,
        folder: Path,
        communicator: Communicator,
        *,
        algorithm: str,
        after: tuple[Any, ...] | None,
    ) -> None:
        worker = communicator.name or str(communicator.ranks[communicator.rank])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"worker-{quote(worker, safe='')}.jsonl"
        self._file = path.open("a", encoding="utf-8")
        self._communicator = communicator
        self._last = after
        self._told = 0
        self._written_at = time.monotonic()
        # Of workers on several hosts the wall clock is all that they have in common.
        zero = 0.0 if communicator.in_lockstep else time.time() - communicator.now()
        self._write({"format": FORMAT, "worker": worker, "algorithm": algorithm, "zero": zero})

    def follow(self, spans: Sequence[tuple[Any, ...]]) -> None:
        """Write what has been added since the last call."""
        new = []
        for span in reversed(spans):
            if span is self._last:
                break
            new.append(span)
        for span in reversed(new):
            self._write(span)
        self._last = spans[-1] if spans else None
        events = self._communicator.events
        for event in events[self._told :]:
            self._write(asdict(event))
        self._told = len(events)
        if time.monotonic() - self._written_at > _FLUSH_S:
            self._file.flush()
            self._written_at = time.monotonic()

    def close(self, spans: Sequence[tuple[Any, ...]]) -> None:
        """Write the last ones; the file is whole."""
        self.follow(spans)
        self._file.close()

    def _write(self, line: object) -> None:
        self._file.write(json.dumps(line) + "\n")
