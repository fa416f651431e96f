"""Formulas of the site as MathML, which browsers typeset themselves: no script, nothing from elsewhere.

As GitHub has them: a block fenced with `math`, and TeX between $` and `$ within a line.
"""

from __future__ import annotations

from typing import Any
from xml.etree.ElementTree import Element, fromstring

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

MATHML = "http://www.w3.org/1998/Math/MathML"


def block(source: str, *_: Any, **__: Any) -> str:
    """What a fence of `math` becomes; called by superfences."""
    return f'<div class="formula">{convert(source.strip(), display="block")}</div>'


class _Inline(InlineProcessor):
    def handleMatch(self, m: Any, data: str) -> tuple[Element, int, int]:
        # HTML knows the element without its namespace, which markdown would write into its name.
        formula = convert(m.group(1)).replace(f' xmlns="{MATHML}"', "")
        return fromstring(formula), m.start(0), m.end(0)


class Formulas(Extension):
    """TeX within a line."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Before the pattern of code, which has the same marks."""
        md.inlinePatterns.register(_Inline(r"\$`([^`]+)`\$"), "formula", 200)


def makeExtension(**options: Any) -> Formulas:
    """Where markdown looks for it."""
    return Formulas(**options)
