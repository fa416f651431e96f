"""A report as Markdown and as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from distoptim_experiments.report.tables import Table

MARKDOWN, HTML, PICTURES = "report.md", "report.html", "report-pictures"

_CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #c9c9c9; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --page: #16181c; --line: #44474d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
p { max-width: 48rem; overflow-wrap: break-word; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; color: var(--text);
  min-width: calc(var(--inches) * 4.8rem); max-width: calc(var(--inches) * 6.4rem); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 0 .25rem 1.4rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--page); }
thead th { border-bottom: 2px solid var(--line); }
@page { size: landscape; margin: 12mm; }
@media print { :root { --text: #000; --page: #fff; --line: #999; color-scheme: light; }
  body { max-width: none; margin: 0; padding: 0; font-size: 11pt; } figure, .scroll { overflow: visible; }
  figure svg { min-width: 0; } th:first-child, td:first-child { position: static; background: none; }
  figure, p, table, tr { break-inside: avoid; } h2, h3, thead, p:has(+ figure) { break-after: avoid; } }
"""
_PICTURE_CSS = (
    "<style>svg { color: #1b1b1b } @media (prefers-color-scheme: dark) { svg { color: #e6e6e6 } }"
    "</style>"
)


@dataclass(frozen=True)
class Picture:
    """An SVG element, what it is called and what it shows."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and pictures below it."""

    heading: str
    blocks: Sequence[str | Table | Picture]


def write(title: str, sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write both files, and the pictures that the Markdown shows beside them; returns the two
    paths.

    Raises:
        ValueError: the folder cannot be written to.
    """
    pictures = [
        block for section in sections for block in section.blocks if isinstance(block, Picture)
    ]
    files = {folder / MARKDOWN: markdown(title, sections), folder / HTML: html(title, sections)}
    files |= {
        folder / PICTURES / f"{p.name}.svg": re.sub(
            r"(<svg[^>]*>)", rf"\1{_PICTURE_CSS}", p.svg, count=1
        )
        for p in pictures
    }
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: {error.strerror}") from error
    return [folder / MARKDOWN, folder / HTML]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """All sections as Markdown; pictures by their file names."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.heading}", *(_markdown(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """All sections as one page that asks for nothing else."""
    body = "\n".join(
        f"<section>\n<h2>{escape(section.heading)}</h2>\n"
        + "\n".join(_html(block) for block in section.blocks)
        + "\n</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, Picture):
        return f"![{_plain(block.title)}]({PICTURES}/{block.name}.svg)"
    rows = [
        block.header,
        ["---", *("---:" for _ in block.header[1:])],
        *(
            [f"**{_plain(c.text)}**" if c.best else _plain(c.text) for c in row]
            for row in block.rows
        ),
    ]
    return f"**{_plain(block.title)}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _html(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Picture):
        return f'<figure aria-label="{escape(block.title)}">\n{_own_ids(block)}\n</figure>'
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in block.header)
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td><strong>{escape(c.text)}</strong></td>"
            if c.best
            else f"<td>{escape(c.text)}</td>"
            for c in row
        )
        + "</tr>"
        for row in block.rows
    )
    return (
        f'<h3>{escape(block.title)}</h3>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _own_ids(picture: Picture) -> str:
    """Ids are one space per page, and every picture of matplotlib has a "figure_1"."""
    return re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{picture.name}-", picture.svg)
