"""Gathers what the site shows into build/pages, where every link is what it is in the repository.

README is its first page, and a notebook a page with its pictures beside it. `make docs` calls this, then Zensical.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from distoptim.cli import application

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
# Of the files that git knows.
SHOWN = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
    *("docs/*", ":!docs/*.py", "examples/*", "results/*.md", "results/*.png"),
)


def tracked() -> list[Path]:
    """Files of the repository that are shown, also those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SHOWN]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in found.splitlines() if (ROOT / line).is_file()]


def command_line() -> str:
    """A page of all commands and options, from the definitions that `--help` is made of."""
    page = application().generate_docs()
    # Its own table of contents says no more than the list of commands below it.
    return "# Command line\n\n" + page[page.index("**Commands**") :]


def notebook(path: Path) -> None:
    """Writes a notebook's cells and outputs as a page, where it is gathered."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(formulas(source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            picture = path.with_name(f"{path.stem}_{number}.png")
            parts.append(shown(output, picture))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    path.unlink()


def formulas(text: str) -> str:
    """TeX between dollars as it is written in pages (see docs/mathml.py)."""
    text = re.sub(r"\$\$(.*?)\$\$", r"```math\n\1\n```", text, flags=re.DOTALL)
    return re.sub(r"(?<![$`])\$([^$`]+)\$", r"$`\1`$", text)


def shown(output: dict[str, Any], picture: Path) -> str:
    """What a cell has printed or drawn; writes the picture."""
    if output["output_type"] == "stream":
        return "```\n" + "".join(output["text"]) + "```"
    picture.write_bytes(base64.b64decode(output["data"]["image/png"]))
    return f"![What these lines draw]({picture.name})"


def main() -> None:
    """Copy them anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in tracked():
        target = PAGES / ("index.md" if path == Path("README.md") else path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text((ROOT / path).read_text().replace(".ipynb)", ".md)"))
            continue
        shutil.copyfile(ROOT / path, target)
        if path.suffix == ".ipynb":
            notebook(target)
    (PAGES / "docs" / "reference" / "command-line.md").write_text(command_line())


if __name__ == "__main__":
    main()
