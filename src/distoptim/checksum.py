"""A checksum over trees of tensors and plain data, such as state dicts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checksum(tree: object, start: int = 0) -> int:
    """CRC-32 of the content: every tensor's bytes, dtype and shape, every number, text and name.

    The order of dictionaries, devices and memory formats do not count; a list counts as a tuple. Any
    flipped byte is seen. About a second per GB.

    Args:
        tree: dictionaries, lists and tuples of tensors and plain data; of other objects the type
            counts alone.
        start: the checksum of what comes before.
    """
    if isinstance(tree, Mapping):
        out = _add(f"{len(tree)} names", start)
        for name, value in sorted((_plain(key), value) for key, value in tree.items()):
            out = checksum(value, _add(name, out))
        return out
    if isinstance(tree, list | tuple):
        out = _add(f"{len(tree)} values", start)
        for value in tree:
            out = checksum(value, out)
        return out
    if isinstance(tree, Tensor):
        return _of_tensor(tree, start)
    return _add(_plain(tree), start)


def _of_tensor(x: Tensor, start: int) -> int:
    out = _add(f"{x.dtype} {list(x.shape)}", start)
    if hasattr(x, "__tensor_flatten__"):
        # A subclass that is made of tensors, such as a DTensor, of which this rank has its shard.
        names, _ = x.__tensor_flatten__()
        return checksum([getattr(x, name) for name in names], out)
    if x.is_meta:
        return out
    dense = x.detach() if x.layout is torch.strided else x.detach().to_dense()
    dense = dense.cpu().resolve_conj().resolve_neg().contiguous()
    content: Any = dense.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content, out)


def _plain(value: object) -> str:
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            # By the built-in type's way: a NumPy number may come back from a file as Python's.
            return f"{kind.__name__} {kind.__repr__(value)}"
    return type(value).__name__


def _add(text: str, start: int) -> int:
    return zlib.crc32(text.encode(), start)
