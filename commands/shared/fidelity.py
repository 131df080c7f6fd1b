"""What `eval --fidelity` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import check_weights, open_encoder, result_file, text_beside, warn_of_length
from .output import LINES, Output

if TYPE_CHECKING:
    import torch

    from hybridize.checkpoint.reader import CheckpointReader

NEW_TOKENS, PROMPT = 64, 64
ROWS = 4  # windows in one forward pass


def measure_fidelity(
    out: Output, source: CheckpointReader, name: str, teacher: str | None, data: str | None, target: Path, overwrite: bool,
    mask: str, chat_template: Path | None, limit: int | None, windows: int, seq_len: int,
    where: torch.device, compute: torch.dtype, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Writes fidelity.json into `target` and shows it."""
    import torch

    from hybridize.checkpoint.atomic import write_json_atomic
    from hybridize.evaluation.fidelity import greedy_agreement, measure
    from hybridize.runtime.device import ran_on
    from hybridize.runtime.loading import load_model, quiet_transformers

    quiet_transformers()
    path = result_file(target, "fidelity.json", overwrite)
    warn_of_length(out, source, seq_len)
    encoder = open_encoder(source, mask, chat_template, trust_remote_code)
    origin, text, batches = text_beside(out, source, name, teacher, data, encoder, limit, windows, seq_len, ROWS)
    check_weights(source, origin)
    LINES.doing("loading the models")
    student, model = (load_model(reader.path, where, compute, trust_remote_code) for reader in (source, origin))
    LINES.doing("comparing with the teacher")
    found = measure(student, model, [batch.to(where) for batch in batches], compute)
    prompts = torch.cat([batch.ids[:, : min(PROMPT, seq_len // 2)] for batch in batches]).to(where)
    LINES.doing("writing greedy continuations")
    found["greedy"] = greedy_agreement(student, model, prompts, NEW_TOKENS, ROWS)
    settings = {"data": text, "mask": mask, "limit": limit, "windows": windows, "seq_len": seq_len, "teacher": origin.hash}
    write_json_atomic(path, {"format": 1, "checkpoint": source.hash, "settings": settings | ran_on(where, compute), **found})
    out.result({"fidelity": str(path), **found}, lambda: _show(out, path, found))


def _show(out: Output, path: Path, found: dict[str, Any]) -> None:
    columns = ["positions", "tokens", "reverse KL", "forward KL", "agreement", "perplexity", "teacher's"]
    rows = []
    for entry in [found, *found["positions"]]:
        span = "all" if "from" not in entry else f"{entry['from']}-{'' if entry['to'] is None else entry['to'] - 1}"
        figures = [f"{entry[key]:.4f}" for key in ("reverse_kl", "forward_kl", "agreement")]
        rows.append([span, str(entry["tokens"]), *figures, f"{entry['perplexity']:.3f}", f"{entry['teacher_perplexity']:.3f}"])
    out.table(str(path), columns, rows)
    greedy, spread = found["greedy"], "" if found["stderr"] is None else f" (reverse KL +- {found['stderr']:.4f} over windows)"
    print(
        f"greedy continuations of {greedy['prompts']} prompts stay the same for {greedy['mean']:.1f} of {greedy['new_tokens']} "
        f"tokens in the mean, {greedy['median']:.0f} in the median{spread}"
    )
