"""hybridize export"""

from __future__ import annotations

from pathlib import Path

from . import options as opt
from .models import open_checkpoint
from .output import Output, guarded


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    output: opt.Output = None,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a hybrid; writes a directory (CHECKPOINT-hf/ when -o is omitted) that transformers loads without hybridize.

    Weights byte for byte, tokenizer, the modeling code (for trust_remote_code=True), and a model card with the lineage.
    """
    out = Output(as_json, quiet)
    from hybridize.checkpoint.writer import check_output
    from hybridize.export.hf import export_hf

    source = open_checkpoint(checkpoint, revision)
    target = output or Path(f"{Path(checkpoint).name}-hf")
    check_output(target, overwrite, source.path)
    files = export_hf(source, checkpoint, target, overwrite)
    out.result(
        {"output": str(target), "files": files},
        lambda: print(f'{target}: AutoModelForCausalLM.from_pretrained("{target}", trust_remote_code=True)'),
    )
