"""What an export format is, and the registry of formats. A format subclasses `Format` in a file of
its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from hybridize.checkpoint.manifest import Manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, setting
from hybridize.export.verify import Reference, Verdict
from hybridize.extensions import register

FORMATS: dict[str, Format] = {}


class Format:
    """A directory that some runtime loads without hybridize.

    name: as `--format` has it. outtypes: the types that matrices can be kept in, the default first;
    none where they stay as they are. `check` returns a plan, of whatever type, that `write` and
    `use` get.
    """

    name: ClassVar[str]
    outtypes: ClassVar[tuple[str, ...]] = ()

    def check(self, source: CheckpointReader, name: str) -> Any:
        """InputError where the checkpoint, called `name`, cannot be exactly that; loads no weight."""
        return None

    def write(self, source: CheckpointReader, plan: Any, path: Path, name: str, lineage: Manifest, outtype: str | None) -> Path:
        """Fills the directory `path`; returns what the runtime loads, the directory or a file in
        it."""
        raise NotImplementedError

    def use(self, plan: Any, made: Path) -> str:
        """How to load `made`, in Markdown, for the model card."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """Why the runtime cannot be asked on this machine, or None."""
        return None

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """Compares what the runtime computes with `wanted`. WorkError where it is another model,
        RuntimeCrash where the runtime gives no answer."""
        raise NotImplementedError


def register_format(form: Format) -> Format:
    """From here on `export` can write it."""
    return register(FORMATS, form.name, form)


def format_of(name: str) -> Format:
    """InputError for a format that nobody has registered."""
    if name not in FORMATS:
        raise InputError(f"{setting('form')} {name} is unknown; use {', '.join(FORMATS)}")
    return FORMATS[name]


def check_hybrid(source: CheckpointReader, name: str) -> None:
    """InputError when the source is no hybrid."""
    if source.config.get("model_type") != "hybridize":
        raise InputError(f"{name} is no hybrid (model_type {source.config.get('model_type')!r}); replace comes before export")
