"""mkdocs hooks: the reference pages that are made from the command line and from the packages, so
that they cannot go stale."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import typer
from hybridize.commands import GROUPS, app
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "<!-- usage and flags, from the command line -->"
COMMANDS, PYTHON = "reference/commands", "reference/python"
EXTENDING = "how-to/extending.md"
# what a help line says at its end in brackets: [default: 0; x>=0], [x>=0], [required]
DEFAULT = re.compile(r"\s*\[(?:default: )?(?P<default>[^\[\]]*?)(?:(?:; )?(?P<range>x[<>]=?\S+|\d\S*<=?x\S*))?\]\.?$")


def packages() -> list[str]:
    """Packages of the library with at least one public module, as dotted names. The commands have
    pages of their own."""
    found = {file.parent for file in (ROOT / "hybridize").rglob("*.py") if (file.parent / "__init__.py").is_file()}
    names = sorted(".".join(folder.relative_to(ROOT).parts) for folder in found)
    return [name for name in names if "commands" not in name.split(".")]


def api_page(package: str) -> str:
    """A heading, and a stub for mkdocstrings for the package itself and for each public module of
    it."""
    folder = ROOT / package.replace(".", "/")
    modules = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    names = [package, *(f"{package}.{module}" for module in modules)]
    documented = [name for name in names if _says_anything(name)]
    return f"# {package}\n\n" + "\n".join(f"::: {name}\n" for name in documented)


def _says_anything(name: str) -> bool:
    """An empty __init__.py has nothing to show."""
    path = ROOT / name.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return bool(ast.parse(file.read_text(encoding="utf-8")).body)


def command_help(name: str) -> str:
    """Usage, docstring and flags of a command, as Markdown."""
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    context = command.make_context(f"hybridize {name}", [], resilient_parsing=True)
    rows = ["| argument or flag | meaning | default |", "|---|---|---|"]
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or parameter.hidden:
            continue
        flag, text = record
        shown = DEFAULT.search(text)
        meaning, default = (text[: shown.start()], shown["default"]) if shown else (text, "")
        if shown and shown["range"]:
            meaning += f" ({shown['range']})"
        rows.append(f"| `{flag}` | {_cell(meaning)} | {_cell(default)} |")
    usage = command.get_usage(context).removeprefix("Usage: ")
    return f"```text\n{usage}\n```\n\n{command.help}\n\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").strip()


def on_config(config: Any) -> Any:
    """Adds the commands, grouped as in `hybridize --help`, and the packages to the nav."""
    commands: list[Any] = [f"{COMMANDS}/index.md"]
    for heading, names in GROUPS.items():
        commands.append({heading: [f"{COMMANDS}/{name.replace('_', '-')}.md" for name in names]})
    python = [f"{PYTHON}/index.md", *({name: f"{PYTHON}/{name}.md"} for name in packages())]
    for section in config.nav:
        if "Reference" in section:
            section["Reference"] = [{"Command line": commands}, {"Python API": python}, *section["Reference"]]
        if "How-to" in section and (ROOT / "docs" / EXTENDING).is_file():
            section["How-to"].insert(-1, {"Extending": EXTENDING})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the change log, a page for each package, and one for a command that has no page yet."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for package in packages():
        files.append(File.generated(config, f"{PYTHON}/{package}.md", content=api_page(package)))
    for name in (name.replace("_", "-") for names in GROUPS.values() for name in names):
        page = f"{COMMANDS}/{name}.md"
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=f"# hybridize {name}\n\n{PLACEHOLDER}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills the placeholder in the page of a command."""
    path = Path(page.file.src_uri)
    if str(path.parent) != COMMANDS or path.stem == "index":
        return markdown
    if markdown.count(PLACEHOLDER) != 1:
        raise ValueError(f"docs/{path} must hold this line once: {PLACEHOLDER}")
    return markdown.replace(PLACEHOLDER, command_help(path.stem))
