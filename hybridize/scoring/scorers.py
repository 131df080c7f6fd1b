"""Registers the built-in scorers."""

from hybridize.scoring.loo import LooScorer
from hybridize.scoring.mmr import MmrScorer
from hybridize.scoring.restore import RestoreScorer
from hybridize.scoring.scorer import SCORERS, Scorer, register_scorer

__all__ = ["SCORERS", "Scorer", "register_scorer"]

for _scorer in (LooScorer(), MmrScorer(), RestoreScorer()):
    register_scorer(_scorer)
