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


def test_the_readmes_conversion_is_a_recipe() -> None:
    """It stands there as in docs/staged.yaml, and all of its steps are commands with flags that there are."""
    from hybridize.commands.run import _parsed

    from hybridize.recipe import read_recipe

    file = DOCS / "staged.yaml"
    block = "steps:\n" + file.read_text().split("steps:\n", 1)[1]
    assert "".join(f"    {line}\n" for line in block.splitlines()) in (DOCS.parent / "README.md").read_text()
    steps = read_recipe(file)
    assert [step.command for step in steps] == [
        "score-loo", "replace", "distill", "score-mmr", "replace", "distill", "distill", "eval", "export",
    ]  # fmt: skip
    parsed = [_parsed(file, step) for step in steps]
    written = {str(params["output"]) for params in parsed if params.get("output") is not None}
    read = {str(params["checkpoint"]) for params in parsed}
    assert read <= written | {"teacher"}  # each step reads what one before it wrote
