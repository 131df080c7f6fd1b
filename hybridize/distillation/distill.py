"""Distils a checkpoint: opens data and models, trains, writes the result with its lineage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hybridize.checkpoint.atomic import AtomicDirectory
from hybridize.checkpoint.experts import as_on_disk
from hybridize.checkpoint.manifest import descend
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.writer import CheckpointWriter
from hybridize.distillation.encode import Document, Encoder
from hybridize.distillation.packing import Batch, batched, endless, mixed, pack_documents, pack_stream
from hybridize.distillation.prefetch import prefetched
from hybridize.distillation.ranks import Ranks, whole
from hybridize.distillation.rows import Rows, read_mixture
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.training import Report, Training
from hybridize.errors import InputError
from hybridize.runtime import load_empty, load_model, ran_on
from hybridize.surgery.teacher import hybrid_config

CHECKED = 20_000  # rows that are encoded before anything starts; later ones only have their fields checked
HELDOUT_ROWS = 64  # at most so many of the training rows are held out when there is no --eval-data


@dataclass(frozen=True)
class Packing:
    """Shares of positions that hold text and that are learnt; of so many `documents` how many are longer than a row, and the
    longest, in tokens."""

    held: float
    learnt: float
    documents: int
    cut: int
    longest: int


@dataclass(frozen=True)
class Corpus:
    """Training sources, each with its share of the tokens, held-out rows, and how both become batches."""

    sources: Sequence[tuple[Rows, float]]
    heldout: Rows
    encoder: Encoder

    @property
    def rows(self) -> Rows:
        """The training rows of all sources, one after the other."""
        return Rows.joined([rows for rows, _ in self.sources])

    def lines(self, order: Iterator[Any], length: int) -> Iterator[Any]:
        if self.encoder.mask == "none":
            return pack_stream(order, length)
        pad = self.encoder.tokenizer.pad_token_id
        return pack_documents(order, length, pad if pad is not None else self.encoder.tokenizer.eos_token_id or 0)

    def documents(self, seed: int) -> Iterator[Document]:
        """Endless training documents, the same for the same seed; each source in turn as its share of the tokens falls due.

        A row whose answers need contexts of their own is several documents.
        """

        def one(rows: Rows) -> Iterator[Document]:
            encoded = endless(lambda i: self.encoder.encode(rows[i], rows.where(i)), len(rows), seed)
            return itertools.chain.from_iterable(row.parts() for row in encoded)

        return mixed([one(rows) for rows, _ in self.sources], [weight for _, weight in self.sources])

    def training(self, settings: DistillSettings) -> Iterator[Batch]:
        """Endless batches of `batch_size` sequences, the same for the same seed."""
        return batched(self.lines(self.documents(settings.seed), settings.seq_len), settings.batch_size)

    def measuring(self, settings: DistillSettings) -> list[Batch]:
        """The first `eval_windows` held-out sequences, in file order."""
        encoded = (self.encoder.encode(self.heldout[i], self.heldout.where(i)) for i in range(len(self.heldout)))
        lines = self.lines((part for row in encoded for part in row.parts()), settings.seq_len)
        chosen = [line for _, line in zip(range(settings.eval_windows), lines, strict=False)]
        return list(batched(chosen, settings.micro, last=True))

    def packing(self, settings: DistillSettings, sample: int = 512) -> Packing | None:
        """How the first `sample` training documents are packed; None where they do not fill a row."""
        documents = list(itertools.islice(self.documents(settings.seed), min(sample, len(self.rows))))
        lines = list(self.lines(iter(documents), settings.seq_len))
        if not lines:
            return None
        lengths = [len(d.ids) for d in documents]
        places = len(lines) * settings.seq_len
        held = places if self.encoder.mask == "none" else sum(lengths)
        cut = 0 if self.encoder.mask == "none" else sum(length > settings.seq_len for length in lengths)
        return Packing(min(1.0, held / places), sum(sum(line[3]) for line in lines) / places, len(documents), cut, max(lengths))

    def example(self, seed: int, most: int = 400) -> str:
        """The first training document as text, what is learnt between brackets, long stretches cut in the middle."""
        document, parts = next(self.documents(seed)), []
        for kept, group in itertools.groupby(zip(document.keep, document.ids, strict=True), key=lambda pair: pair[0]):
            text = self.encoder.tokenizer.decode([token for _, token in group])
            text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
            parts.append(f"\u27e6{text}\u27e7" if kept else text)
        return "".join(parts)

    @cached_property
    def hash(self) -> str:
        """sha256 of all rows, training and held-out: what a resumed run must find unchanged."""
        digest = hashlib.sha256()
        for part, weight in (*self.sources, (self.heldout, 0.0)):
            for row in part:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            digest.update(f"--{weight}".encode())
        return digest.hexdigest()


def open_corpus(data: str, eval_data: str | None, encoder: Encoder, limit: int | None = None, hold_out: bool = True) -> Corpus:
    """Reads and checks all rows and encodes the first CHECKED of each part, so that bad data shows before any weight is loaded.

    Without `eval_data` the last rows of each source are held out, if `hold_out`.
    """
    sources = read_mixture(data, limit)
    if eval_data is not None:
        same = eval_data == data
        heldout = Rows.joined([rows for rows, _ in (sources if same else read_mixture(eval_data, flag="--eval-data"))])
        checked = [heldout] if same else [*(rows for rows, _ in sources), heldout]
    else:
        counts = [min(HELDOUT_ROWS // len(sources), len(rows) // 20) if hold_out else 0 for rows, _ in sources]
        parts = [rows.part(len(rows) - count, len(rows)) for (rows, _), count in zip(sources, counts, strict=True)]
        heldout = Rows.joined(parts)
        sources = [(rows.part(0, len(rows) - n), weight) for (rows, weight), n in zip(sources, counts, strict=True)]
        checked = [*(rows for rows, _ in sources), heldout]
    for part in checked:
        for index in range(min(CHECKED, len(part))):
            encoder.encode(part[index], part.where(index))
    return Corpus(sources, heldout, encoder)


def check_vocabularies(student: CheckpointReader, teacher: CheckpointReader) -> None:
    """InputError unless both models speak of the same tokens."""
    ours, theirs = student.config.get("vocab_size"), teacher.config.get("vocab_size")
    if ours != theirs:
        raise InputError(f"{student.path} has a vocabulary of {ours}, its teacher {teacher.path} of {theirs}")
    ours, theirs = (getattr(hybrid_config(r.config), "final_logit_softcapping", None) for r in (student, teacher))
    if ours != theirs:
        raise InputError(f"{student.path} caps its logits at {ours}, its teacher {teacher.path} at {theirs}: they must agree")


def distill(
    source: CheckpointReader,
    name: str,
    teacher: CheckpointReader | None,
    corpus: Corpus,
    settings: DistillSettings,
    output: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    overwrite: bool = False,
    resume: bool = False,
    stop_now: bool = False,
    log_every: int = 1,
    trust_remote_code: bool = False,
    run: RunDir,
    ranks: Ranks | None = None,
    report: Report = lambda _: None,
) -> int:
    """Trains float32 weights under autocast to `dtype`; storage types of the result follow the source. Returns tokens seen.

    stop_now: writes what an unfinished run has saved last, and leaves the run as it is. Every rank calls this; the first one
    writes.
    """
    ranks = ranks or Ranks()
    torch.manual_seed(settings.seed)
    streams = settings.sharded(ranks.size)  # weights go to their shards layer by layer; alignment needs the student whole

    def load(reader: CheckpointReader, kind: torch.dtype, streamed: bool) -> Any:
        if streamed:
            return load_empty(reader.path, kind, trust_remote_code)
        waits = reader is teacher and settings.offload_teacher
        return load_model(reader.path, torch.device("cpu") if waits else device, kind, trust_remote_code)

    doing = lambda text: report({"kind": "doing", "text": text})  # noqa: E731
    doing("loading the student")
    student = load(source, torch.float32, streams and settings.stage == "distill")
    doing("loading the teacher")
    model = None if teacher is None else load(teacher, dtype, streams and not settings.offload_teacher)
    doing("preparing the first step")
    training = Training(
        student, model, corpus.measuring(settings), settings, run, device=device, dtype=dtype, log_every=log_every,
        ranks=ranks, sources=(source, teacher) if streams else (None, None), report=report,
    )  # fmt: skip
    with run.started(resume):
        with contextlib.closing(prefetched(corpus.training(settings))) as batches:
            used = training.go(batches, resume, stop_now)
        doing(f"writing {output}")
        made = asdict(settings) | ran_on(device, dtype) | {"ranks": ranks.size}
        # by which the run knows its own result; this one it goes on from
        made |= {"stopped_after": used // (settings.batch_size * settings.seq_len)} if stop_now else {"run": run.digest}
        manifest = descend(source, name, output, "distill", made, settings.seed)
        shares = sum(weight for _, weight in corpus.sources)
        data = [
            {"path": Path(rows.name).name if Path(rows.name).is_file() else rows.name, "rows": len(rows),
             "tokens": round(used * weight / shares)}
            for rows, weight in corpus.sources
        ]  # fmt: skip
        manifest = dataclasses.replace(manifest, data=[*manifest.data, *data], tokens=manifest.tokens + used)
        trained = student.state_dict()

        @functools.lru_cache(maxsize=2)  # experts ask for the same two in turn
        def gathered(parameter: str) -> torch.Tensor:
            if streams:  # all ranks are here, and wait for the one that writes: GPUs give each other ten minutes
                ranks.wait()
            return whole(trained[parameter])

        def final() -> Iterator[tuple[str, torch.Tensor, bool]]:
            """Name, value, whether that is the source's: buffers that no model keeps, and what was not to be trained."""
            for tensor_name, old in source.tensors():
                new = as_on_disk(tensor_name, trained, gathered)  # what is sharded becomes whole only if all ranks take part
                kept = new is None or not settings.trains(tensor_name)
                yield tensor_name, old if new is None or kept else new.to(old.dtype), kept

        if not ranks.main:
            for _ in final() if streams else ():
                pass
            ranks.wait()
            return used
        with AtomicDirectory(output, overwrite) as path:
            writer = CheckpointWriter(path)
            for tensor_name, value, kept in final():
                writer.add(tensor_name, value, source if kept else None)
            run.finish(path)
            writer.close(source.config, manifest, carry_from=source.path)
        if not stop_now:
            run.remove()
        ranks.wait()
        return used
