"""All workers agree before the first step, or all fail with a message that names both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from distoptim.comm.communicator import Communicator
from distoptim.comm.islands import Island, describe
from distoptim.fragments import Fragment

Facts = dict[str, object]


@torch.no_grad()
def introduce(communicator: Communicator, facts: Facts, fragments: Sequence[Fragment],
              names: Sequence[str]) -> None:
    """Compare facts and parameters, then give everybody rank 0's parameters; blocking and collective.

    The ranks of an island agree on the facts too: they launch together. Their shards may differ.

    Args:
        communicator: to the other workers.
        facts: by name, what must be equal.
        fragments: whose values are to be equal at the start.
        names: the parameters' names, where torch knows them; two of one shape in another order go unseen without.

    Raises:
        ValueError: on every worker, as `compare`.
    """
    params = [p for f in fragments for p in f.params]
    own = {"number of fragments": len(fragments), "names of parameters": names, "shards": describe(params),
           **{f"fragment {i}": f"part {f.part}: {f.signature()}" for i, f in enumerate(fragments)}}
    # One message, compared only when everybody has them all: who finds a difference leaves nobody waiting.
    messages = cast("list[tuple[list[Facts], Facts]]", communicator.exchange((Island(params).exchange(facts), own)))
    try:
        compare([theirs for island, _ in messages for theirs in island])
        compare([theirs for _, theirs in messages])
    except ValueError:
        # Nobody could later: with torch 2.6 a program that ends with these groups open may hang.
        communicator.close()
        raise
    for f in fragments:
        start = f.flat()
        f.read(start)
        communicator.broadcast(start.tensor)
        f.write(start)


def compare(everybody: Sequence[Facts]) -> None:
    """Whether all workers say the same.

    Raises:
        ValueError: naming the first fact that differs, the two ranks and both values.
    """
    reference = everybody[0]
    for rank, theirs in enumerate(everybody):
        for key in {**reference, **theirs}:
            ours, other = reference.get(key), theirs.get(key)
            if ours != other:
                raise ValueError(f"workers disagree on {key}: rank 0 has {_short(ours, other)}, "
                                 f"rank {rank} has {_short(other, ours)}")


def _short(value: object, other: object, width: int = 160) -> str:
    """The value as text, long ones from a little before the place where the two part."""
    text, against = str(value), str(other)
    if len(text) <= width:
        return text
    same = next((i for i, (a, b) in enumerate(zip(text, against, strict=False)) if a != b), len(against))
    start = max(0, same - width // 2)
    return f"...{text[start:start + width]}..."
