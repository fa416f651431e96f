"""Options of subcommands, made from the fields of models and from the algorithms' constructors."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal, TypeVar, final, get_args, get_origin

from cyclopts import Group, Parameter
from docstring_parser import parse
from pydantic.fields import FieldInfo

from distoptim.algorithms import ALGORITHMS
from distoptim.cli import fail
from distoptim.comm.codecs import CODECS
from distoptim.fragments import SEQUENTIAL, STRIDED
from distoptim_experiments import optimizers
from distoptim_experiments.config import RunConfig, algorithms
from distoptim_experiments.data import datasets
from distoptim_experiments.settings import (
    Needs,
    OneOf,
    Option,
    Settings,
    Values,
    allowed,
    plain_type,
)
from distoptim_experiments.training.launch import WorkerError

S = TypeVar("S", bound=Settings)

OWN = "Options of the algorithms (default: each one's own)"
_DELAYED = Needs("with a --delay above 0", lambda v: v.get("delay"))

MEANING = {
    "fragments": "Messages in which the parameters are averaged, spread over the round.",
    "pattern": f"Cut of the parameters into them: {SEQUENTIAL} (runs) or {STRIDED} (dealt out one by one).",
    "delay": "Local steps from launch to merge, at most tau; 0 waits.",
    "carry": "With a delay, keep the local steps made since the launch.",
    "reset_inner": "Forget the local optimizer's momentum at every merge.",
    "codec": f"In which means travel: {', '.join(CODECS)}, each also with +ef, error feedback, or +ef0.95, which decays.",
    "alpha": "Weight of the anchor in the pull; of EASGD the elastic strength.",
    "outer_momentum": "Momentum of the anchor.",
    "outer_lr": "Learning rate of the anchor.",
    "outer_nesterov": "Nesterov's form of --outer-momentum.",
    "block_momentum": "Momentum of the workers' mean from round to round.",
    "global_momentum": "Momentum of the workers' mean, for an inner optimizer without one.",
    "block_lr": "Learning rate of the anchor.",
    "nesterov_block": "Nesterov's form of --block-momentum.",
    "slow_momentum": "Momentum of the anchor.",
    "slow_lr": "Learning rate of the anchor.",
    "gain": "Share of the difference to the mean that is corrected.",
    "local_weight": "Weight of the local value beside the anchor at the merge.",
    "eager": "Use the worker's own share of a round at once, not a round late.",
    "clip": "Largest element of the anchor's momentum.",
    "approximation_rank": "Rank of the matrices that stand for gradients.",
}
"""The algorithms' own options in a few words; of one that is not here its docstring is shown."""


@dataclass(frozen=True)
class CliOption:
    """One option of a subcommand.

    Args:
        name: as an identifier.
        kind: type of the value, or of each of several.
        default: where it is not on the command line.
        help: what it means.
        allowed: its values, in words.
        place: where it stands in the help, and how.
        needs: when it has an effect.
        choices: for the help.
        several: values with commas between them.
    """

    name: str
    kind: Any
    default: Any
    help: str
    allowed: str
    place: Option
    needs: tuple[Needs, ...] = ()
    choices: tuple[str, ...] | None = None
    several: bool = False

    def with_need(self, needs: Needs) -> CliOption:
        """The same where it needs one thing more, which is asked for first."""
        return replace(self, needs=(needs, *self.needs))

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def parameter(self, group: Group) -> inspect.Parameter:
        """How cyclopts reads it from the command line."""
        # 0 is worth showing, and equal to False.
        shown = self.default is not False and self.default not in (None, "", ())
        unset = self.place.unset if self.default is None else None
        made = Parameter(
            name=self.flag,
            help=f"{self.help} [default: {unset}]" if unset else self.help,
            group=group,
            # Of a method cyclopts would expect that it belongs to the value's type.
            converter=None
            if self.kind is bool
            else lambda _, tokens: self._parsed(tokens[0].value),
            n_tokens=1 if self.several else None,
            negative=() if self.several else None,
            choices=self.choices,
            metavar=self.place.metavar or ("N,N,..." if self.several else None),
            show_default=shown,
        )
        kind: Any = GenericAlias(tuple, (self.kind, ...)) if self.several else self.kind
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[kind | None if self.default is None else kind, made],
        )

    def _parsed(self, text: str) -> Any:
        """The value that is written so; whether it is in its range, the model says."""
        try:
            if self.several:
                return tuple(self.kind(part) for part in text.split(","))
            return text if self.choices else self.kind(text)
        except ValueError:
            raise ValueError(f"{text!r}: allowed is {self.allowed}") from None


@dataclass(frozen=True)
class Given:
    """What a subcommand was called with.

    Args:
        options: all that it has, by name.
        values: what stands on the command line.
    """

    options: Mapping[str, CliOption]
    values: Values

    @property
    def all(self) -> dict[str, Any]:
        """The values of all options, by name."""
        return {**{name: option.default for name, option in self.options.items()}, **self.values}

    def made(self, model: type[S], *, without: Sequence[str] = ()) -> S:
        """The model, of those that are its fields.

        Args:
            model: which.
            without: fields whose names are those of another model's options here.
        """
        fields = fields_of(model, self.all)
        return model(**{name: value for name, value in fields.items() if name not in without})

    def check_effects(self, values: Values | None = None) -> None:
        """Whether what stands on the command line has an effect: who gives an option expects something of it.

        What switches something off may be given always.

        Args:
            values: of all options, where they are others than `all`.

        Raises:
            ValueError: naming the option that has none, and when it would have.
        """
        everything = self.all if values is None else values
        for name, value in self.values.items():
            option = self.options[name]
            if not value or value == "none":
                continue
            for need in option.needs:
                if not need.holds(everything):
                    text = ",".join(map(str, value)) if option.several else value
                    given = option.flag if value is True else f"{option.flag} {text}"
                    raise ValueError(f"{given}: has an effect only {need.when}")


