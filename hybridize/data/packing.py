"""Packs documents into rows of equal length, and rows into batches. The order depends on the seed
alone.

`pack_documents` puts whole documents into a row, each with positions from 0, so that attention,
convolution and state stay inside each document; `pack_stream` joins everything into one text and
cuts it into windows, as in pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hybridize.data.encode import Document

OPEN_ROWS = 32  # rows to which first-fit may still add documents


@dataclass(frozen=True)
class Batch:
    """Packed rows, all [B, T]: ids; positions, which restart at each document, or None if each row
    is a single text; labels, the next token's id; loss_mask, whether its prediction counts."""

    ids: Tensor
    positions: Tensor | None
    labels: Tensor
    loss_mask: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @cached_property
    def kept(self) -> int:
        """The number of positions that count in the loss. `to` keeps the count made on the host,
        since reading it from a device would have to wait for it."""
        return int(self.loss_mask.sum())

    @cached_property
    def documents(self) -> int:
        """An upper bound on the documents in a row, its padding counted as one; made on the host
        like `kept`."""
        return 1 if self.positions is None else int((self.positions == 0).sum(1).max())

    def boundaries(self, documents: int) -> Tensor:
        """int32 [B * documents + 1]: the start of each document among all B * T positions, in
        order; unused entries are B * T.

        documents: at least `self.documents`. Needs no synchronisation with the device, so that a
        CUDA graph can capture it.
        """
        assert self.positions is not None
        index = (self.positions == 0).flatten().cumsum(0) - 1
        wanted = torch.arange(len(self.ids) * documents + 1, device=index.device)
        return torch.searchsorted(index, wanted, out_int32=True)

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most `rows` sequences."""
        return [self.rows(slice(begin, begin + rows)) for begin in range(0, len(self.ids), rows)]

    def rows(self, which: slice) -> Batch:
        """Some of the sequences."""
        return self._each(lambda t: t[which], "documents")

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, with its counts made before."""
        return self._each(lambda t: t.to(device, non_blocking=True), "documents", "kept")

    def followed_by(self, other: Batch) -> Batch:
        """The sequences of both batches."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("ids", "positions", "labels", "loss_mask")]
        return Batch(*(None if a is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]

    def _each(self, change: Callable[[Tensor], Tensor], *counts: str) -> Batch:
        """A batch with all tensors changed. counts: names of cached counts that remain valid,
        computed before the change."""
        fields = (self.ids, self.positions, self.labels, self.loss_mask)
        made = Batch(*(None if t is None else change(t) for t in fields))  # type: ignore[arg-type]
        made.__dict__.update({name: getattr(self, name) for name in counts})
        return made


Line = tuple[list[int], list[int] | None, list[int], list[bool]]  # ids, positions, labels, loss_mask, each of one length


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` documents in one epoch, different for each epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def pack_documents(documents: Iterable[Document], length: int, pad: int) -> Iterator[Line]:
    """Packs documents by first-fit into the OPEN_ROWS rows that are open. Documents longer than
    `length` are cut into pieces of that length, each a document of its own.

    Pieces without a loss are omitted.
    """
    rows: list[Line] = []
    for document in documents:
        for begin in range(0, len(document.ids), length):
            ids, loss_mask = document.ids[begin : begin + length], document.loss_mask[begin : begin + length]
            loss_mask = [*loss_mask[1:], False]  # position t predicts token t + 1; the last of a piece predicts nothing
            if not any(loss_mask):
                continue
            row = next((r for r in rows if len(r[0]) + len(ids) <= length), None)
            if row is None:
                if len(rows) == OPEN_ROWS:
                    fullest = max(range(len(rows)), key=lambda i: len(rows[i][0]))
                    yield _filled(rows.pop(fullest), length, pad)
                row = ([], [], [], [])
                rows.append(row)
            row[0].extend(ids)
            row[1].extend(range(len(ids)))  # type: ignore[union-attr]
            row[2].extend([*ids[1:], pad])
            row[3].extend(loss_mask)
    for row in rows:
        yield _filled(row, length, pad)


def _filled(row: Line, length: int, pad: int) -> Line:
    space = length - len(row[0])
    return row[0] + [pad] * space, [*(row[1] or ()), *range(space)], row[2] + [pad] * space, row[3] + [False] * space


def pack_stream(documents: Iterable[Document], length: int) -> Iterator[Line]:
    """Consecutive windows of the concatenated documents; a window's last position predicts the next
    window's first token.

    A remainder that does not fill a window is omitted. The first token after a document that was
    cut has no loss, since it is not that document's end.
    """
    ids: list[int] = []
    loss_mask: list[bool] = []
    whole = True
    for document in documents:
        ids += document.ids
        loss_mask += document.loss_mask if whole else [False, *document.loss_mask[1:]]
        whole = document.whole
        begin = 0
        while len(ids) - begin > length:
            end = begin + length
            yield ids[begin:end], None, ids[begin + 1 : end + 1], loss_mask[begin + 1 : end + 1]
            begin = end
        del ids[:begin], loss_mask[:begin]


def batched(lines: Iterable[Line], size: int, last: bool = False) -> Iterator[Batch]:
    """Batches of `size` rows; a smaller last one only if `last`."""
    group: list[Line] = []
    for line in lines:
        group.append(line)
        if len(group) == size:
            yield _stack(group)
            group = []
    if last and group:
        yield _stack(group)


def _stack(group: list[Line]) -> Batch:
    ids, positions, labels, loss_mask = zip(*group, strict=True)
    at = None if positions[0] is None else torch.tensor(positions)
    return Batch(torch.tensor(ids), at, torch.tensor(labels), torch.tensor(loss_mask))


def endless(document: Callable[[int], Document], count: int, seed: int) -> Iterator[Document]:
    """Documents 0..count-1 without end, in a new order each epoch."""
    epoch = 0
    while True:
        for index in epoch_order(count, seed, epoch):
            yield document(index)
        epoch += 1


def mixed(streams: Sequence[Iterator[Document]], weights: Sequence[float]) -> Iterator[Document]:
    """Interleaves streams of documents: the next one is from the stream that is furthest behind its
    share of the tokens."""
    tokens = [0.0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda i: tokens[i] / weights[i])
        document = next(streams[behind])
        tokens[behind] += len(document.ids)
        yield document
