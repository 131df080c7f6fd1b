"""hybridize export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .models import open_checkpoint
from .output import Output, guarded


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    form: Annotated[
        str, typer.Option("--format", help="hf (transformers, any mixer), granite (transformers, vLLM), gguf (llama.cpp).")
    ] = "hf",
    outtype: Annotated[
        str | None, typer.Option("--outtype", help="Matrices of a gguf: f32, f16 or q8_0 [default: f16].")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result with the checkpoint in its runtime.")
    ] = True,
    output: opt.Output = None,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a hybrid; writes a directory (CHECKPOINT-FORMAT/ when -o is omitted) that its runtime loads without hybridize.

    hf: weights byte for byte, and the modeling code (trust_remote_code=True). granite: a GraniteMoeHybridForCausalLM for stock
    transformers and vLLM. gguf: a file for llama.cpp. The last two take Mamba-2 mixers only. Each comes with tokenizer and a
    model card, and is loaded and compared with the checkpoint before it appears.
    """
    out = Output(as_json, quiet)
    from hybridize.checkpoint.writer import check_output
    from hybridize.export.export import ExportSettings, export
    from hybridize.runtime import pick_device, quiet_transformers

    settings = ExportSettings(form, outtype, verify)
    source = open_checkpoint(checkpoint, revision)
    target = output or Path(f"{source.path.resolve().name}-{form}")
    check_output(target, overwrite, source.path)
    quiet_transformers()
    found = export(
        source, checkpoint, target, settings, overwrite=overwrite, device=pick_device(device), report=out.progress
    )  # fmt: skip

    def human() -> None:
        print(f"{target}: {', '.join(found.files)}")
        print(found.verdict.sentence() if found.verdict else f"not verified: {found.unverified}")

    verdict = None if found.verdict is None else asdict(found.verdict)
    result = {"output": str(target), "format": form, "files": found.files, "verified": verdict, "unverified": found.unverified}
    out.result(result, human)