@final
class Command:
    """A subcommand, as cyclopts takes it.

    Args:
        function: what it does with what stands on the command line; its docstring is the help.
        options: what may stand there.
    """

    def __init__(
        self, function: Callable[[Given], int | None], options: Iterable[CliOption]
    ) -> None:
        self.options = {option.name: option for option in options}
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__signature__ = _signature(self.options.values())
        # typing takes no object without them for something that can be called.
        self.__annotations__: dict[str, Any] = {}
        self._function = function

    def __call__(self, **values: Any) -> int:
        """Run it; returns the exit code."""
        with worker_errors():
            return self._function(self.given(values)) or 0

    def given(self, values: Values) -> Given:
        """What it runs with."""
        return Given(self.options, values)


def command(*tables: Iterable[CliOption]) -> Callable[[Callable[[Given], int | None]], Command]:
    """Makes a subcommand of a function."""
    return lambda function: Command(function, itertools.chain(*tables))


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Ends the command with one line where a worker has failed."""
    try:
        yield
    except WorkerError as error:
        fail(str(error), 1)


def _signature(options: Iterable[CliOption]) -> inspect.Signature:
    """Sections come in the order in which they first appear."""
    groups: dict[str, Group] = {}
    parameters = []
    for option in options:
        name = option.place.section
        groups.setdefault(name, Group(name, sort_key=len(groups)))
        parameters.append(option.parameter(groups[name]))
    return inspect.Signature(parameters)


def options_of(
    model: type[Settings],
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[CliOption]:
    """An option for each field of a model that is one.

    Args:
        model: with `Option` at its fields.
        only, without: names of fields; by default all.
        defaults: where they are others than the model's.
    """
    return [
        _of_field(
            name,
            field,
            place,
            (defaults or {}).get(name, field.get_default(call_default_factory=True)),
        )
        for name, field in model.model_fields.items()
        for place in field.metadata
        if isinstance(place, Option) and name not in without and (only is None or name in only)
    ]


def _of_field(name: str, field: FieldInfo, place: Option, default: Any) -> CliOption:
    kind = plain_type(field.annotation)
    several = get_origin(kind) is tuple
    if several:
        kind = plain_type(get_args(kind)[0])
    tables = [tuple(entry.names()) for entry in field.metadata if isinstance(entry, OneOf)]
    return CliOption(
        name=name,
        kind=kind,
        default=default,
        help=field.description or "",
        allowed=("values with commas between them, each " if several else "") + allowed(field),
        place=place,
        needs=(place.needs,) if place.needs else (),
        choices=get_args(kind) if get_origin(kind) is Literal else next(iter(tables), None),
        several=several,
    )


def algorithm_options() -> list[CliOption]:
    """An option for each that an algorithm has of its own, read from the constructors.

    None, the default, leaves the choice to the algorithm.
    """
    takers: dict[str, list[str]] = {}
    types: dict[str, type] = {}
    for algorithm in algorithms():
        for name, kind in optimizers.own_options(algorithm).items():
            takers.setdefault(name, []).append(algorithm)
            types[name] = kind
    words = {int: "an integer", float: "a number", str: "text", bool: ""}
    return [
        CliOption(
            name=name,
            kind=types[name],
            default=None,
            help=f"{MEANING.get(name) or _documented(takers[name][0], name)} Of {_all(takers[name])}.",
            allowed=words[types[name]],
            place=Option(OWN),
            needs=(_DELAYED,) if name == "carry" else (),
        )
        for name in takers
    ]


def _all(algorithms: Sequence[str]) -> str:
    everybody = len(algorithms) == len(ALGORITHMS)
    return "all but ddp and powersgd" if everybody else ", ".join(algorithms)


def _documented(algorithm: str, name: str) -> str:
    """What the algorithm's docstring says of an argument."""
    found = parse(ALGORITHMS[algorithm].__doc__ or "").params
    texts = [p.description for p in found if p.arg_name == name and p.description]
    return " ".join(texts[0].split()).rstrip(".") + "." if texts else ""


def fields_of(model: type[Settings], values: Values) -> dict[str, Any]:
    """Of options by name those that are fields of a model."""
    return {name: value for name, value in values.items() if name in model.model_fields}


def own_of(values: Values) -> dict[str, Any]:
    """Of options by name those of the algorithms that were given."""
    own = {name for algorithm in algorithms() for name in optimizers.own_options(algorithm)}
    return {name: value for name, value in values.items() if name in own and value is not None}


def config_of(values: Values) -> RunConfig:
    """A run of options by name, checked as a whole."""
    return optimizers.check(RunConfig(**fields_of(RunConfig, values), options=own_of(values)))


def check_files(config: RunConfig, *, tensorboard: bool = False, wandb: bool = False) -> None:
    """Fail here, before there are workers."""
    datasets.load(config.data, None if config.data_dir is None else Path(config.data_dir))
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs TensorBoard: pip install 'distoptim[tensorboard]'")
    if wandb and find_spec("wandb") is None:
        raise ValueError("--wandb needs Weights & Biases: pip install wandb")


def new_folder(name: str) -> Path:
    """A name for a folder in runs/ that begins with the time; it is not made."""
    return Path("runs") / f"{datetime.now().astimezone():%Y-%m-%d-%H%M%S}-{name}"
