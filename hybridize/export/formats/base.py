"""Base class and registry of export formats. Each format subclasses `Format` in its own file."""

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

    name: the name by which users select it. outtypes: data types that matrices can be stored in,
    the default first; empty if the format keeps them as they are. `check` returns a plan of any
    type, which is passed to `write` and `use`.
    """

    name: ClassVar[str]
    outtypes: ClassVar[tuple[str, ...]] = ()

    def check(self, source: CheckpointReader, name: str) -> Any:
        """Returns the plan, without loading weights. InputError if the format cannot represent the
        checkpoint, called `name` in messages, exactly."""
        return None

    def write(self, source: CheckpointReader, plan: Any, path: Path, name: str, lineage: Manifest, outtype: str | None) -> Path:
        """Writes the export into the directory `path`; returns what the runtime loads, which is the
        directory or a file in it."""
        raise NotImplementedError

    def use(self, plan: Any, made: Path) -> str:
        """How to load `made`, in Markdown, for the model card."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """Why the runtime cannot run on this machine, or None if it can."""
        return None

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """Runs `made` in its runtime and compares the results with `wanted`. WorkError if it
        computes something else, RuntimeCrash if the runtime gives no answer."""
        raise NotImplementedError


def register_format(form: Format) -> Format:
    """Makes the format available to `export` and returns it."""
    return register(FORMATS, form.name, form)


def format_of(name: str) -> Format:
    """The registered format of this name; InputError if there is none."""
    if name not in FORMATS:
        raise InputError(f"{setting('form')} {name} is unknown; use {', '.join(FORMATS)}")
    return FORMATS[name]


def check_hybrid(source: CheckpointReader, name: str) -> None:
    """InputError if the source is not a hybrid."""
    if source.config.get("model_type") != "hybridize":
        raise InputError(f"{name} is not a hybrid (model_type {source.config.get('model_type')!r}); run replace first")
