"""The `hf` format: a directory that transformers loads with trust_remote_code=True, without hybridize installed.

The weights are the checkpoint's own files, byte for byte; hybridize.modeling's files travel beside them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from hybridize import modeling
from hybridize.checkpoint.manifest import MANIFEST, read_manifest
from hybridize.checkpoint.reader import INDEX, SINGLE, CheckpointReader
from hybridize.checkpoint.writer import AtomicDirectory, carried_files, write_json
from hybridize.errors import InputError

AUTO_MAP = {
    "AutoConfig": "configuration_hybridize.HybridConfig",
    "AutoModelForCausalLM": "modeling_hybridize.HybridForCausalLM",
}
CARRIED_LOGS = ("metrics.jsonl", "eval.jsonl")


def modeling_files() -> list[Path]:
    """hybridize.modeling's modules, without the package's __init__."""
    folder = Path(modeling.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def export_hf(source: CheckpointReader, name: str, output: Path, overwrite: bool) -> list[str]:
    """Writes the directory and its model card; returns the files written. InputError when the source is no hybrid."""
    if source.config.get("model_type") != "hybridize":
        raise InputError(f"{name} is no hybrid (model_type {source.config.get('model_type')!r}); replace comes before export")
    weights = [source.path / file for file in _weight_files(source.path)]
    with AtomicDirectory(output, overwrite) as path:
        for file in [*weights, *carried_files(source.path), *modeling_files()]:
            shutil.copyfile(file, path / file.name)
        for extra in CARRIED_LOGS:
            if (source.path / extra).is_file():
                shutil.copyfile(source.path / extra, path / extra)
        manifest = read_manifest(source.path)
        if manifest is not None:
            write_json(path / MANIFEST, manifest)
        (path / "README.md").write_text(model_card(source, manifest), encoding="utf-8")
        write_json(path / "config.json", source.config | {"auto_map": AUTO_MAP})
    return sorted(file.name for file in output.iterdir())


def _weight_files(path: Path) -> list[str]:
    if not (path / INDEX).exists():
        return [SINGLE]
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    return [INDEX, *sorted(set(index["weight_map"].values()))]


def model_card(source: CheckpointReader, manifest: dict[str, Any] | None) -> str:
    """README.md: layout, lineage, data, and how to load it."""
    config = source.config
    kinds = config["layer_types"]
    mixers = [str(i) for i, kind in enumerate(kinds) if kind == "linear_attention"]
    root = manifest["root"] if manifest else {"path": "unknown", "hash": "unknown"}
    strip = "".join("M" if kind == "linear_attention" else "a" for kind in kinds)
    data = manifest["data"] if manifest else []
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [hybridize, mamba, hybrid]", "---",
        f"# Hybrid of {_plain(Path(root['path']).name or 'a teacher')}", "",
        f"{len(mixers)} of {len(kinds)} attention layers are Mamba layers (mixer: {(config['mixer'] or {}).get('kind')}).", "",
        f"    {strip}   (M Mamba, a attention)", "",
        "## Use", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)', "```", "",
        "Needs torch and transformers 5.17 or newer. With mamba-ssm and causal-conv1d on a CUDA device it runs their kernels,",
        "elsewhere plain PyTorch. Assisted decoding is refused: a recurrent state cannot be rolled back.", "",
        "## Lineage", "",
        f"- teacher: `{_plain(root['path'])}`, content hash `{_plain(root['hash'])[:16]}`",
        f"- this checkpoint: content hash `{source.hash[:16]}`",
        f"- Mamba layers: {', '.join(mixers) or 'none'}",
        f"- training tokens since the teacher: {manifest['tokens'] if manifest else 0:,}",
    ]  # fmt: skip
    lines += [f"- data: `{_plain(part.get('path', '?'))}`, {part.get('rows', '?')} rows" for part in data]
    if manifest:
        lines.append(f"- last step: `{_plain(manifest['command'])}`, made by hybridize {_plain(manifest['version'])}")
    return "\n".join(lines) + "\n"


def _plain(text: Any) -> str:
    """Text from a file, safe inside Markdown: no control characters, no markup."""
    return re.sub(r"[^\w./:+ @-]", "_", str(text))[:200]
