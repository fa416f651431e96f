"""All workers agree before the first step, or all fail with a message that names both sides."""

from __future__ import annotations

from distoptim.comm.communicator import Communicator


def agree(communicator: Communicator, facts: dict[str, object]) -> None:
    """Compare `facts` over the workers; blocking and collective.

    Raises:
        ValueError: on every worker, naming the first fact that differs, the two ranks and both values.
    """
    everybody = communicator.exchange(facts)
    reference = everybody[0]
    assert isinstance(reference, dict)
    for rank, theirs in enumerate(everybody):
        assert isinstance(theirs, dict)
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
