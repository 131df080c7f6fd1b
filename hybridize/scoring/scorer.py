"""What a scorer is, and the registry of scorers. A scorer subclasses `Scorer` in a file of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from hybridize.extensions import register
from hybridize.modeling import MIXER_LAYER
from hybridize.scoring.setup import Ranking, Setup

Progress = Callable[[int, int], None]  # called with how many of how many steps or texts are done
SCORERS: dict[str, Scorer] = {}


class Scorer:
    """DistributedContext the attention layers of a checkpoint by what each is worth: a higher score
    means convert later.

    kind: the score file is `scores/KIND.json`, the command `score-KIND`. summary: a line for
    --help. settings: a dataclass of options, of which the command makes flags. trains: whether
    parameters get gradients.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[type]
    trains: ClassVar[bool] = False

    def score(self, setup: Setup, settings: Any) -> Ranking:
        """Scores for every attention layer. settings: an instance of the class's own."""
        raise NotImplementedError

    @contextlib.contextmanager
    def ranked(self, setup: Setup, settings: Any) -> Iterator[Ranking | None]:
        """The ranking, for as long as it takes to write it; None where the score file is this very
        run's already."""
        yield self.score(setup, settings)


def register_scorer(scorer: Scorer) -> Scorer:
    """From here on the command line has `score-KIND`, and `replace` knows its files."""
    return register(SCORERS, scorer.kind, scorer)


def attention_layers(model: Any) -> list[int]:
    """Indices of the layers that are still attention, for a teacher and a hybrid alike."""
    layers = model.base_model.layers
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    return [index for index in range(len(layers)) if kinds[index] != MIXER_LAYER]
