"""Small control data between the ranks of a process group, as JSON; no pickle from a peer."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from distoptim.comm.communicator import CommunicationError

# All messages have this size, since gloo ends the process (SIGABRT) where two of unlike sizes meet,
# as they would if workers were in different calls.
CHUNK_BYTES = 4096
# At the start of every worker's text: the sizes of the name of its call and of its message.
_HEADER = struct.Struct("!IQ")


def all_gather_json(
    message: object,
    group: dist.ProcessGroup,
    *,
    what: str = "",
    ranks: Sequence[int] | None = None,
    took: Callable[[float], object] = lambda seconds: None,
) -> list[object]:
    """Everybody's message in rank order; blocking and collective in the group.

    One chunk from each, which says how long its text is; then as many more as the longest needs,
    which by then all know.

    Args:
        message: None, bool, int, float, str, and lists and dictionaries of them.
        group: over gloo or nccl; its timeout bounds the wait.
        what: the call that asks, for error messages.
        ranks: what they call the members; by default their ranks in the group.
        took: told how long the first chunk was under way, in seconds.

    Raises:
        CommunicationError: workers are in different calls.
        RuntimeError: torch's, if one did not come in time.
    """
    name = what.encode()[: CHUNK_BYTES // 2]
    text = name + json.dumps(message).encode()
    text = _HEADER.pack(len(name), len(text) - len(name)) + text
    start = time.perf_counter()
    first = _gather(text[:CHUNK_BYTES], 1, group)
    took(time.perf_counter() - start)
    _check_calls([_split(theirs)[0] for theirs in first], ranks or range(group.size()))
    longest = max(_HEADER.size + sum(_HEADER.unpack_from(theirs)) for theirs in first)
    rest = _gather(text[CHUNK_BYTES:], -(-longest // CHUNK_BYTES) - 1, group)
    return [json.loads(_split(a + b)[1]) for a, b in zip(first, rest, strict=True)]


@contextlib.contextmanager
def one_error(what: str, give_up: Callable[[], object] | None = None) -> Iterator[None]:
    """One error for all ways in which a blocking collective fails.

    Args:
        what: who is in which collective, for the message.
        give_up: called after a failure, to leave the groups, so that peers hear of it.

    Raises:
        CommunicationError: torch raised a RuntimeError: a rank did not come in time, or is gone.
    """
    start = time.perf_counter()
    try:
        yield
    except CommunicationError:
        raise
    except RuntimeError as error:
        seconds = time.perf_counter() - start
        if give_up is not None:
            give_up()
        raise CommunicationError(
            f"{what} failed after {seconds:.1f} s: not all are in it, or one is gone: {error}"
        ) from error


def _gather(text: bytes, chunks: int, group: dist.ProcessGroup) -> list[bytes]:
    """So many chunks of everybody's text, in rank order."""
    own = torch.frombuffer(bytearray(text.ljust(max(1, chunks) * CHUNK_BYTES)), dtype=torch.uint8)
    own = own.view(-1, CHUNK_BYTES).to(_device(group))
    everybody = own.new_empty(group.size(), chunks, CHUNK_BYTES)
    works = [group.allgather([list(everybody[:, i].unbind())], [own[i]]) for i in range(chunks)]
    try:
        while works:
            works.pop(0).wait()
    finally:
        # Peers hear of a failure only when nobody holds the works any more, as an exception's
        # traceback would.
        works.clear()
    return [theirs.numpy().tobytes() for theirs in everybody.cpu()]


def _device(group: dist.ProcessGroup) -> torch.device:
    """Whose memory the group's messages are in."""
    if not isinstance(group, dist.ProcessGroup):
        # gloo itself.
        return torch.device("cpu")
    config = str(dist.get_backend_config(group))
    return torch.device("cuda" if "cuda:" in config and "cpu:" not in config else "cpu")


def _split(text: bytes) -> tuple[str, bytes]:
    """The name of the call, and the message."""
    name, message = _HEADER.unpack_from(text)
    start = _HEADER.size + name
    return text[_HEADER.size : start].decode(errors="replace"), text[start : start + message]


def _check_calls(calls: list[str], ranks: Sequence[int]) -> None:
    for rank, call in zip(ranks, calls, strict=True):
        if call != calls[0]:
            raise CommunicationError(
                f"workers are in different calls: rank {ranks[0]} is in {_call(calls[0])}, rank {rank} "
                f"is in {_call(call)}"
            )


def _call(what: str) -> str:
    return what or "a call without a name"
