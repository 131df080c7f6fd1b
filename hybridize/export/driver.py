"""Writes a hybrid in the format of a runtime, asks that runtime whether it computes the same, and then puts it in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hybridize.checkpoint.atomic import AtomicDirectory, write_json
from hybridize.checkpoint.integrity import seal_again
from hybridize.checkpoint.manifest import MANIFEST, descend, read_manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError
from hybridize.export import card
from hybridize.export.formats.gguf import check_gguf, write_gguf
from hybridize.export.formats.granite import Embedding, embed, write_granite
from hybridize.export.formats.hf import check_hf, write_hf
from hybridize.export.origin import read_origin
from hybridize.export.verify import (
    RuntimeCrash,
    Verdict,
    ask_llama_cpp,
    ask_own_code,
    ask_transformers,
    reference,
    runtime_missing,
)
from hybridize.runtime.loading import load_tokenizer

FORMATS = ("hf", "granite", "gguf")
Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportSettings:
    """form: one of FORMATS; outtype: how a gguf file keeps matrices (None elsewhere, else f16); verify: ask the runtime;
    insist: a runtime that cannot answer is an error, else the result is kept and called unverified; base_model, license: what
    the card is to say of the teacher, where its files do not."""

    form: str = "hf"
    outtype: str | None = None
    verify: bool = True
    insist: bool = False
    base_model: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Exported:
    """files of the directory; verdict of the runtime, or None and why there is none; crashed: it was asked and died."""

    files: list[str]
    verdict: Verdict | None
    unverified: str | None
    crashed: bool = False


def check_export(source: CheckpointReader, name: str, settings: ExportSettings) -> Embedding | None:
    """InputError where the checkpoint cannot be exactly that format, naming what stands in the way; no weight is loaded."""
    if settings.form not in FORMATS:
        raise InputError(f"--format {settings.form} is unknown; use {', '.join(FORMATS)}")
    if settings.outtype is not None and settings.form != "gguf":
        raise InputError("--outtype has no use without --format gguf")
    embedding = None
    if settings.form == "gguf":
        embedding = check_gguf(source, name, settings.outtype or "f16")
    elif settings.form == "granite":
        embedding = embed(source, name, "granite")
    else:
        check_hf(source, name)
    missing = runtime_missing(settings.form)
    if settings.insist and missing is not None:
        raise InputError(f"--verify: {missing}")
    if settings.verify and missing is None:
        try:
            load_tokenizer(source.path)
        except InputError as error:
            raise InputError(f"{error}, and prompts need one; --no-verify does without") from error
    return embedding


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
    """Writes `output`, atomically: a model that the runtime finds to be another never appears. Raises as check_export."""
    embedding = check_export(source, name, settings)
    manifest = read_manifest(source.path)
    origin = read_origin(source, manifest, settings.base_model, settings.license)
    missing = runtime_missing(settings.form) if settings.verify else "not asked for (--no-verify)"
    outtype = settings.outtype or "f16"
    use = {"hf": card.HF, "granite": card.GRANITE}.get(settings.form, "")
    lineage = descend(source, name, output, "export", {"format": settings.form, "outtype": settings.outtype}, 0)
    with AtomicDirectory(output, overwrite) as path:
        report("writing")
        made = path
        if settings.form == "gguf":
            assert embedding is not None
            made = path / f"{source.path.resolve().name}-{outtype.upper()}.gguf"
            write_gguf(source, embedding, made, name, outtype)
            write_json(path / MANIFEST, lineage.to_json())
            use = card.GGUF.replace("FILE", made.name)
        elif settings.form == "granite":
            assert embedding is not None
            write_granite(source, embedding, path, lineage)
            if embedding.explicit_head:
                use = use.replace(card.VLLM, card.NOT_VLLM)
        else:
            write_hf(source, path, lineage)
        verdict, crashed = None, False
        if missing is None:
            report("computing the checkpoint's own answers")
            wanted = reference(source.path, load_tokenizer(source.path), device)
            report("asking the runtime")
            try:
                if settings.form == "gguf":
                    verdict = ask_llama_cpp(made, wanted, outtype)
                else:
                    verdict = (ask_own_code if settings.form == "hf" else ask_transformers)(made, wanted, device)
            except RuntimeCrash as error:
                if settings.insist:
                    raise
                missing, crashed = str(error), True
        said = verdict.sentence() if verdict else f"not verified: {missing}"
        (path / "README.md").write_text(card.model_card(source, manifest, use, said, origin, output.name), encoding="utf-8")
        seal_again(path)
    return Exported(sorted(file.name for file in output.iterdir()), verdict, missing, crashed)
