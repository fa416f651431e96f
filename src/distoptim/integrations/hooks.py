"""What a framework must have for us to work inside it, and one line for a version that has not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version

# The tests have been run with these.
TESTED = {"accelerate": "1.15.0", "transformers": "5.24.0", "lightning": "2.6.6"}


def unusable(framework: str, error: ImportError) -> ImportError:
    """What to say where something of a framework cannot be imported: it is missing, or another version."""
    if error.name == framework:
        return ImportError(
            f"distoptim.integrations.{framework} needs {framework}: pip install 'distoptim[{framework}]'"
        )
    return ImportError(_other(framework, str(error)))


def check(framework: str, hooks: Mapping[object, Sequence[str]]) -> None:
    """Whether all hooks are there.

    Args:
        framework: its name as a distribution.
        hooks: class or object -> names of its attributes; "name(option)" for a method that must take one.

    Raises:
        ImportError: one is not.
    """
    for owner, names in hooks.items():
        for name in names:
            if not _has(owner, name):
                kind = owner if isinstance(owner, type) else type(owner)
                raise ImportError(_other(framework, f"{kind.__name__} has no {name}"))


def _has(owner: object, name: str) -> bool:
    attribute, _, option = name.rstrip(")").partition("(")
    if not hasattr(owner, attribute):
        return False
    return not option or option in inspect.signature(getattr(owner, attribute)).parameters


def _other(framework: str, what: str) -> str:
    return (
        f"{framework} {version(framework)} is not one that distoptim.integrations.{framework} can work "
        f"inside: {what}; tested is {framework} {TESTED[framework]}"
    )
