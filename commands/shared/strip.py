"""A model's layers as a strip, one letter a layer, the same in every command that draws one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from hybridize.checkpoint.manifest import MIXER_LAYER

MEANINGS = {"N": "new Mamba", "M": "Mamba", "a": "attention", "w": "attention in a window"}
COLOURS = {"N": "\x1b[30;43m", "M": "\x1b[30;42m", "a": "\x1b[30;47m", "w": "\x1b[30;46m"}
LETTERS = {MIXER_LAYER: "M", "sliding_attention": "w"}


def draw_strip(kinds: Sequence[str], new: Collection[int] = ()) -> str:
    """The strip with its legend. kinds: as in the config, one a layer; new: which of them are about
    to become Mamba layers."""
    letters = ["N" if index in new else LETTERS.get(kind, "a") for index, kind in enumerate(kinds)]
    legend = ", ".join(f"{letter} {meaning}" for letter, meaning in MEANINGS.items() if letter in letters)
    if sys.stdout.isatty():
        letters = [*(f"{COLOURS[letter]}{letter}" for letter in letters), "\x1b[0m"]
    return f"{''.join(letters)}   ({legend})"
