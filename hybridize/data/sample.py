"""A few windows of text out of training rows, for calibration: the joined stream of documents in a
seeded order."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.data.encode import Encoder
from hybridize.data.packing import epoch_order
from hybridize.data.rows import Rows
from hybridize.errors import InputError

WINDOW = 1024  # the eager attention that calibration watches holds heads x WINDOW^2 weights
FEWEST = 32


def sample_windows(rows: Rows, encoder: Encoder, tokens: int, seed: int, longest: int = WINDOW) -> Tensor:
    """About `tokens` token ids as [W, T], T at most `longest`; fewer where the rows have fewer.

    Reads no more rows than it needs. InputError when there are not even FEWEST.
    """
    ids: list[int] = []
    for index in epoch_order(len(rows), seed, 0):
        ids += encoder.encode(rows[index], rows.where(index)).ids
        if len(ids) >= tokens:
            break
    if len(ids) < FEWEST:
        raise InputError(f"{rows.name} has {len(ids)} tokens, too few to calibrate on")
    length = min(longest, len(ids), tokens)
    count = min(len(ids), max(tokens, length)) // length
    return torch.tensor(ids[: count * length]).view(count, length)
