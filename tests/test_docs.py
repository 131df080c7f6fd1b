"""What the documentation shows is what the code writes now. `make docs` itself holds the links
between its pages."""

from __future__ import annotations

import importlib.util
import re
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
    assert (DOCS / "reference/families.md").read_text() == script("families").table(), (
        "run PYTHONPATH=. python docs/families.py"
    )


def test_chat_templates() -> None:
    assert (DOCS / "how-to/data.md").read_text() == script("data").page(), "run PYTHONPATH=. python docs/data.py"


def commands_of(file: Path) -> list[str]:
    """The commands of a recipe, all of whose flags must exist and whose steps read what steps before
    them wrote."""
    from hybridize.commands.run import _parsed

    from hybridize.recipe import read_recipe

    steps, written = read_recipe(file), {"teacher"}
    for step in steps:
        params = _parsed(file, step)
        assert params["checkpoint"] is None or str(params["checkpoint"]) in written, step.line
        if params.get("output") is not None:
            written.add(str(params["output"]))
    return [step.command for step in steps]


def test_the_tutorials_staged_conversion_is_a_recipe() -> None:
    file = DOCS / "staged.yaml"
    block = "steps:\n" + file.read_text().split("steps:\n", 1)[1]
    assert f"```yaml\n{block}```\n" in (DOCS / "tutorial.md").read_text()
    ranked, trained = ["replace", "distill"], ["score-mmr", "replace", "distill"]
    assert commands_of(file) == ["score-loo", *ranked, *trained, "distill", "eval", "export"]


def test_the_recipe_for_a_reasoner_gates_and_releases_each_stage() -> None:
    stage = ["score-mmr", "replace", "distill", "eval", "export"]
    assert commands_of(DOCS / "reasoner.yaml") == ["generate", "eval", *4 * stage, *stage[2:]]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    """It is no page of the site, whose links `make docs` checks."""
    readme = DOCS.parent / "README.md"
    text = readme.read_text()
    assert len(text.splitlines()) <= 80
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(links) > 30
    assert [link for link in links if "://" not in link and not (readme.parent / link).exists()] == []


def test_the_picture_is_of_figures_in_the_results() -> None:
    """docs/picture.py finds its two tables: the picture is drawn from figures that stand there
    alone."""
    picture = script("picture")
    divergences, speeds = picture.quality(), picture.speed()
    assert list(divergences) == ["0", "2 M", "8 M"]
    assert sorted(divergences.values(), reverse=True) == list(divergences.values())
    assert list(speeds) == [1024, 4096, 16384]
    assert all(times > 1 for times in speeds.values())


def test_the_page_on_extensions_shows_every_section_of_the_example() -> None:
    begun, ended = (
        re.findall(rf"# --8<-- \[{word}:(\w+)\]", (DOCS / "examples/extension.py").read_text()) for word in ("start", "end")
    )
    shown = re.findall(r'^--8<-- "examples/extension.py:(\w+)"$', (DOCS / "how-to/extending.md").read_text(), re.M)
    assert begun == ended == shown
    assert len(shown) == 6
