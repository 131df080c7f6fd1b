"""Writes a hybrid in the format of a runtime, compares the two, and then moves the export into
place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.integrity import seal_again
from hybridize.checkpoint.manifest import descend, read_manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, setting
from hybridize.export.card import model_card
from hybridize.export.formats import Format, format_of
from hybridize.export.origin import read_origin
from hybridize.export.verify import RuntimeCrash, Verdict, reference
from hybridize.runtime.loading import load_tokenizer

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportSettings:
    """form: name of a registered format. outtype: data type of the matrices, for formats that offer
    a choice. verify: compare the export with the checkpoint in its runtime. insist: it is an error
    if the runtime is missing or crashes; otherwise the export is kept and marked as not verified.
    base_model, license: for the model card, in place of what the teacher's files say."""

    form: str = "hf"
    outtype: str | None = None
    verify: bool = True
    insist: bool = False
    base_model: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Exported:
    """files: names in the directory. verdict: of the comparison, or None. unverified: why there is
    no verdict. crashed: the runtime was started and crashed."""

    files: list[str]
    verdict: Verdict | None
    unverified: str | None
    crashed: bool = False


def check_export(source: CheckpointReader, name: str, settings: ExportSettings) -> tuple[Format, Any]:
    """Returns the format and its plan for this checkpoint, without loading weights. InputError if
    the format cannot represent the checkpoint exactly, with the reason."""
    form = format_of(settings.form)
    if settings.outtype is not None and not form.outtypes:
        raise InputError(f"{setting('outtype')} does not apply to {setting('form')} {form.name}")
    if settings.outtype is not None and settings.outtype not in form.outtypes:
        raise InputError(f"{setting('outtype')} {settings.outtype} is unknown; use {', '.join(form.outtypes)}")
    plan, missing = form.check(source, name), form.missing()
    if settings.insist and missing is not None:
        raise InputError(f"{setting('verify')}: {missing}")
    if settings.verify and missing is None:
        try:
            load_tokenizer(source.path)
        except InputError as error:
            raise InputError(f"{error}, and the comparison needs one; {setting('verify', False)} skips it") from error
    return form, plan


def export(
    source: CheckpointReader,
    name: str,
    output: Path,
    settings: ExportSettings,
    *,
    overwrite: bool,
    device: torch.device,
    report: Report = lambda _: None,
) -> Exported:
    """Writes `output` atomically: an export that fails the comparison never appears there. Raises
    InputError as check_export does, WorkError if the export computes something else."""
    form, plan = check_export(source, name, settings)
    manifest = read_manifest(source.path)
    origin = read_origin(source, manifest, settings.base_model, settings.license)
    outtype = settings.outtype or next(iter(form.outtypes), None)
    lineage = descend(source, name, output, "export", {"format": form.name, "outtype": settings.outtype}, 0)
    verdict, missing, crashed = None, form.missing() if settings.verify else "not requested", False
    with AtomicDirectory(output, overwrite) as path:
        report("writing")
        made = form.write(source, plan, path, name, lineage, outtype)
        if missing is None:
            report("running the checkpoint for reference")
            wanted = reference(source.path, load_tokenizer(source.path), device)
            report("running the export in its runtime")
            try:
                verdict = form.ask(made, wanted, device, outtype)
            except RuntimeCrash as error:
                if settings.insist:
                    raise
                missing, crashed = str(error), True
        sentence = verdict.sentence() if verdict else f"not verified: {missing}"
        text = model_card(source, manifest, form.use(plan, made), sentence, origin, output.name)
        (path / "README.md").write_text(text, encoding="utf-8")
        seal_again(path)
    return Exported(sorted(file.name for file in output.iterdir()), verdict, missing, crashed)
