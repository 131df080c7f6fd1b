"""Tables in docs/ that the code writes are what it would write now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[1] / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_families() -> None:
    assert (DOCS / "families.md").read_text() == script("families").table(), "run PYTHONPATH=. python docs/families.py"


def test_chat_templates() -> None:
    assert (DOCS / "data.md").read_text() == script("data").page(), "run PYTHONPATH=. python docs/data.py"
