"""The model card (README.md) of an export: layout, usage, results, verification and lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.export.origin import Origin, front_matter, plain, read_origin, result_lines


def model_card(
    source: CheckpointReader, manifest: dict[str, Any] | None, use: str, verified: str = "not verified",
    origin: Origin | None = None, name: str = "hybrid",
) -> str:  # fmt: skip
    """The model card in Markdown. use: how to load the export. verified: one sentence with the
    result of the comparison. name: the model's name."""
    config, origin = source.config, origin or read_origin(source, manifest)
    kinds = config["layer_types"]
    mixers = [str(i) for i, kind in enumerate(kinds) if kind == "linear_attention"]
    root = manifest["root"] if manifest else {"path": "unknown", "hash": "unknown"}
    teacher = plain(origin.base_model or Path(root["path"]).name or "a teacher")
    strip = "".join("M" if kind == "linear_attention" else "a" for kind in kinds)
    data = manifest["data"] if manifest else []
    tokens = manifest["tokens"] if manifest else 0
    how = f"and were distilled from the teacher on {tokens:,} tokens" if tokens else "and have not been trained"
    unknown = "that of the teacher and of the data; unknown to hybridize"
    lines = [
        front_matter(origin, name), f"# Hybrid of {teacher}", "",
        f"A language model that decodes faster than the transformer it was made from, {teacher}: {len(mixers)} of its "
        f"{len(kinds)} attention layers were replaced by Mamba layers (mixer: {(config['mixer'] or {}).get('kind')}), whose "
        f"memory does not grow with the text. The new layers were initialized from the attention weights {how}, by hybridize "
        "with the method of Apriel-H1 (arXiv 2511.02651). Tokenizer, chat template and vocabulary are the teacher's.",
        "", f"    {strip}   (layers from left to right; M: Mamba, a: attention)", "",
        "## Use", "", use, "",
        "## Results", "", *result_lines(origin),
        "## Verified", "", f"Against the checkpoint it was exported from, in float32: {verified}.", "",
        "## Licence and limits", "",
        f"Licence: {plain(origin.license) if origin.license else unknown}. "
        "The model has its teacher's knowledge and its mistakes. Recall over long texts and long chains of reasoning may be "
        "the first to suffer from the conversion.", "",
        "## Lineage", "",
        f"- teacher: `{plain(Path(root['path']).name)}`, content hash `{plain(root['hash'])[:16]}`",
        f"- checkpoint: content hash `{source.hash[:16]}`",
        f"- Mamba layers: {', '.join(mixers) or 'none'}",
        f"- training tokens since the teacher: {tokens:,}",
    ]  # fmt: skip
    lines += [f"- data: `{plain(Path(str(part.get('path', '?'))).name)}`, {plain(part.get('rows', '?'))} rows" for part in data]
    if manifest:
        lines.append(f"- last step: `{plain(manifest['command'])}`, made by hybridize {plain(manifest['version'])}")
    return "\n".join(lines) + "\n"
