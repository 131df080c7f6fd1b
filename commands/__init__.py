"""The command line, with one file per subcommand. None of them imports torch before its arguments
are parsed."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
import typer.core

from hybridize import __version__

from .shared.interrupts import interruptible
from .shared.output import EXIT_INPUT, EXIT_INTERRUPTED

# The groups of `hybridize --help`, in order of use. A line has at most 58 characters, so that it is
# not cut at 80 columns.
GROUPS = {
    "Convert": {
        "score_loo": "Rank layers by the cost of removing each alone.",
        "score_mmr": "Rank layers by the loss that is left after converting.",
        "score_restore": "Rank layers by what restoring their attention recovers.",
        "replace": "Replace attention layers with Mamba layers.",
        "distill": "Distill a hybrid from its teacher.",
        "generate": "Write traces: prompts with the teacher's answers.",
    },
    "Measure": {
        "eval": "Run lm-eval tasks, with a baseline as a gate.",
        "bench": "Measure how fast checkpoints generate.",
        "report": "Make one page from results of eval and bench.",
    },
    "Serve": {
        "export": "Write a model for transformers, vLLM or llama.cpp.",
        "chat": "Chat with a checkpoint, or with two side by side.",
    },
    "Maintain": {
        "inspect": "Show layout, parameters, memory, lineage and rankings.",
        "verify": "Check the integrity of a checkpoint or an export.",
        "doctor": "Check that torch, GPU, kernels and libraries work.",
        "run": "Run the steps of a recipe, except those already done.",
        "demo": "Write a small teacher with traces and tasks to try out.",
    },
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)


OUTSIDE = "Extensions"


class _Grouped(typer.core.TyperGroup):
    """A command group whose help lists the commands under the headings of GROUPS, followed by the
    scorers of extensions. The types of Typer's own copy of click are private, hence Any."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._extend()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._extend()
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, COMMANDS))
        outside = {f"score_{kind}": scorer.summary for kind, scorer in self._extend().items()}
        for heading, commands in {**GROUPS, **({OUTSIDE: outside} if outside else {})}.items():
            with formatter.section(heading):
                formatter.write_dl([(name.replace("_", "-").ljust(width), line) for name, line in commands.items()])

    def _extend(self) -> dict[str, Any]:
        """Loads the extensions and adds a command for each of their scorers; returns these scorers
        by kind."""
        from hybridize.errors import InputError
        from hybridize.extensions import load_extensions

        try:
            load_extensions()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_INPUT)
        known = sys.modules.get("hybridize.scoring.scorers")  # so far only an extension can have imported it
        found = {} if known is None else {k: s for k, s in known.SCORERS.items() if f"score_{k}" not in COMMANDS}
        for kind, scorer in found.items():
            name = f"score-{kind}"
            if name not in self.commands:
                from .shared.scoring import command_of

                alone = typer.Typer(add_completion=False, rich_markup_mode=None)
                alone.command(name)(command_of(scorer))
                self.add_command(typer.main.get_command(alone), name)
        return found


app = typer.Typer(
    name="hybridize", cls=_Grouped, no_args_is_help=True, add_completion=True, rich_markup_mode=None,
    help="Turns a transformer into a fast hybrid: replaces attention layers with Mamba layers and distills from the teacher.",
)  # fmt: skip


def _version(requested: bool) -> None:
    if requested:
        from hybridize.checkpoint.manifest import libraries

        typer.echo(f"hybridize {__version__}: {', '.join(f'{name} {version}' for name, version in libraries().items())}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print all versions.")] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = importlib.import_module(f".{_name}", __name__)
    app.command(_name.replace("_", "-"))(_module.command)


def main() -> None:
    """Entry point of the program."""
    try:
        with interruptible():
            app()
    except KeyboardInterrupt:  # before the command starts or after it ends
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
