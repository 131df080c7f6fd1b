"""Everything that decides what a distillation computes. The command builds it from flags and an optional file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from hybridize.distillation.schedule import SCHEDULES
from hybridize.errors import InputError, setting
from hybridize.parsing import named_numbers, parse_indices

STAGES = ("distill", "align")
# what a resumed run may have otherwise than the run before it
PLACING = ("shard", "offload_teacher")
SAVING = ("save_every", "save_minutes", "keep_last")


def check_positive(settings: Any, names: Iterable[str]) -> None:
    """InputError that names the flag of the first that is given and not above zero."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{setting(name)} {value} must be positive")


@dataclass(frozen=True)
class DistillSettings:
    """Counts are sequences, steps or tokens as named; rates are AdamW's peak learning rates.

    stage: `distill` trains on the loss, `align` fits each mixer to its attention layer's output, and trains nothing else.
    tokens counts all packed tokens; steps wins where both are given. train: `all` weights, `body` (all but embeddings and
    output head), `mixers`, or patterns of parameter names with commas between. lr_groups: PATTERN=RATE with commas between, the
    first that fits a name wins over lr and lr_mixer. mask: `assistant` packs documents apart from each other and learns the
    assistant's tokens, `none` learns every token of one joined stream. micro_batch_size None: the whole batch at once.
    checkpoint_layers: which layers gradient_checkpointing is for, all unless given, and then it need not be.
    checkpoint_merge: the result is the mean of the last so many saved states, 0: the last one.
    shard: whether several processes split the weights among them, or each holds all of them and gradients alone are exchanged.
    offload_teacher: the teacher's layers wait in host memory, whole on each rank, and are on the device only while they run.
    deterministic: the same bits every time on one machine, see runtime.be_deterministic.
    stop_when_flat: end after so many held-out measures in a row without a better reverse KL, 0: never.
    """

    stage: str = "distill"
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
    lr_groups: str = ""
    schedule: str = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    train: str = "all"
    gradient_checkpointing: bool = False
    checkpoint_layers: str = ""
    compile: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    shard: bool = True
    offload_teacher: bool = False
    eval_every: int = 100
    eval_windows: int = 24
    stop_when_flat: int = 0
    skip_bad_batches: int = 0
    checkpoint_merge: int = 0
    save_every: int = 500
    save_minutes: float = 0.0
    keep_last: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("batch_size", "micro_batch_size", "seq_len", "tokens", "steps", "eval_windows", "keep_last")
        check_positive(self, (*sizes, "lr_mixer", "lr", "clip"))
        naturals = (
            "warmup_steps",
            "weight_decay",
            "eval_every",
            "save_every",
            "save_minutes",
            "stop_when_flat",
            "skip_bad_batches",
            "checkpoint_merge",
        )
        for name in naturals:
            if getattr(self, name) < 0:
                raise InputError(f"{setting(name)} {getattr(self, name)} must not be negative")
        if self.stage not in STAGES:
            raise InputError(f"{setting('stage')} {self.stage} is unknown; use {' or '.join(STAGES)}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"{setting('schedule')} {self.schedule} is unknown; use {', '.join(SCHEDULES)}")
        if self.stop_when_flat and not self.eval_every:
            raise InputError(f"{setting('stop_when_flat')} looks at the held-out measures; give {setting('eval_every')}")
        if self.cuda_graph and (self.stage != "distill" or self.gradient_checkpointing or self.checkpoint_layers):
            raise InputError(f"{setting('cuda_graph')} needs {setting('stage')} distill and no gradient checkpointing")
        if self.cuda_graph and self.offload_teacher:
            raise InputError(
                f"{setting('cuda_graph')} cannot hold a teacher that comes and goes: leave out {setting('offload_teacher')}"
            )
        if self.compile and self.stage != "distill":
            raise InputError(
                f"{setting('compile')} needs {setting('stage')} distill: alignment runs no whole layer of the student"
            )
        if self.checkpoint_merge > 1 and not (self.save_every and self.keep_last >= self.checkpoint_merge):
            raise InputError(
                f"{setting('checkpoint_merge')} takes the mean of saved states; "
                f"give {setting('save_every')}, and {setting('keep_last')} that many"
            )
        self.recomputed(None)
        self.rates()
        if self.seq_len < 2:
            raise InputError(f"{setting('seq_len')} must be at least 2")
        if self.tokens is None and self.steps is None:
            raise InputError(f"say how long: {setting('tokens')} or {setting('steps')}")

    def decisive(self) -> dict[str, Any]:
        """What decides the result: a run that goes on must have the same."""
        merging = self.checkpoint_merge > 1  # which states there are is then part of it
        free = PLACING if merging else (*PLACING, *SAVING)
        return {key: value for key, value in asdict(self).items() if key not in free}

    def recomputed(self, layers: int | None) -> set[int]:
        """Which of so many layers keep only their input and run again in backward. InputError for one that is not there; with
        None it is not known how many there are."""
        if not self.checkpoint_layers:
            return set(range(layers or 0)) if self.gradient_checkpointing else set()
        chosen = set(parse_indices(self.checkpoint_layers, "checkpoint_layers"))
        if layers is not None and max(chosen) >= layers:
            raise InputError(f"{setting('checkpoint_layers')} {self.checkpoint_layers}: the model has layers 0 to {layers - 1}")
        return chosen

    def rates(self) -> list[tuple[str, float]]:
        """`lr_groups` as patterns and rates."""
        return named_numbers(self.lr_groups, "lr_groups") if self.lr_groups else []

    def rate_of(self, name: str) -> float:
        """The peak rate of a parameter."""
        named = (rate for pattern, rate in self.rates() if fnmatchcase(name, pattern))
        return next(named, self.lr_mixer if "mixer." in name else self.lr)

    def trains(self, name: str) -> bool:
        """Whether `train` means a parameter of this name."""
        if self.stage == "align":
            return fnmatchcase(name, "*mixer.*")
        if self.train == "body":
            return not fnmatchcase(name, "*embed_tokens.*") and not fnmatchcase(name, "*lm_head.*")
        patterns = {"all": "*", "mixers": "*mixer.*"}.get(self.train, self.train).split(",")
        return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)

    def sharded(self, ranks: int) -> bool:
        """Whether so many ranks split weights between them. InputError where they cannot."""
        split = self.shard and ranks > 1
        if split and self.cuda_graph:
            raise InputError(
                f"{setting('cuda_graph')} cannot hold weights that are split over processes: give {setting('shard', False)} too"
            )
        return split

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: all that `tokens` pays for, at least one."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, self.tokens // (self.batch_size * self.seq_len))

    @property
    def warmup(self) -> int:
        """Steps up to the peak of the rates: `warmup_steps`, at most half of the run."""
        return min(self.warmup_steps, self.total_steps // 2)

    @property
    def micro(self) -> int:
        return min(self.micro_batch_size or self.batch_size, self.batch_size)
