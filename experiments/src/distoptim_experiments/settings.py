"""The base of everything that is described in a TOML file or on the command line."""

from __future__ import annotations

import math
import types
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema


def _as_given(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    handler(value)
    return value


Number = Annotated[float, WrapValidator(_as_given)]
"""A float, in which 5 stays 5: names of finished runs are made of what was written."""

Values = Mapping[str, Any]
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Needs:
    """When an option has an effect.

    Args:
        when: in words, behind "has an effect only".
        holds: asked with the values of all of a command's options, by name.
    """

    when: str
    holds: Callable[[Values], object]


@dataclass(frozen=True)
class Option:
    """Makes a field an option of the commands that take its model; stands in the field's `Annotated`.

    Its name, type, default and help text are the field's own.

    Args:
        section: of the help.
        needs: when it has an effect; None means always.
        metavar: what stands for the value in the help, where the type does not say it.
        unset: what None, the default, means, for the help.
    """

    section: str
    needs: Needs | None = None
    metavar: str | None = None
    unset: str | None = None


@dataclass(frozen=True)
class NoOption:
    """Marks a field that is no option of its own, and says why."""

    why: str


@dataclass(frozen=True)
class OneOf:
    """Allows a text only if it is one of the names in a table, which may grow."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """What pydantic checks the field with."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names():
            raise ValueError(f"{value!r}")
        return value


class Settings(BaseModel, ABC):
    """Values with names, each checked against its type and range when they are put together.

    Raises:
        ValueError: in one line, naming the first wrong value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_said(type(self), error)) from None

    def to_dict(self) -> dict[str, Any]:
        """As plain data; the same class made of it is the same again."""
        return self.model_dump()

    def replace(self, **changes: Any) -> Self:
        """The same with other values, checked again."""
        return type(self)(**{**self.to_dict(), **changes})


def _said(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    if not first["loc"]:
        return str(first["ctx"]["error"])
    field, *inside = first["loc"]
    if first["type"] == "extra_forbidden":
        return (
            f"{field}: nothing of that name is known; allowed are {', '.join(model.model_fields)}"
        )
    if first["type"] == "missing":
        return f"{field}: missing"
    name = inside[0] if inside and isinstance(inside[0], str) else field
    of_several = "" if inside else _SEVERAL.get(_origin(model, str(field)), "")
    what = allowed(model.model_fields[str(field)])
    return f"{name}={first['input']!r}: allowed is {of_several}{what}"


_SEVERAL: dict[Any, str] = {tuple: "a list, each of which is ", dict: "a table, each value "}


def _origin(model: type[BaseModel], field: str) -> Any:
    return get_origin(plain_type(model.model_fields[field].annotation))


def allowed(field: FieldInfo) -> str:
    """The values that a field, or each of its parts, may have, in words."""
    kind = plain_type(field.annotation)
    metadata = field.metadata
    if get_origin(kind) is tuple:
        kind, *metadata = _parts(get_args(kind)[0])
    for entry in metadata:
        if isinstance(entry, OneOf):
            return f"one of {', '.join(entry.names())}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is int:
        return _integers(_limits(metadata))
    if kind is float:
        return _numbers(_limits(metadata))
    return {bool: "True or False", str: "text"}.get(kind, "a number, text, True or False")


def plain_type(annotation: Any) -> Any:
    """A type without what is annotated, and without the None beside it."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return plain_type(kinds[0]) if len(kinds) == 1 else annotation
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _parts(annotation: Any) -> tuple[Any, ...]:
    """A type and what is annotated beside it."""
    parts = FieldInfo.from_annotation(annotation)
    return parts.annotation, *parts.metadata


def _limits(metadata: Iterable[object]) -> dict[str, float]:
    """The ends of a range, by pydantic's names for them: ge, gt, le, lt."""
    names = ("ge", "gt", "le", "lt")
    return {
        name: getattr(entry, name) for entry in metadata for name in names if hasattr(entry, name)
    }


def _integers(limits: Mapping[str, float]) -> str:
    if "ge" not in limits:
        return "an integer"
    if "le" not in limits:
        return f"an integer, {limits['ge']} or more"
    return f"an integer, from {limits['ge']} to {limits['le']}"


def _numbers(limits: Mapping[str, float]) -> str:
    low = f"[{limits['ge']:g}" if "ge" in limits else f"({limits.get('gt', -math.inf):g}"
    high = f"{limits['le']:g}]" if "le" in limits else f"{limits.get('lt', math.inf):g})"
    return f"a number in {low}, {high}"
