"""What pages say of results/ is what its CSV files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from distoptim_experiments import frames
from distoptim_experiments.report import page, report, runs

ROOT = Path(__file__).parents[3]
STUDIES = ("small", "beyond", "shakespeare", "stragglers")


@pytest.fixture(scope="module")
def check():
    """The script beside the CSV files."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "results" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_the_csv_files_say(check):
    assert check.differing(check.PAGES) == []
    assert check.unsaid() == []


def test_a_wrong_digit_and_a_missing_table_are_named_and_tables_mended(check, tmp_path):
    right = (ROOT / "results" / "README.md").read_text()
    changed = tmp_path / "README.md"
    changed.write_text(right.replace("90.51 +- 0.07", "90.61 +- 0.07"))
    wrong = check.differing([changed])
    assert wrong[0].startswith(f"{changed}: the table should be\n| IID | tau 1 |")
    assert "no page shows the table shakespeare" in wrong
    check.differing([changed], write=True)
    assert changed.read_text() == right
    for name in check.SENTENCES:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(
            (ROOT / name).read_text().replace("2.1 points, and", "2.2 points, and")
        )
    (said,) = check.unsaid(tmp_path)
    assert said.startswith("docs/hidden-momentum.md: should say: It is above the paper's rule")


@pytest.mark.parametrize("study", STUDIES)
def test_reports_are_those_of_the_csv_files(study, monkeypatch):
    folder = ROOT / "results" / study
    # Their bytes depend on the fonts and versions here; that they are drawn is tested elsewhere.
    for name in ("losses", "times", "stragglers"):
        monkeypatch.setattr(report.pictures, name, lambda *_: b"")
    monkeypatch.setattr(report.front, "front", lambda *_: b"")
    found = runs.named(frames.read(folder))
    assert found.notes == []
    made = page.markdown(report.title(found), report.sections(found))
    assert made == (folder / page.MARKDOWN).read_text()
    for block in (block for section in report.sections(found) for block in section.blocks):
        if isinstance(block, page.Picture):
            assert (folder / page.PICTURES / f"{block.name}.png").exists()
