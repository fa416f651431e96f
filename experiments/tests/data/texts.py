"""A text for tests."""

from __future__ import annotations


def written(folder):
    """Two files of a text that is easy to learn, and one that is none of it."""
    folder.mkdir()
    (folder / "b.txt").write_bytes(b"to be or not to be, \xff " * 400)
    (folder / "a.txt").write_bytes(b"that is the question. " * 300)
    (folder / "notes.md").write_bytes(b"!" * 5000)
    return folder
