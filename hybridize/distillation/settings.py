"""Everything that decides what a distillation computes. The command builds it from flags and an optional file."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.errors import InputError

TRAIN = ("all", "body", "mixers")


@dataclass(frozen=True)
class DistillSettings:
    """Counts are sequences, steps or tokens as named; rates are AdamW's peak learning rates.

    tokens counts all packed tokens; steps wins where both are given. train: `all` weights, `body` (all but embeddings and
    output head), or `mixers`. mask: `assistant` packs documents apart from each other and learns the assistant's tokens,
    `none` learns every token of one joined stream. micro_batch_size None: the whole batch at once.
    """

    loss: str = "reverse-kl"
    temperature: float = 1.0
    mask: str = "assistant"
    tokens: int | None = None
    steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    seq_len: int = 2048
    lr_mixer: float = 1e-3
    lr: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    train: str = "all"
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    eval_every: int = 100
    eval_windows: int = 24
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("batch_size", "micro_batch_size", "seq_len", "tokens", "steps", "lr_mixer", "lr", "clip", "eval_windows")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("warmup_steps", "weight_decay", "eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")
        if self.train not in TRAIN:
            raise InputError(f"--train {self.train} is unknown; use {', '.join(TRAIN)}")
        if self.seq_len < 2:
            raise InputError("--seq-len must be at least 2")
        if self.tokens is None and self.steps is None:
            raise InputError("say how long: --tokens or --steps")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: all that `tokens` pays for, at least one."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, self.tokens // (self.batch_size * self.seq_len))

    @property
    def micro(self) -> int:
        return min(self.micro_batch_size or self.batch_size, self.batch_size)
