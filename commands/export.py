"""hybridize export"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import Output, guarded

if TYPE_CHECKING:
    from hybridize.export.driver import Exported


@dataclass(frozen=True)
class Card:
    """Contents of the model card, and upload of the result."""

    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The teacher's hub id, for the model card [default: if it is known].")
    ] = None
    license_: Annotated[
        str | None, typer.Option("--license", help="Licence for the model card, such as apache-2.0 [default: the teacher's].")
    ] = None
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this repository on the hub.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a new repository private.")] = False


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    form: Annotated[
        str,
        typer.Option("--format", help="hf (transformers, mamba2 and mamba), granite (transformers, vLLM), gguf (llama.cpp)."),
    ] = "hf",
    outtype: Annotated[
        str | None, typer.Option("--outtype", help="Data type of the matrices in a gguf: f32, f16 or q8_0 [default: f16].")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify", help="Require, or skip, the comparison in the runtime [default: compare if possible]."
        ),
    ] = None,
    card: Card,
    output: opt.Output = None,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    speech: opt.Speech,
) -> None:
    """Reads a hybrid; writes a directory (CHECKPOINT-FORMAT/ when -o is omitted) that its runtime
    loads without hybridize.

    hf: the unchanged weights and the modeling code (trust_remote_code=True). granite: a
    GraniteMoeHybridForCausalLM for stock transformers and vLLM. gguf: a file for llama.cpp. The
    last two support only Mamba-2 mixers. Each has a tokenizer and a model card, and is run and
    compared with the checkpoint before it appears.
    """
    out = speech.output()
    from hybridize.checkpoint.writer import check_output
    from hybridize.errors import InputError, setting
    from hybridize.export.driver import ExportSettings, export
    from hybridize.export.push import check_push, push
    from hybridize.inputs import open_checkpoint
    from hybridize.runtime.device import pick_device
    from hybridize.runtime.loading import quiet_transformers

    settings = ExportSettings(form, outtype, verify is not False, verify is True, card.base_model, card.license_)
    if card.private and card.push_to_hub is None:
        raise InputError(f"{setting('private')} requires {setting('push_to_hub')}")
    source = open_checkpoint(checkpoint, revision, notes=out)
    target = output or Path(f"{source.path.resolve().name}-{form}")
    check_output(target, overwrite, source.path)
    if card.push_to_hub is not None:
        check_push(card.push_to_hub)
    quiet_transformers()
    found = export(
        source, checkpoint, target, settings, overwrite=overwrite, device=pick_device(device), report=out.progress
    )  # fmt: skip
    address = None
    if card.push_to_hub is not None:
        out.progress(f"uploading to {card.push_to_hub}")
        address = push(target, card.push_to_hub, card.private)
    _show(out, target, form, found, address)


def _show(out: Output, target: Path, form: str, found: Exported, address: str | None) -> None:
    """Shows the files and the result of the comparison. address: URL on the hub, if uploaded."""
    if found.crashed:
        out.warn(f"{target} is written but not verified: {found.unverified}")

    def human() -> None:
        print(f"{target}: {', '.join(found.files)}")
        if address is not None:
            print(address)
        print(found.verdict.sentence() if found.verdict else f"not verified: {found.unverified}")

    verdict = None if found.verdict is None else asdict(found.verdict)
    result = {"output": str(target), "format": form, "files": found.files, "verified": verdict, "unverified": found.unverified}
    out.result({**result, "pushed": address}, human)
