"""hybridize demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import guarded


@guarded
@expanded
def command(
    folder: Annotated[Path, typer.Argument(help="Where to write; the current folder when omitted.")] = Path(),
    overwrite: opt.Overwrite = False,
    *,
    speech: opt.Speech,
) -> None:
    """Reads the package; writes FOLDER/teacher/ (a small reasoning model with its traces) and
    FOLDER/tasks/ (lm-eval tasks).

    The teacher has 2.5 MB and solves word problems step by step. It is enough to try every command
    on a laptop.
    """
    out = speech.output()
    from hybridize.demo import write_demo

    paths = write_demo(folder, overwrite)
    out.result({"teacher": str(paths[0]), "tasks": str(paths[1])}, lambda: print(f"{paths[0]}  {paths[1]}"))
