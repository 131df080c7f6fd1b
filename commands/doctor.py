"""hybridize doctor"""

from __future__ import annotations

import re

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import EXIT_FAILED, LINES, guarded


@guarded
@expanded
def command(device: opt.Device = "auto", *, speech: opt.Speech) -> None:
    """Examines the machine; writes nothing. Checks that torch, GPU, kernels and libraries are
    installed, compatible and compute correctly.

    Shows each fault with the command that fixes it; with any fault the exit code is 1. The GPU is
    checked with --device cuda, or if the machine has one.
    """
    out = speech.output()
    from dataclasses import asdict

    import typer

    from hybridize.doctor import examine
    from hybridize.errors import InputError

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device} is not a device; use auto, cpu or cuda")
    found = examine(device, lambda name: LINES.doing(f"checking {name}"))
    faults = [finding for finding in found if finding.state == "fault"]

    def human() -> None:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            print(f"{finding.state:6} {finding.name:{width}}  {finding.detail}")
            if finding.mend:
                print(f"{'':6} {'':{width}}  fix: {finding.mend}")
        print(f"{len(faults)} fault{'' if len(faults) == 1 else 's'}")

    out.result({"ok": not faults, "findings": [asdict(finding) for finding in found]}, human)
    if faults:
        raise typer.Exit(EXIT_FAILED)
