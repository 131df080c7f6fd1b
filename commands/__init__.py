"""The command line. One file per subcommand; none of them imports torch before its arguments are parsed."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from hybridize import __version__

from .interrupts import interruptible
from .output import EXIT_INTERRUPTED

COMMANDS = (
    "score_loo",
    "score_mmr",
    "score_restore",
    "replace",
    "distill",
    "eval",
    "export",
    "bench",
    "generate",
    "report",
    "inspect",
    "verify",
    "doctor",
    "demo",
)

app = typer.Typer(
    name="hybridize", no_args_is_help=True, add_completion=True, rich_markup_mode=None,
    help="Turns a transformer into a fast hybrid: attention layers become Mamba layers, distilled back to the teacher.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hybridize {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = importlib.import_module(f".{_name}", __name__)
    app.command(_name.replace("_", "-"))(_module.command)


def main() -> None:
    try:
        with interruptible():
            app()
    except KeyboardInterrupt:  # before the command itself has begun, or after it
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
