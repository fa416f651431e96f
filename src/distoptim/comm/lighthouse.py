"""What a worker that comes and goes asks of torchft's lighthouse: who is alive, and who is still remembered."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, cast, final

from distoptim.comm.communicator import CommunicationError

# Far below any timeout at which a lighthouse takes a worker for dead.
_HEARTBEAT_S = 0.2
# Between questions to a lighthouse that is away, or that knows too few workers.
PAUSE_S = 0.2
# On its page of status: a worker that has been heard of, and whether that is too long ago to count as alive.
_HEARD = re.compile(r'<li class="heartbeat([^"]*)">\s*([^<]*?): seen')


@final
@dataclass(frozen=True)
class Said:
    """What a worker says of itself to all who ask.

    Attributes:
        phase: "round", it has launched a mean; "look", it has just come; "leave", it is going; "end", the
            run is over for it.
        history: of its means; "" before the first.
        count: of its means.
        position: where it was at the launch.
        holds: the group that it has.
    """

    phase: str
    history: str = ""
    count: int = 0
    position: dict[str, Any] = field(default_factory=dict)
    holds: str = ""


@final
@dataclass(frozen=True)
class Asked:
    """A worker as the lighthouse tells of it.

    Attributes:
        name: of the worker.
        life: of the process; another one after each restart.
        store: where others meet it.
        asked: how often it has asked.
        said: of itself.
    """

    name: str
    life: str
    store: str
    asked: int
    said: Said


@final
class Lighthouse:
    """One worker's connection to it.

    Args:
        address: HOST:PORT.
        name: of the worker.
        store: where others meet it.
        timeout_s: bound of one question that need not wait for others, in seconds.
        join_timeout_s: how long it may be away before the first question, in seconds.

    Attributes:
        life: of this process.
        quorum: the number of the last answer, which grows as long as the lighthouse lives.

    Raises:
        ValueError: torchft is not installed.
        CommunicationError: it does not answer.
    """

    def __init__(
        self, address: str, *, name: str, store: str, timeout_s: float, join_timeout_s: float
    ) -> None:
        self.life = uuid.uuid4().hex
        self.quorum = 0
        self._address = f"http://{address}"
        self._name = name
        self._store = store
        self._timeout_s = timeout_s
        self._join_timeout_s = join_timeout_s
        self._asked = 0
        self._client = self._connect()
        # Of the thread of heartbeats: a question may wait for long.
        self._beats = self._connect()

    def _connect(self) -> Any:
        try:
            from torchft.coordination import LighthouseClient
        except ImportError as error:
            raise ValueError("Elastic needs torchft: pip install 'distoptim[elastic]'") from error
        deadline = time.monotonic() + self._join_timeout_s
        limit = timedelta(seconds=min(5.0, self._timeout_s))
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError, TimeoutError):
                return LighthouseClient(self._address, limit)
            time.sleep(PAUSE_S)
        raise CommunicationError(f"{self._name}: no lighthouse answers at {self._address}")

    @property
    def _id(self) -> str:
        return f"{self._name}#{self.life}"

    def beat(self, over: threading.Event) -> None:
        """Be alive to it until then, also while this worker computes or waits; in a thread of its own."""
        while not over.wait(_HEARTBEAT_S):
            # Where it is away, whoever asks it waits until it is back.
            with contextlib.suppress(RuntimeError, TimeoutError):
                self._beats.heartbeat(self._id, timedelta(seconds=1.0))

    def ask(self, said: Said, limit_s: float) -> list[Asked] | None:
        """Who asks now, which waits for all that are alive; None if there is no answer until then."""
        self._asked += 1
        own = {"name": self._name, "life": self.life, "asked": self._asked, "said": asdict(said)}
        try:
            quorum = self._client.quorum(
                self._id,
                timedelta(seconds=limit_s),
                address="",
                store_address=self._store,
                step=0,
                world_size=1,
                shrink_only=False,
                data={"json": json.dumps(own)},
            )
        except TimeoutError:
            return None
        except RuntimeError:
            time.sleep(PAUSE_S)
            return None
        self.quorum = int(quorum.quorum_id)
        found = []
        for participant in quorum.participants:
            theirs = json.loads(cast("str", participant.data["json"]))
            said = Said(**theirs.pop("said"))
            found.append(Asked(store=participant.store_address, said=said, **theirs))
        return found

    def remembers(self, lives: Iterable[str]) -> bool:
        """Whether it counts one of these among the living, and would wait for it.

        It has the time after which it does not any more; workers need not know it.
        """
        # Past any proxy, as its other answers come.
        connection = http.client.HTTPConnection(self._address.removeprefix("http://"), timeout=1.0)
        try:
            connection.request("GET", "/status")
            page = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            # Whoever asks it waits until it is back; then it knows nobody.
            return False
        finally:
            connection.close()
        alive = [who for old, who in _HEARD.findall(page) if "old" not in old]
        return any(life in who for life in lives for who in alive)


def furthest(workers: Sequence[Asked]) -> list[Asked]:
    """Of the workers in a run those that are right: the largest history of the furthest, by name."""
    in_a_run = [w for w in workers if w.said.history]
    if not in_a_run:
        return []
    count = max(w.said.count for w in in_a_run)
    last = [w for w in in_a_run if w.said.count == count]
    histories = [w.said.history for w in last]
    chosen = max(sorted(set(histories)), key=histories.count)
    return sorted((w for w in last if w.said.history == chosen), key=lambda w: w.name)
