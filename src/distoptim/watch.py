"""Whether parameters are still what they were when the fragments were cut."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

_look = operator.attrgetter("requires_grad", "dtype", "device", "shape")
_REMAKE = "make the optimizer anew after it (flush() first), on all workers"


@final
class Watch:
    """The parameters of an optimizer and of the modules it was told of.

    `check` comes with every launch, also of a thousand parameters, so it first compares everything with
    what it was, in C, and looks for the reason only where something differs.

    Args:
        inner: the optimizer they were handed to.
        own: those that are averaged.
        modules: that hold them; () where nobody said.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        own: Sequence[Tensor],
        modules: Sequence[torch.nn.Module] = (),
    ) -> None:
        self._inner = inner
        # FSDP2 puts gathered parameters into a module and takes them out again.
        self._modules = [m for m in modules if not any(map(_is_fsdp, m.modules()))]
        self._own = {id(p): _look(p)[1:] for p in own}
        self._names = {id(p): name for name, p in reversed(list(self._named()))}
        # Trained from the start, by another optimizer.
        self._elsewhere = {id(p): p for _, p in self._named() if p.requires_grad}
        self._note()

    def check(self) -> None:
        """Look at all parameters.

        Raises:
            ValueError: one was unfrozen, added, replaced, converted, moved or reshaped, so that it
                would not be averaged, or not rightly; naming it and what to do.
        """
        groups = [group["params"] for group in self._inner.param_groups]
        ids = list(map(id, itertools.chain(*groups, *self._tables)))
        if ids != self._ids or list(map(_look, self._tensors)) != self._looks:
            for name, p in self._named():
                self._check(name, p)
            self._note()

    def _check(self, name: str, p: Tensor) -> None:
        if id(p) in self._own:
            was = self._own[id(p)]
            now = _look(p)[1:]
            if now != was:
                raise ValueError(
                    f"parameter {name!r} was {_text(was)} when the optimizer was made and is "
                    f"{_text(now)} now: convert, move and resize the model first, then make the "
                    "optimizer"
                )
        elif p.requires_grad and id(p) not in self._elsewhere:
            raise ValueError(
                f"parameter {name!r} {self._what_happened(name, p)} after the optimizer was made, and "
                f"would not be averaged: {_REMAKE}"
            )

    def _what_happened(self, name: str, p: Tensor) -> str:
        if id(p) in self._names:
            return "was unfrozen"
        return "was replaced" if name in self._names.values() else "was added"

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """By their names in the modules, else by their places in the param groups."""
        for module in self._modules:
            yield from module.named_parameters()
        for k, group in enumerate(self._inner.param_groups):
            names = group.get("param_names", [])
            for i, p in enumerate(group["params"]):
                yield (names[i] if i < len(names) else f"param_groups[{k}]['params'][{i}]"), p

    def _note(self) -> None:
        """Take what is now for what was."""
        # Live views: to walk the modules anew would take milliseconds.
        self._tables: list[Collection[Any]] = [
            table.values()
            for module in self._modules
            for part in module.modules()
            for table in (part._parameters, part._modules)  # noqa: SLF001  # as said above
        ]
        # Kept, so that no other object gets their ids.
        groups = [group["params"] for group in self._inner.param_groups]
        self._kept = list(itertools.chain(*groups, *self._tables))
        self._ids = list(map(id, self._kept))
        once = {id(x): x for x in self._kept if isinstance(x, Tensor)}
        self._tensors = list(once.values())
        self._looks = list(map(_look, self._tensors))


def _is_fsdp(module: torch.nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_forward")


def _text(seen: tuple[torch.dtype, torch.device, torch.Size]) -> str:
    dtype, device, shape = seen
    return f"{dtype} {list(shape)} on {device}"
