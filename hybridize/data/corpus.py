"""The training and held-out rows of a run and their batches. Independent of training settings."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybridize.data.encode import Document, Encoder
from hybridize.data.forms import has_question
from hybridize.data.packing import Batch, batched, endless, epoch_order, mixed, pack_documents, pack_stream
from hybridize.data.rows import Rows, read_mixture
from hybridize.errors import InputError, WorkError

CHECKED = 20_000  # rows that are encoded before anything starts; of later ones only the fields are checked
HELDOUT_ROWS = 64  # most training rows that are held out without `eval_data`


@dataclass(frozen=True)
class Packing:
    """How documents fill packed rows. held, learnt: shares of positions that hold text, and that
    have a loss; cut: how many of the `documents` are longer than a row; longest: in tokens."""

    held: float
    learnt: float
    documents: int
    cut: int
    longest: int


@dataclass(frozen=True)
class Corpus:
    """Training sources, each with its share of the tokens, held-out rows, and the batches of both."""

    sources: Sequence[tuple[Rows, float]]
    heldout: Rows
    encoder: Encoder

    @property
    def rows(self) -> Rows:
        """The training rows of all sources, concatenated."""
        return Rows.joined([rows for rows, _ in self.sources])

    def lines(self, order: Iterator[Any], length: int) -> Iterator[Any]:
        """Documents packed into rows of `length` tokens: as one stream with the mask `none`, else
        each document whole."""
        if self.encoder.mask == "none":
            return pack_stream(order, length)
        pad = self.encoder.tokenizer.pad_token_id
        return pack_documents(order, length, pad if pad is not None else self.encoder.tokenizer.eos_token_id or 0)

    def documents(self, seed: int) -> Iterator[Document]:
        """Endless training documents, the same for the same seed; the sources are mixed by their
        shares of the tokens.

        A row whose answers need separate contexts yields several documents.
        """

        def one(rows: Rows) -> Iterator[Document]:
            encoded = endless(lambda i: self.encoder.encode(rows[i], rows.where(i)), len(rows), seed)
            return itertools.chain.from_iterable(row.parts() for row in encoded)

        return mixed([one(rows) for rows, _ in self.sources], [weight for _, weight in self.sources])

    def prompts(self, seed: int, longest: int) -> Iterator[list[int]]:
        """Endless prompts of at most `longest` tokens, the same for the same seed; the sources are
        mixed by their shares, of the tokens of prompts.

        Rows without a question are omitted. InputError if no row has such a prompt.
        """

        def one(rows: Rows) -> Iterator[Document]:
            for epoch in itertools.count():
                found = False
                for index in epoch_order(len(rows), seed, epoch):
                    row, where = rows[index], rows.where(index)
                    ids = self.encoder.prompt(row, where) if has_question(row, where) else []
                    if 0 < len(ids) <= longest:
                        found = True
                        yield Document(ids, [])
                if not found:
                    return

        streams, weights = [], []
        for rows, weight in self.sources:
            stream = one(rows)
            if (first := next(stream, None)) is not None:
                streams.append(itertools.chain([first], stream))
                weights.append(weight)
        if not streams:
            raise InputError(f"the training data has no question of at most {longest} tokens for the student to answer")
        return (document.ids for document in mixed(streams, weights))

    def check_prompts(self, longest: int) -> None:
        """InputError unless `prompts` has some, or for one of the first CHECKED rows whose prompt
        cannot be encoded."""
        for rows, _ in self.sources:
            for index in range(min(CHECKED, len(rows))):
                row, where = rows[index], rows.where(index)
                if has_question(row, where):
                    self.encoder.prompt(row, where)
        next(self.prompts(0, longest))

    def training(self, seed: int, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """Endless batches of `batch_size` sequences of `seq_len` tokens, the same for the same
        seed.

        WorkError for a row that cannot be encoded, since only the first CHECKED rows are encoded
        beforehand.
        """
        try:
            yield from batched(self.lines(self.documents(seed), seq_len), batch_size)
        except InputError as error:
            raise WorkError(f"{error}") from error

    def held_out(self, windows: int, seq_len: int, batch_size: int) -> list[Batch]:
        """The first `windows` held-out sequences of `seq_len` tokens, in file order, in batches of
        at most `batch_size`."""
        encoded = (self.encoder.encode(self.heldout[i], self.heldout.where(i)) for i in range(len(self.heldout)))
        lines = self.lines((part for row in encoded for part in row.parts()), seq_len)
        chosen = [line for _, line in zip(range(windows), lines, strict=False)]
        return list(batched(chosen, batch_size, last=True))

    def packing(self, seed: int, seq_len: int, sample: int = 512) -> Packing | None:
        """How the first `sample` training documents are packed; None if they do not fill a row."""
        documents = list(itertools.islice(self.documents(seed), min(sample, len(self.rows))))
        lines = list(self.lines(iter(documents), seq_len))
        if not lines:
            return None
        lengths = [len(d.ids) for d in documents]
        places = len(lines) * seq_len
        held = places if self.encoder.mask == "none" else sum(lengths)
        cut = 0 if self.encoder.mask == "none" else sum(length > seq_len for length in lengths)
        return Packing(min(1.0, held / places), sum(sum(line[3]) for line in lines) / places, len(documents), cut, max(lengths))

    def example(self, seed: int, most: int = 400) -> str:
        """The first training document as text, with tokens that have a loss in brackets and long
        stretches shortened in the middle."""
        document, parts = next(self.documents(seed)), []
        for counts, group in itertools.groupby(zip(document.loss_mask, document.ids, strict=True), key=lambda pair: pair[0]):
            text = self.encoder.tokenizer.decode([token for _, token in group])
            text = text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
            parts.append(f"\u27e6{text}\u27e7" if counts else text)
        return "".join(parts)

    @cached_property
    def hash(self) -> str:
        """sha256 of all training and held-out rows, which a resumed run must find unchanged."""
        digest = hashlib.sha256()
        for part, weight in (*self.sources, (self.heldout, 0.0)):
            for row in part:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            digest.update(f"--{weight}".encode())
        return digest.hexdigest()


def open_corpus(data: str, eval_data: str | None, encoder: Encoder, limit: int | None = None, hold_out: bool = True) -> Corpus:
    """Reads and checks all rows and encodes the first CHECKED of each part, so that bad data is
    found before any weights are loaded.

    Without `eval_data` the last rows of each source are held out, if `hold_out` is set.
    """
    sources = read_mixture(data, limit)
    if eval_data is not None:
        same = eval_data == data
        heldout = Rows.joined([rows for rows, _ in (sources if same else read_mixture(eval_data, what="eval_data"))])
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
