"""`eval --fidelity`: compares a checkpoint with its teacher on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .files import result_file
from .output import Output

if TYPE_CHECKING:
    import torch

    from hybridize.checkpoint.reader import CheckpointReader

NEW_TOKENS, PROMPT = 64, 64
ROWS = 4  # windows per forward pass


@dataclass(frozen=True)
class Fidelity:
    """The text on which a checkpoint is compared with its teacher."""

    fidelity: Annotated[
        str | None, typer.Option("--fidelity", help="Data on which the checkpoint is compared with its teacher.")
    ] = None
    teacher: opt.Teacher = None
    mask: opt.Mask = "none"
    chat_template: opt.ChatTemplate = None
    windows: Annotated[int, typer.Option("--windows", min=1, help="For --fidelity: sequences of data.")] = 24
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, help="For --fidelity: tokens per sequence.")] = 2048


def measure_fidelity(
    out: Output, source: CheckpointReader, name: str, given: Fidelity, target: Path, where: tuple[torch.device, torch.dtype],
    limit: int | None, trust_remote_code: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Writes fidelity.json into `target` and shows it. where: device and compute type. limit: rows
    of data."""
    import torch

    from hybridize.checkpoint.atomic import write_json_atomic
    from hybridize.evaluation.fidelity import greedy_agreement, measure
    from hybridize.inputs import check_weights, open_encoder, warn_of_length, windows_beside_teacher
    from hybridize.runtime.device import ran_on
    from hybridize.runtime.loading import load_model, quiet_transformers

    quiet_transformers()
    path, (device, dtype) = result_file(target, "fidelity.json", overwrite), where
    warn_of_length(source, given.seq_len, out)
    encoder = open_encoder(source, given.mask, given.chat_template, trust_remote_code, out)
    origin, text, batches = windows_beside_teacher(
        source, name, given.teacher, given.fidelity, encoder, limit=limit, windows=given.windows, seq_len=given.seq_len,
        batch_size=ROWS, notes=out,
    )  # fmt: skip
    check_weights(source, origin, notes=out)
    out.doing("loading the models")
    student, teacher = (load_model(reader.path, device, dtype, trust_remote_code) for reader in (source, origin))
    out.doing("comparing with the teacher")
    found = measure(student, teacher, [batch.to(device) for batch in batches], dtype)
    prompts = torch.cat([batch.ids[:, : min(PROMPT, given.seq_len // 2)] for batch in batches]).to(device)
    out.doing("generating greedy continuations")
    found["greedy"] = greedy_agreement(student, teacher, prompts, NEW_TOKENS, ROWS)
    settings = {
        "data": text, "mask": given.mask, "limit": limit, "windows": given.windows, "seq_len": given.seq_len,
        "teacher": origin.hash, **ran_on(device, dtype),
    }  # fmt: skip
    write_json_atomic(path, {"format": 1, "checkpoint": source.hash, "settings": settings, **found})
    out.result({"fidelity": str(path), **found}, lambda: _show(out, path, found))


def _show(out: Output, path: Path, found: dict[str, Any]) -> None:
    """A row for all positions and one per range of positions, then the greedy continuations."""
    columns = ["positions", "tokens", "reverse KL", "forward KL", "agreement", "perplexity", "teacher's"]
    rows = []
    for entry in [found, *found["positions"]]:
        span = "all" if "from" not in entry else f"{entry['from']}-{'' if entry['to'] is None else entry['to'] - 1}"
        figures = [f"{entry[key]:.4f}" for key in ("reverse_kl", "forward_kl", "agreement")]
        rows.append([span, str(entry["tokens"]), *figures, f"{entry['perplexity']:.3f}", f"{entry['teacher_perplexity']:.3f}"])
    out.table(str(path), columns, rows)
    greedy, spread = found["greedy"], "" if found["stderr"] is None else f" (reverse KL +- {found['stderr']:.4f} over windows)"
    print(
        f"greedy continuations of {greedy['prompts']} prompts agree for the first {greedy['mean']:.1f} of "
        f"{greedy['new_tokens']} tokens on average, median {greedy['median']:.0f}{spread}"
    )
