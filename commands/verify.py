"""hybridize verify"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import guarded

SHOWN = 20


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare unchanged tensors with the parent's, bit for bit.")
    ] = False,
    *,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint or an export that hybridize wrote; writes nothing. Checks that every byte
    is as it was written.

    Each tensor and file is compared with its hash in the manifest, which has a hash of its own. If
    anything differs, it is listed and the exit code is 1.
    """
    out = speech.output()
    from dataclasses import asdict

    from hybridize.checkpoint.integrity import verify
    from hybridize.checkpoint.reader import resolve_checkpoint

    path, started = resolve_checkpoint(checkpoint), time.monotonic()
    found = verify(path, deep, lambda done, count: out.progress(f"{done} of {count} tensors", last=done == count))
    seconds = time.monotonic() - started

    def human() -> None:
        for line in found.damage[:SHOWN]:
            print(line)
        if len(found.damage) > SHOWN:
            print(f"and {len(found.damage) - SHOWN} more")
        state = f"{len(found.damage)} differ" if found.damage else "all as written"
        kept = "" if found.kept is None else f", {found.kept} tensors compared with the parent"
        size = f"{found.tensors} tensors ({found.bytes / 1e6:,.1f} MB), {found.files} files{kept}"
        print(f"{checkpoint}: {state}: {size}, {seconds:.1f} s")

    out.result({"checkpoint": checkpoint, "intact": not found.damage, **asdict(found), "seconds": round(seconds, 2)}, human)
    if found.damage:
        out.warn(found.damage[0]) if speech.as_json or speech.quiet else None
        raise typer.Exit(1)
