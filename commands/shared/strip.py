"""The layer types of a model as a line of text, one letter per layer."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from hybridize.checkpoint.manifest import MIXER_LAYER

MEANINGS = {"N": "new Mamba", "M": "Mamba", "a": "attention", "w": "sliding-window attention"}
COLOURS = {"N": "\x1b[30;43m", "M": "\x1b[30;42m", "a": "\x1b[30;47m", "w": "\x1b[30;46m"}
LETTERS = {MIXER_LAYER: "M", "sliding_attention": "w"}


def draw_strip(kinds: Sequence[str], new: Collection[int] = ()) -> str:
    """The strip with its legend, coloured on a terminal. kinds: layer types from the config. new:
    indices of layers that are to become Mamba layers."""
    letters = ["N" if index in new else LETTERS.get(kind, "a") for index, kind in enumerate(kinds)]
    legend = ", ".join(f"{letter} {meaning}" for letter, meaning in MEANINGS.items() if letter in letters)
    if sys.stdout.isatty():
        letters = [*(f"{COLOURS[letter]}{letter}" for letter in letters), "\x1b[0m"]
    return f"{''.join(letters)}   ({legend})"
