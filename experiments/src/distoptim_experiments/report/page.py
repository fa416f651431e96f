"""A report as Markdown and as one HTML page."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distoptim_experiments.report.tables import Table

MARKDOWN = "report.md"
HTML = "report.html"
PICTURES = "report-pictures"
MARK = "<!-- made by distoptim report -->"
"""The first line of a report: what begins with it may be written anew."""


@dataclass(frozen=True)
class Picture:
    """A PNG, what it is called and what it shows."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures below it."""

    heading: str
    blocks: Sequence[str | Table | Picture]


def write(
    title: str, sections: Sequence[Section], folder: Path, *, force: bool = False
) -> list[Path]:
    """Write both files, and the pictures that the Markdown shows beside them; returns the two
    paths.

    Args:
        title: of the report.
        sections: below it.
        folder: for the files.
        force: overwrite what is no report.

    Raises:
        ValueError: the folder cannot be written to, or has files of these names that are not a
            report's.
    """
    files = {
        folder / PICTURES / f"{block.name}.png": block.png
        for section in sections
        for block in section.blocks
        if isinstance(block, Picture)
    }
    files[folder / HTML] = html(title, sections).encode()
    files[folder / MARKDOWN] = markdown(title, sections).encode()
    try:
        if not force:
            _check_free(folder, files)
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from error
    return [folder / MARKDOWN, folder / HTML]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """All sections as Markdown; pictures by their file names."""
    # Everything that a template says of a run goes through `_plain`.
    made = _environment(autoescape=False, finalize=_plain)
    text = _rendered(made, "report.md.j2", title, sections)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """All sections as one page that asks for nothing else."""
    return _rendered(_environment(autoescape=True), "report.html.j2", title, sections)


def _check_free(folder: Path, files: dict[Path, bytes]) -> None:
    """Whether nothing that is not a report's would be lost."""
    present = folder / MARKDOWN
    if present.exists() and present.read_bytes().startswith(MARK.encode()):
        return
    taken = [path for path in files if path.exists()]
    if taken:
        raise ValueError(
            f"{taken[-1]}: is there and was not made by this command; give another folder with --out, "
            "or --force to overwrite it"
        )


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("distoptim_experiments.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _rendered(made: Environment, name: str, title: str, sections: Sequence[Section]) -> str:
    return made.get_template(name).render(
        title=title,
        sections=sections,
        mark=Markup(MARK),
        pictures=Markup(PICTURES),
        rows=_rows,
        data=_data,
    )


def _rows(table: Table) -> Iterator[list[tuple[str, bool]]]:
    """The rows of a table: texts, and whether they are the best of their kind."""
    for i in range(len(table.texts)):
        yield [
            (table.texts[name].iloc[i], name in table.best and bool(table.best[name].iloc[i]))
            for name in table.texts
        ]


def _data(picture: Picture) -> str:
    """A picture inside of a page."""
    return f"data:image/png;base64,{b64encode(picture.png).decode()}"


def _plain(value: object) -> object:
    """Text that Markdown shows as it is, in one line."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
