"""Samples windows of text from training rows for calibration: the concatenated documents in a
seeded order."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.data.encode import Encoder
from hybridize.data.packing import epoch_order
from hybridize.data.rows import Rows
from hybridize.errors import InputError

WINDOW = 1024  # tokens; the eager attention of calibration holds heads x WINDOW^2 weights
FEWEST = 32  # tokens


def sample_windows(rows: Rows, encoder: Encoder, tokens: int, seed: int, longest: int = WINDOW) -> Tensor:
    """About `tokens` token ids as [W, T], T at most `longest`; fewer if the rows have fewer.

    Encodes only as many rows as needed. InputError if there are fewer than FEWEST tokens.
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
