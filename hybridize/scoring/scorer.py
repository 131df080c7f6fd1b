"""The base class of scorers, and their registry. Each scorer subclasses `Scorer` in its own file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from hybridize.extensions import register
from hybridize.modeling import MIXER_LAYER
from hybridize.scoring.setup import Ranking, Setup

Progress = Callable[[int, int], None]  # called with (steps or texts done, total)
SCORERS: dict[str, Scorer] = {}


class Scorer:
    """Ranks the attention layers of a checkpoint; a layer with a higher score should be converted
    later.

    kind: names the score file `scores/KIND.json` and the command `score-KIND`. summary: one line
    for the command's help. settings: a dataclass of options from which flags are made. trains:
    whether parameters get gradients.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type]
    trains: ClassVar[bool] = False

    def score(self, setup: Setup, settings: Any) -> Ranking:
        """Returns scores for every attention layer. settings: an instance of `self.settings`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def ranked(self, setup: Setup, settings: Any) -> Iterator[Ranking | None]:
        """Context manager that yields the ranking to be written in the block, or None if the score
        file is already the result of this run."""
        yield self.score(setup, settings)


def register_scorer(scorer: Scorer) -> Scorer:
    """Registers a scorer: adds the command `score-KIND` and lets `replace` read its files."""
    return register(SCORERS, scorer.kind, scorer)


def attention_layers(model: Any) -> list[int]:
    """Returns the indices of attention layers, in a teacher or a hybrid."""
    layers = model.base_model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    return [index for index in range(len(layers)) if kinds[index] != MIXER_LAYER]
