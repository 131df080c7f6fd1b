"""The settings of the scorers. Flags are made from these classes, so imports must be light."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, setting
from hybridize.options import check_bounds, option

METRICS = ("accuracy", "margin", "kl")
ABLATED = ("block", "mixer")
TRAINED = ("mixers", "all")
MASK = "assistant: compute the loss on assistant tokens; none: on every token of one stream."


@dataclass(frozen=True)
class LooSettings:
    """metric: `accuracy` (the tasks' own metric), `margin` (log-probability of the right answer
    minus that of the best wrong one) or `kl` (forward KL from the teacher, nats per token); ablate:
    the whole `block` or only the `mixer`."""

    metric: str = option("accuracy", "accuracy or margin (on tasks), or kl (on data).")
    ablate: str = option("block", "What to remove from a layer: its whole block, or only the mixer.")
    tasks: str = option("mmlu", "lm-eval tasks, separated by commas.")
    num_fewshot: int | None = option(None, "Few-shot examples in each prompt.")
    include_path: str | None = option(None, "A folder with lm-eval tasks of your own.")
    apply_chat_template: bool = option(False, "Wrap prompts in the chat template.")
    batch_size: int = option(8, "Requests per forward pass.", above=0)
    windows: int = option(16, "For kl: sequences of data.", above=0)
    seq_len: int = option(512, "For kl: tokens per sequence.", above=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.metric not in METRICS:
            raise InputError(f"{setting('metric')} {self.metric} is unknown; use {', '.join(METRICS)}")
        if self.ablate not in ABLATED:
            raise InputError(f"{setting('ablate')} {self.ablate} is unknown; use {' or '.join(ABLATED)}")


@dataclass(frozen=True)
class MmrSettings:
    """Each candidate trains for `steps` steps of `batch_size` sequences of `seq_len` tokens, on
    `repeats` orders of the data. train: only the new mixer (`mixers`), or the whole student
    (`all`), for which candidates are trained one at a time."""

    steps: int = option(100, "Training steps per candidate layer.", above=0)
    batch_size: int = option(8, "Sequences per step.", above=0)
    seq_len: int = option(512, "Tokens per sequence.", above=0)
    lr_mixer: float = option(1e-3, "Peak learning rate of the new mixer.", above=0)
    loss: str = option("reverse-kl", "Loss, as in distill.")
    mask: str = option("assistant", MASK)
    train: str = option("mixers", "mixers, or all: the whole student, one candidate at a time.")
    repeats: int = option(1, "Repetitions, each with another order of the data.", above=0)
    seed: int = option(0, "Random seed.", least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.train not in TRAINED:
            raise InputError(f"{setting('train')} {self.train} is unknown; use {' or '.join(TRAINED)}")

    def as_distill(self) -> DistillSettings:
        """Returns the settings of the same run for distillation's data and optimizer."""
        return DistillSettings(
            loss=self.loss, mask=self.mask, steps=self.steps, batch_size=self.batch_size, seq_len=self.seq_len,
            lr_mixer=self.lr_mixer, train=self.train, warmup_steps=min(10, self.steps // 2), seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class RestoreSettings:
    """Alignment takes `steps` steps of `batch_size` sequences of `seq_len` tokens at `lr_mixer`;
    with 0 steps mixers keep their initial parameters. windows: held-out sequences on which the KL
    is measured."""

    steps: int = option(100, "Steps of alignment, 0: none.", least=0)
    batch_size: int = option(8, "Sequences per step.", above=0)
    seq_len: int = option(512, "Tokens per sequence.", above=0)
    lr_mixer: float = option(1e-3, "Peak learning rate of the mixers.", above=0)
    mask: str = option("assistant", MASK)
    seed: int = option(0, "Random seed.", least=0)
    windows: int = option(32, "Held-out sequences to measure on.", above=0)

    def __post_init__(self) -> None:
        check_bounds(self)

    def as_distill(self) -> DistillSettings:
        """Returns the settings of the alignment for distillation's data and optimizer."""
        return DistillSettings(
            stage="align", mask=self.mask, steps=max(1, self.steps), batch_size=self.batch_size, seq_len=self.seq_len,
            lr_mixer=self.lr_mixer, warmup_steps=min(10, self.steps // 2), seed=self.seed,
        )  # fmt: skip
