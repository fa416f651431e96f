"""Without its framework, and in a version that is another, a module says in one line what to do."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from distoptim.integrations import hooks
from distoptim.testing.processes import run
from tests.helpers import marks

FRAMEWORKS = ["accelerate", "transformers", "lightning"]


class Without:
    """Finds no such package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_line_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = f"distoptim.integrations.{name}"
    for module in [m for m in sys.modules if m in (name, ours) or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(name), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"pip install 'distoptim\[{name}\]'$") as error:
        importlib.import_module(ours)
    assert "\n" not in str(error.value)


class Hooked:
    there = None

    def prepare(self, model: object, evaluation_mode: bool = False) -> None: ...


def test_one_line_names_the_version_that_lacks_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "version", lambda name: "9.1")
    hooks.check("lightning", {Hooked: ("there", "prepare(evaluation_mode)"), Hooked(): ("there",)})
    for owner, missing in (
        (Hooked, "gone"),
        (Hooked, "prepare(other)"),
        (Hooked(), "_models"),
    ):
        with pytest.raises(
            ImportError, match=rf"^lightning 9\.1 is not .* has no {re.escape(missing)}; "
        ):
            hooks.check("lightning", {owner: (missing,)})
    moved = ImportError("cannot import name 'Callback'", name="lightning.pytorch")
    assert re.fullmatch(
        "lightning 9.1 is not .*'Callback'; tested is .*", str(hooks.unusable("lightning", moved))
    )


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_page_says_which_versions_are_tested(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    assert re.search(rf"{name} {re.escape(hooks.TESTED[name])}", page, re.IGNORECASE)


def _changed(rank: int, name: str) -> None:
    module = importlib.import_module(f"distoptim.integrations.{name}")
    owner, hook = {
        "accelerate": ("Accelerator", "prepare_model"),
        "transformers": ("Trainer", "_load_scaler"),
        "lightning": ("DDPStrategy", "configure_ddp"),
    }[name]
    delattr(getattr(module, owner), hook)
    del sys.modules[f"distoptim.integrations.{name}"]
    with pytest.raises(ImportError, match=rf"^{name} \d.* is not .* has no {hook}"):
        importlib.import_module(f"distoptim.integrations.{name}")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks.trainer(name)) for name in FRAMEWORKS]
)
def test_a_changed_hook_is_noticed_at_import(name: str) -> None:
    # In a process that ends with it, and whose server has imported the framework already.
    run(_changed, 1, name, backend=None)
