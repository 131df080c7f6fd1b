"""The `hf` format: a directory that transformers loads with trust_remote_code=True, without hybridize installed.

The weights are the checkpoint's own files, byte for byte; hybridize.modeling's files travel beside them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hybridize import modeling
from hybridize.checkpoint.manifest import MANIFEST, read_manifest
from hybridize.checkpoint.reader import INDEX, SINGLE, CheckpointReader
from hybridize.checkpoint.writer import carried_files, write_json
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


def check_hf(source: CheckpointReader, name: str) -> None:
    """InputError when the source is no hybrid."""
    if source.config.get("model_type") != "hybridize":
        raise InputError(f"{name} is no hybrid (model_type {source.config.get('model_type')!r}); replace comes before export")


def write_hf(source: CheckpointReader, path: Path) -> None:
    """Fills the directory `path`."""
    for file in [*(source.path / f for f in _weight_files(source.path)), *carried_files(source.path), *modeling_files()]:
        shutil.copyfile(file, path / file.name)
    for extra in CARRIED_LOGS:
        if (source.path / extra).is_file():
            shutil.copyfile(source.path / extra, path / extra)
    manifest = read_manifest(source.path)
    if manifest is not None:
        write_json(path / MANIFEST, manifest)
    write_json(path / "config.json", source.config | {"auto_map": AUTO_MAP})


def _weight_files(path: Path) -> list[str]:
    if not (path / INDEX).exists():
        return [SINGLE]
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    return [INDEX, *sorted(set(index["weight_map"].values()))]
