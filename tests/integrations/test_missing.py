"""Without its framework, a module says in one line what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["accelerate", "transformers", "lightning"])
def test_one_line_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("accelerate", "transformers", "lightning"):
        monkeypatch.delitem(sys.modules, f"distoptim.integrations.{known}", raising=False)
    # What is imported already is found without its parent.
    for module in {name, *(m for m in sys.modules if m.startswith(f"{name}."))}:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'distoptim\[{name}\]'$") as error:
        importlib.import_module(f"distoptim.integrations.{name}")
    assert "\n" not in str(error.value)
