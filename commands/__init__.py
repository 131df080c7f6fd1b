"""The command line. One file per subcommand; none of them imports torch before its arguments are
parsed."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
import typer.core

from hybridize import __version__

from .shared.interrupts import interruptible
from .shared.output import EXIT_INPUT, EXIT_INTERRUPTED

# The groups of `hybridize --help`, in the order of use. A line is whole at 80 columns: at most 58
# characters.
GROUPS = {
    "Convert": {
        "score_loo": "Rank layers by what removing each alone costs.",
        "score_mmr": "Rank layers by how badly each converts.",
        "score_restore": "Rank layers by what giving attention back recovers.",
        "replace": "Replace attention layers with Mamba layers.",
        "distill": "Train a hybrid towards its teacher.",
        "generate": "Write traces: prompts with the teacher's own answers.",
    },
    "Measure": {
        "eval": "Run lm-eval tasks, against a baseline as a gate.",
        "bench": "Measure how fast checkpoints generate.",
        "report": "Make one page of what eval and bench measured.",
    },
    "Serve": {
        "export": "Write what transformers, vLLM or llama.cpp load.",
        "chat": "Talk to a checkpoint, or to two side by side.",
    },
    "Look after": {
        "inspect": "Show layout, parameters, memory, lineage and rankings.",
        "verify": "Check that every byte is as it was written.",
        "doctor": "Check that torch, GPU, kernels and libraries compute right.",
        "run": "Run the steps of a recipe, but for those that are done.",
        "demo": "Write a small teacher with traces and tasks to try.",
    },
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)


OUTSIDE = "Extensions"


class _Grouped(typer.core.TyperGroup):
    """The commands under the headings of GROUPS, in place of one list, and after them the scorers
    of extensions. Typer brings its own click, whose types are private."""

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
        """Loads extensions and adds a command for each scorer that they have; returns these scorers
        by kind."""
        from hybridize.errors import InputError
        from hybridize.extensions import load_extensions

        try:
            load_extensions()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_INPUT)
        known = sys.modules.get("hybridize.scoring.scorers")  # which nothing but an extension has imported by now
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
    help="Turns a transformer into a fast hybrid: attention layers become Mamba layers, distilled back to the teacher.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
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
    try:
        with interruptible():
            app()
    except KeyboardInterrupt:  # before the command itself has begun, or after it
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
