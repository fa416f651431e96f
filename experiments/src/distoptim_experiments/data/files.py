"""The files of a data set: what to say if one is missing, or is not the published one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path


def missing(folder: Path | None, files: Sequence[str], *, name: str, source: str) -> ValueError:
    """What to raise where a data set's files are not there.

    Args:
        folder: where they were looked for; None if no folder was given.
        files: all of them, or those that are missing.
        name: of the data set.
        source: where it can be had.
    """
    if folder is None:
        return ValueError(
            f"data={name!r} needs --data-dir, the folder with {', '.join(files)}; from {source}"
        )
    return ValueError(f"{folder}: missing {', '.join(files)} of data={name!r}; from {source}")


def check_md5(path: Path, content: bytes, published: Mapping[int, str]) -> None:
    """Compare with the checksum that was published for this many bytes; any other number is another
    file.

    Args:
        path: of the file, for the message.
        content: whose checksum counts.
        published: number of bytes -> MD5 in hexadecimal digits.

    Raises:
        ValueError: naming the file, the MD5 that was expected and the one found.
    """
    expected = published.get(len(content))
    # Nobody is kept out by it: it tells a file from another.
    found = hashlib.md5(content, usedforsecurity=False).hexdigest() if expected else None
    if found != expected:
        raise ValueError(
            f"{path}: the MD5 of its content is {found}, expected {expected}: damaged, or not the "
            "published file"
        )
