"""hybridize report"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .shared import options as opt
from .shared.files import result_file
from .shared.flags import expanded
from .shared.output import guarded


@guarded
@expanded
def command(
    paths: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Checkpoints, folders of checkpoints, or results.")],
    output: opt.Output = None,
    title: Annotated[str, typer.Option("--title", help="The page's heading.")] = "Hybrids",
    overwrite: opt.Overwrite = False,
    *,
    speech: opt.Speech,
) -> None:
    """Reads folders of checkpoints with results of eval and bench; writes index.html into ./report
    (or -o).

    Shows speed and loss of quality by number of Mamba layers: a chart, a table with the drop of
    each stage from its teacher, training curves, recall, layouts, lineage and exports. The page is
    a single file. Nothing is measured.
    """
    out = speech.output()
    from hybridize import __version__
    from hybridize.checkpoint.atomic import write_text_atomic
    from hybridize.errors import InputError
    from hybridize.report.collect import collect
    from hybridize.report.page import page
    from hybridize.report.plot import charts

    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist")
    target = output or Path("report")
    index = result_file(target, "index.html", overwrite, "the report goes")
    found = collect(paths)
    drawn = charts(found)
    made = f"{time.strftime('%Y-%m-%d')}, hybridize {__version__}, {len(found.entries)} checkpoints"
    write_text_atomic(index, page(found, drawn, title, made))
    for problem in found.problems:
        out.warn(f"not read: {problem}")
    names = [entry.name for entry in found.entries]
    summary = {"report": str(index), "checkpoints": names, "pictures": sorted(drawn), "problems": found.problems}
    out.result(summary, lambda: print(f"{index}: {len(names)} checkpoints"))
