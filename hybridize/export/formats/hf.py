"""The `hf` format: a directory that transformers loads with trust_remote_code=True, without hybridize installed.

The weights are the checkpoint's own files, byte for byte; hybridize.modeling's files travel beside them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hybridize import modeling
from hybridize.checkpoint.atomic import write_json
from hybridize.checkpoint.integrity import seal
from hybridize.checkpoint.manifest import Manifest
from hybridize.checkpoint.reader import INDEX, CheckpointReader, carry, check_inside
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


def write_hf(source: CheckpointReader, path: Path, lineage: Manifest) -> None:
    """Fills the directory `path`."""
    weights = [*([INDEX] if source.sharded else []), *source.files]
    for file in [*(source.path / name for name in weights), *modeling_files()]:
        shutil.copyfile(file, path / file.name)
    carry(source.path, path)
    for extra in CARRIED_LOGS:
        if (source.path / extra).is_file():
            check_inside(source.path, source.path / extra)
            shutil.copyfile(source.path / extra, path / extra)
    write_json(path / "config.json", source.config | {"auto_map": AUTO_MAP})
    seal(path, lineage.to_json(), [source.take_print(name) for name in source.names], source.names)
