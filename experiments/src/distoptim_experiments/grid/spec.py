"""The TOML file of a grid.

What all runs share, what is varied, the methods, and how learning rates are chosen.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from distoptim_experiments.config import POWERSGD, SYNCHRONOUS, RunConfig, compared
from distoptim_experiments.machines import Machines
from distoptim_experiments.optimizers import check
from distoptim_experiments.training.virtual import check_virtual


@dataclass(frozen=True)
class Case:
    """One run of a grid.

    Args:
        label: the method's name in tables.
        config: the run.
    """

    label: str
    config: RunConfig

    @property
    def setting(self) -> tuple[str, int, str]:
        """What a learning rate is chosen for: method, tau, partition."""
        return self.label, self.config.tau, self.config.partition


def _known(table: dict[str, Any]) -> dict[str, Any]:
    for key in table:
        if key not in RunConfig.model_fields:
            raise ValueError(
                f"has no key {key!r}; allowed are {', '.join(sorted(RunConfig.model_fields))}"
            )
    return table


def _machines(table: object) -> object:
    """One per combination of the values that are lists."""
    if not isinstance(table, dict):
        return table
    allowed = list(Machines.model_fields)
    for name, value in table.items():
        if name not in allowed:
            raise ValueError(f"has no key {name!r}; allowed are {', '.join(allowed)}")
        if value == []:
            raise ValueError(f"{name}=[]: expected a value, or a list of values, not empty")
    values = [value if isinstance(value, list) else [value] for value in table.values()]
    return tuple(
        Machines(**dict(zip(table, combination, strict=True)))
        for combination in itertools.product(*values)
    )


Fields = Annotated[dict[str, Any], AfterValidator(_known)]
Axis = Annotated[list[Any], Field(min_length=1)]
_EXPECTED = {
    "dict_type": "a table",
    "tuple_type": "a table",
    "list_type": "a list of values, not empty",
    "too_short": "a list of values, not empty",
    "string_type": "text",
}
"""By pydantic's names for what is wrong."""


class Spec(BaseModel):
    """A grid.

    Args:
        title: what it is, for who reads the file.
        run: fields of `RunConfig` that all runs share.
        methods: label -> fields of `RunConfig` that make the method: algorithm, options, perhaps
            its own grid of tau.
        grid: field of `RunConfig` -> its values; every combination is run.
        tune: "lr", the learning rates that every method is tried with for each tau and partition,
            and other fields of `RunConfig` for these shorter runs; the best accuracy on the
            validation set decides, of text the loss. Empty: no tuning.
        machines: the virtual machines; the grid is run on each of them, learning rates are chosen
            on the first. A table, in which a list is one more axis.

    Raises:
        ValueError: in one line, naming a wrong key or value.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    title: str = ""
    run: Fields = Field(default_factory=dict)
    methods: dict[str, Fields] = Field(default_factory=dict)
    grid: Annotated[dict[str, Axis], AfterValidator(_known)] = Field(default_factory=dict)
    tune: Fields = Field(default_factory=dict)
    machines: Annotated[tuple[Machines, ...], BeforeValidator(_machines)] = (Machines(),)

    def __init__(self, **tables: Any) -> None:
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise ValueError(_said(error)) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Make all runs once, so that a wrong value shows before the first hour."""
        if not self.methods:
            raise ValueError("no [methods.NAME]: nothing to run")
        rates = self.tune.get("lr")
        if self.tune and (not isinstance(rates, list) or not rates):
            raise ValueError(f"[tune] lr={rates!r}: expected a list of values, not empty")
        if self.tune and not self.run.get("validation"):
            raise ValueError(
                "[tune] chooses on a validation set: [run] needs validation, the share held out for it"
            )
        for case in (*self.trials(), *self.cases()):
            check(case.config)
        return self

    def cases(
        self, learning_rates: Mapping[tuple[str, int, str], float] | None = None
    ) -> list[Case]:
        """Every combination once, with the learning rates chosen for it.

        Synchronous SGD once for all tau.
        """
        return list(self._made({}, learning_rates or {}))

    def by_method(self) -> Iterator[Self]:
        """A grid for each method."""
        for label, method in self.methods.items():
            yield self.model_copy(update={"methods": {label: method}})

    def trials(self) -> list[Case]:
        """The runs that choose learning rates: every setting with each of them."""
        fixed = {name: value for name, value in self.tune.items() if name != "lr"}
        return [
            Case(case.label, case.config)
            for lr in self.tune.get("lr", ())
            for case in self._made({"seed": 0, **fixed, "lr": lr}, {})
        ]

    def _made(
        self, fixed: Mapping[str, Any], rates: Mapping[tuple[str, int, str], float]
    ) -> Iterator[Case]:
        axes = {name: values for name, values in self.grid.items() if name not in fixed}
        seen = set()
        for values in itertools.product(*axes.values()):
            for label, method in self.methods.items():
                fields = {**self.run, **dict(zip(axes, values, strict=True)), **method, **fixed}
                if fields.get("algorithm") in (SYNCHRONOUS, POWERSGD):
                    fields["tau"] = 1
                config = compared(fields)
                case = Case(label, config)
                if case.setting in rates:
                    case = Case(label, config.replace(lr=rates[case.setting]))
                key = (label, repr(case.config))
                if key not in seen:
                    seen.add(key)
                    yield case


def read(path: Path, *, overrides: Mapping[str, Any] | None = None, virtual: bool = True) -> Spec:
    """The grid in a file, or one of those that are shipped, by its name: the TOML files in `grids`.

    Args:
        path: of the file.
        overrides: "TABLE.KEY", "TABLE" or "KEY" -> what replaces it; a KEY alone is one of [grid]
            if it is there, else of [run].
        virtual: the grid is for virtual workers, which cannot make all runs that real ones can.

    Raises:
        ValueError: naming the file, and the key or value that is wrong.
    """
    shipped = (
        resources.files("distoptim_experiments.grids") / f"{path.name.removesuffix('.toml')}.toml"
    )
    source = path if path.exists() or not shipped.is_file() else shipped
    # A device would be read for ever.
    if not source.is_file():
        why = "is no file" if path.exists() else "no such file"
        raise ValueError(f"{path}: {why}")
    try:
        content = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    try:
        made = Spec(**{"title": path.stem, **content})
        for case in (*made.trials(), *made.cases()) if virtual else ():
            for kind in made.machines:
                check_virtual(case.config, kind)
        return made
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, with VALUE in TOML's syntax; a bare word is a string.

    Raises:
        ValueError: it is no such thing.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not key or not equals:
        raise ValueError(f"{text!r}: expected KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[A-Za-z][\w./:-]*", value):
            return key, value
        raise ValueError(f"{text!r}: the value is not TOML: {error}") from error


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    table, dot, name = key.rpartition(".")
    if not dot and name in Spec.model_fields:
        content[name] = value
        return
    table = table or ("grid" if name in content.get("grid", {}) else "run")
    if not isinstance(content.setdefault(table, {}), dict):
        raise ValueError(f"{key}: {table}={content[table]!r} is not a table")
    content[table][name] = value


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    *tables, name = first["loc"] or ("",)
    if first["type"] == "extra_forbidden":
        return f"no key {name!r} is known there; allowed are {', '.join(sorted(Spec.model_fields))}"
    if first["type"] == "value_error":
        where = ".".join(map(str, first["loc"]))
        return f"[{where}] {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    table = f"[{'.'.join(map(str, tables))}] " if tables else ""
    return (
        f"{table}{name}={first['input']!r}: expected {_EXPECTED.get(first['type'], first['msg'])}"
    )
