"""Draw house.svg: the rooms of both packages on their floors, and who imports whom.

Floors are those of import-linter's contracts, arrows those of the import graph (one that others
imply is left out), and what a room is for stands in its first line. Run: python docs/draw_house.py
"""

from __future__ import annotations

import ast
import math
import re
import textwrap
from html import escape
from pathlib import Path

import grimp
from importlinter import api

HERE = Path(__file__).parent
SOURCES = {
    "distoptim": HERE.parent / "src" / "distoptim",
    "distoptim_experiments": HERE.parent / "experiments" / "src" / "distoptim_experiments",
}

BOX_WIDTH = 158
BOX_HEIGHT = 62
ROOM_WIDTH = 172
FLOOR_HEIGHT = 96
MARGIN = 44

Graph = dict[str, set[str]]
Place = tuple[float, float]


def floors(package: str) -> list[list[str]]:
    """The rooms of `package`, from its lowest floor to its highest."""
    for contract in api.read_configuration(str(HERE.parent / "pyproject.toml"))[
        "contracts_options"
    ]:
        if contract["type"] == "layers" and contract["containers"] == [package]:
            return [re.findall(r"\w+", layer) for layer in reversed(contract["layers"])]
    raise ValueError(f"no contract of layers for {package}")


def read(package: str, rooms: set[str]) -> Graph:
    """Each of `rooms`, and those of them that it imports."""
    modules = grimp.build_graph(package, cache_dir=None)
    graph: Graph = {room: set() for room in sorted(rooms)}
    for module in modules.modules - {package}:
        room = module.split(".")[1]
        imported = modules.find_modules_directly_imported_by(module) - {package}
        if room in rooms:
            graph[room] |= ({other.split(".")[1] for other in imported} & rooms) - {room}
    return graph


def below(graph: Graph, room: str) -> set[str]:
    """All that `room` imports, directly or not."""
    return graph[room].union(*(below(graph, other) for other in graph[room]))


def needed_arrows(graph: Graph) -> Graph:
    """The imports without those that a way over another room implies."""
    return {
        room: {
            other
            for other in others
            if not any(other in below(graph, between) for between in others - {other})
        }
        for room, others in graph.items()
    }


def width_of(rows: list[list[str]]) -> int:
    """Of a house; arrows need space beside its rooms."""
    return ROOM_WIDTH * max(3, *(len(row) for row in rows))


def places(graph: Graph, rows: list[list[str]], left: float) -> dict[str, Place]:
    """The left upper corner of each room's box, in a house whose left edge is at `left`."""
    found: dict[str, Place] = {}
    width = width_of(rows)

    def middle_of_what_it_imports(room: str) -> float:
        xs = [found[other][0] for other in graph[room] if other in found]
        return sum(xs) / len(xs) if xs else 0.0

    for level, rooms in enumerate(rows):
        row = sorted(rooms, key=middle_of_what_it_imports)
        step = width / len(row)
        for i, room in enumerate(row):
            x = left + step * (i + 0.5) - BOX_WIDTH / 2
            found[room] = (x, MARGIN + FLOOR_HEIGHT * (len(rows) - 1 - level))
    return found


def purpose(package: str, room: str) -> list[str]:
    """What a room is for, in up to three short lines: the first line of its docstring."""
    path = SOURCES[package] / room
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return textwrap.wrap(first.strip(".").replace("`", ""), 28, max_lines=3, placeholder=" …")


def arrows(graph: Graph, boxes: dict[str, Place]) -> list[str]:
    """From the lower edge of each room to the upper edge of those that it imports."""
    lines = []
    middle = sum(x for x, _ in boxes.values()) / len(boxes) + BOX_WIDTH / 2
    for room, others in needed_arrows(graph).items():
        for other in sorted(others):
            x1 = boxes[room][0] + BOX_WIDTH / 2
            x2 = boxes[other][0] + BOX_WIDTH / 2
            y1 = boxes[room][1] + BOX_HEIGHT
            y2 = boxes[other][1] - 6
            # Past the rooms of the floors between, not through them.
            aside = (
                0.0
                if y2 - y1 < FLOOR_HEIGHT
                else math.copysign(BOX_WIDTH * 0.9, x1 + x2 - 2 * middle)
            )
            bend = (y2 - y1) / 2 if not aside else FLOOR_HEIGHT / 2
            lines.append(
                f'<path d="M{x1:.0f},{y1:.0f} C{x1 + aside:.0f},{y1 + bend:.0f} '
                f'{x2 + aside:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"/>'
            )
    return lines


def box(package: str, room: str, place: Place) -> list[str]:
    """A room: its name, and what it is for."""
    x, y = place
    middle = x + BOX_WIDTH / 2
    lines = [f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"/>']
    lines.append(f'<text class="name" x="{middle:.0f}" y="{y + 17:.0f}">{escape(room)}</text>')
    for i, text in enumerate(purpose(package, room)):
        lines.append(f'<text x="{middle:.0f}" y="{y + 30 + 12 * i:.0f}">{escape(text)}</text>')
    return lines


def draw() -> str:
    """The picture, as SVG: a house for each package."""
    body = []
    left = 8.0
    height = 0.0
    for package, folder in SOURCES.items():
        existing = {path.stem for path in folder.iterdir()}
        rows = [[room for room in row if room in existing] for row in floors(package)]
        graph = read(package, {room for row in rows for room in row})
        boxes = places(graph, rows, left)
        width = width_of(rows)
        bottom = MARGIN + FLOOR_HEIGHT * len(rows) - (FLOOR_HEIGHT - BOX_HEIGHT)
        height = max(height, bottom + 12)
        body += [
            f'<rect class="house" x="{left:.0f}" y="4" width="{width}" height="{bottom + 4}" rx="8"/>',
            f'<text class="title" x="{left + 12:.0f}" y="28">{package}</text>',
            *arrows(graph, boxes),
        ]
        for room, place in boxes.items():
            body += box(package, room, place)
        left += width + 12
    style = (
        "text{font:10px sans-serif;text-anchor:middle;fill:#333}"
        ".name{font-weight:bold;font-size:12px}"
        ".title{font-weight:bold;font-size:16px;text-anchor:start}"
        "rect{fill:#fff;stroke:#456}.house{fill:#f2f5f8;stroke:none}"
        "path{fill:none;stroke:#7a8ca0;marker-end:url(#tip)}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><polygon points="0,0 8,4 0,8" fill="#7a8ca0"/></marker>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left:.0f} {height:.0f}">'
    return "\n".join([head, f"<style>{style}</style>", f"<defs>{tip}</defs>", *body, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "house.svg").write_text(draw())
