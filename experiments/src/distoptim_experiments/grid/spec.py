"""The TOML file of a grid.

What all runs share, what is varied, the methods, and how learning rates are chosen.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from distoptim_experiments.config import POWERSGD, SYNCHRONOUS, RunConfig, compared
from distoptim_experiments.machines import Machines
from distoptim_experiments.optimizers import check
from distoptim_experiments.training.virtual import check_virtual

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RUN = set(RunConfig.model_fields)
_TABLES = {"title", "run", "machines", "grid", "tune", "methods"}


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


@dataclass(frozen=True)
class Spec:
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
            on the first.

    Raises:
        ValueError: in one line, naming a wrong key or value.
    """

    title: str
    run: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)
    machines: Sequence[Machines] = (Machines(),)

    def __post_init__(self) -> None:
        """Make all runs once, so that a wrong value shows before the first hour."""
        for table, keys in (
            ("run", self.run),
            ("grid", self.grid),
            ("tune", self.tune),
            *((f"methods.{label}", keys) for label, keys in self.methods.items()),
        ):
            for key in keys:
                if key not in _RUN:
                    raise ValueError(
                        f"[{table}] has no key {key!r}; allowed are {', '.join(sorted(_RUN))}"
                    )
        if not self.methods:
            raise ValueError("no [methods.NAME]: nothing to run")
        for name, values in [
            *self.grid.items(),
            *([("lr", self.tune.get("lr"))] if self.tune else []),
        ]:
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"{name}={values!r}: expected a list of values, not empty")
        if self.tune and not self.run.get("validation"):
            raise ValueError(
                "[tune] chooses on a validation set: [run] needs validation, the share held out for it"
            )
        self.cases()
        self.trials()

    def cases(
        self, learning_rates: Mapping[tuple[str, int, str], float] | None = None
    ) -> list[Case]:
        """Every combination once, with the learning rates chosen for it.

        Synchronous SGD once for all tau.
        """
        return list(self._made({}, learning_rates or {}))

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
                config = check(compared(fields))
                case = Case(label, config)
                if case.setting in rates:
                    case = Case(label, config.replace(lr=rates[case.setting]))
                key = (label, repr(case.config))
                if key not in seen:
                    seen.add(key)
                    yield case


def read(path: Path, *, overrides: Mapping[str, Any] | None = None, virtual: bool = True) -> Spec:
    """The grid in a file, or one of those that are shipped, by its name: the TOML files beside this
    module.

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
    try:
        content = tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    for key in content:
        if key not in _TABLES:
            raise ValueError(
                f"{path}: no key {key!r} is known there; allowed are {', '.join(sorted(_TABLES))}"
            )
    try:
        machines = _machines(content.pop("machines", {}))
        made = Spec(
            title=content.pop("title", path.stem),
            machines=machines,
            run=content.pop("run", {}),
            methods=content.pop("methods", {}),
            **content,
        )
        for case in (*made.trials(), *made.cases()) if virtual else ():
            check_virtual(case.config)
        return made
    except (TypeError, ValueError) as error:
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
    if not dot and name in _TABLES:
        content[name] = value
    else:
        table = table or ("grid" if name in content.get("grid", {}) else "run")
        content.setdefault(table, {})[name] = value


def _machines(table: Mapping[str, Any]) -> list[Machines]:
    """One per combination of the values that are lists."""
    values = [value if isinstance(value, list) else [value] for value in table.values()]
    allowed = list(Machines.model_fields)
    for name, value in table.items():
        if name not in allowed:
            raise ValueError(f"[machines] has no key {name!r}; allowed are {', '.join(allowed)}")
        if value == []:
            raise ValueError(
                f"[machines] {name}=[]: expected a value, or a list of values, not empty"
            )
    return [
        Machines(**dict(zip(table, combination, strict=True)))
        for combination in itertools.product(*values)
    ]
