"""`hybridize.json`: the lineage of a checkpoint, with the command, settings and library versions
that made it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize import __version__
from hybridize.checkpoint.json_files import read_json
from hybridize.errors import InputError

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader

MANIFEST = "hybridize.json"
FORMAT = 1
MIXER_LAYER = "linear_attention"  # in layer_types; also in modeling, which must not import from here
LIBRARIES = ("torch", "transformers", "safetensors", "lm_eval", "mamba_ssm", "causal_conv1d")


def libraries() -> dict[str, str]:
    """The versions of Python and of the installed libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Manifest:
    """Lineage of one checkpoint. `path` in parent and root is relative to the checkpoint's own
    directory, or a hub id."""

    parent: dict[str, str]
    root: dict[str, str]
    command: str
    settings: dict[str, Any]
    seed: int
    layers: list[dict[str, str]]
    data: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0  # training tokens since the root, all steps together

    def to_json(self) -> dict[str, Any]:
        entries = asdict(self)
        entries |= {key: hidden(entries[key]) for key in ("settings", "data")}
        return {"format": FORMAT, **entries, "version": __version__, "libraries": libraries()}


def hidden(value: Any) -> Any:
    """A value without secrets: users, passwords and queries of URLs; tokens of Hugging Face,
    OpenAI, GitHub and wandb."""
    if isinstance(value, dict):
        return {key: hidden(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(part) for part in value]
    if not isinstance(value, str):
        return value
    without = re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", value)
    without = re.sub(r"(\w+://[^?#\s]*)[?#]\S*", r"\1?***", without)
    return re.sub(r"\b(hf_|sk-|ghp_|wandb_v1_)[A-Za-z0-9]{20,}", "***", without)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest as written, or None if the directory has none. InputError if it has another
    format."""
    if not (checkpoint / MANIFEST).exists():
        return None
    found = read_json(checkpoint / MANIFEST)
    kinds = {"parent": dict, "root": dict, "command": str, "settings": dict, "layers": list, "data": list, "tokens": int}
    good = found.get("format") == FORMAT and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    good = good and all(isinstance(found[end].get(key), str) for end in ("parent", "root") for key in ("path", "hash"))
    good = good and all(_is_path(checkpoint, found[end]["path"]) for end in ("parent", "root"))
    if not good or not all(isinstance(entry, dict) for entry in (*found["layers"], *found["data"])) or found["tokens"] < 0:
        raise InputError(f"{checkpoint / MANIFEST} is not a manifest of format {FORMAT}")
    return found


def _is_path(checkpoint: Path, name: str) -> bool:
    try:
        (checkpoint / name).is_dir()
    except (OSError, ValueError):  # too long, a NUL
        return False
    return bool(name)


def check_manifest(source: CheckpointReader) -> None:
    """InputError if there is a manifest and it is damaged, or describes another number of layers
    than the config."""
    found = read_manifest(source.path)
    count = source.config.get("num_hidden_layers")
    if found is not None and len(found["layers"]) != count:
        raise InputError(f"{source.path / MANIFEST} describes {len(found['layers'])} layers, but config.json has {count}")


def descend(source: CheckpointReader, name: str, output: Path, command: str, settings: dict[str, Any], seed: int) -> Manifest:
    """The manifest of the checkpoint that `command` makes from `source` (called `name` by the user)
    at `output`."""
    before = read_manifest(source.path)
    parent = {"path": _seen_from(output, source.path, name), "hash": source.hash}
    root = parent
    if before is not None:
        origin = before["root"]
        local = (source.path / origin["path"]).resolve()
        root = {"path": _seen_from(output, local, origin["path"]), "hash": origin["hash"]}
    count = int(source.config.get("num_hidden_layers", 0))
    kept = before or {"layers": [{"origin": "teacher"} for _ in range(count)], "data": [], "tokens": 0}
    return Manifest(parent, root, command, settings, seed, kept["layers"], kept["data"], kept["tokens"])


def _seen_from(output: Path, path: Path, name: str) -> str:
    """A path relative to `output` if the user named a directory, else the hub id `name`."""
    if path.is_dir() and (Path(name).is_dir() or (path.is_absolute() and not _is_hub_cache(path))):
        return os.path.relpath(path.resolve(), output.resolve())
    return name


def _is_hub_cache(path: Path) -> bool:
    return "snapshots" in path.parts and any(part.startswith("models--") for part in path.parts)


def root_of(checkpoint: Path) -> str | None:
    """The teacher that a checkpoint descends from, as a path that can be opened or a hub id; None
    without a manifest."""
    found = read_manifest(checkpoint)
    if found is None:
        return None
    path = str(found["root"].get("path", ""))
    local = checkpoint / path
    return str(local.resolve()) if local.is_dir() else path


def ancestors(checkpoint: Path) -> dict[str, str]:
    """The checkpoints that this one was made from: content hash -> path or hub id, nearest first,
    the root last. Beyond a parent that is missing or was overwritten since, only the root is
    known."""
    found: dict[str, str] = {}
    here, root = checkpoint, None
    while (manifest := read_manifest(here)) is not None and manifest["parent"]["hash"] not in found:
        root = root or manifest["root"]
        parent = here / manifest["parent"]["path"]
        local = parent.is_dir()
        found[manifest["parent"]["hash"]] = os.path.relpath(parent) if local else manifest["parent"]["path"]
        if not local or (read_manifest(parent) or {}).get("hash") not in (None, manifest["parent"]["hash"]):
            break
        here = parent
    if root is not None:
        found.setdefault(root["hash"], root_of(checkpoint) or root["path"])
    return found
