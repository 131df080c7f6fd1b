"""The settings of a distillation. Flags, recipe files and the reference pages are generated from
this class."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from hybridize.distillation.schedule import SCHEDULES
from hybridize.errors import InputError, setting
from hybridize.options import check_bounds, option
from hybridize.parsing import named_numbers, parse_indices

# Default peak rates of mixers and of the rest. 1e-3 is best at a hidden size of 576 and diverges at
# 896: docs/results.md
NARROW, WIDE, WIDTH = (1e-3, 1e-4), (3e-4, 3e-5), 576
STAGES = ("distill", "align")
# settings that may change when a run is resumed
PLACING = ("shard", "offload_teacher")
SAVING = ("save_every", "save_minutes", "keep_last")


@dataclass(frozen=True)
class DistillSettings:
    """Everything that determines what a run computes. Counts are in sequences, steps or tokens as
    named; learning rates are AdamW's peak rates.

    stage: `distill` trains on the loss; `align` fits each mixer to its attention layer's output and
    trains nothing else. steps: takes precedence over tokens. lr_groups: the first pattern that
    matches a parameter's name takes precedence over lr and lr_mixer. mask: `assistant` packs
    documents separately and computes the loss on assistant tokens; `none` computes it on every
    token of one joined stream. checkpoint_layers: works without gradient_checkpointing. shard: if
    False, every process holds all weights and only gradients are exchanged. deterministic: see
    runtime.device.be_deterministic.
    """

    tokens: int | None = option(None, "Length: total training tokens, padding included.", above=0)
    steps: int | None = option(None, "Length: optimizer steps.", above=0)
    stage: str = option("distill", "distill, or align: first fit each mixer to its attention layer.")
    loss: str = option("reverse-kl", "reverse-kl, forward-kl, js, ce or a mixture: reverse-kl=.9,ce=.1.")
    temperature: float = option(1.0, "Softmax temperature of the divergences.")
    mask: str = option("assistant", "assistant: compute the loss on assistant tokens; none: on every token of one stream.")
    on_policy: float = option(0.0, "Share of the sequences that the student writes itself, below 1.", least=0)
    on_policy_every: int = option(20, "Steps between rounds of the student's answers.", above=0)
    on_policy_tokens: int = option(512, "Longest answer of the student.", above=0)
    on_policy_temperature: float = option(1.0, "Sampling temperature of the student's answers; 0 is greedy.", least=0)
    batch_size: int = option(16, "Sequences per optimizer step.", above=0)
    micro_batch_size: int | None = option(
        None, "Sequences per forward pass [default: the largest that fits by the plan].", above=0
    )
    seq_len: int = option(2048, "Tokens per sequence.", least=2)
    lr_mixer: float | None = option(
        None, "Peak learning rate of the mixers [default: 1e-3, or 3e-4 if the hidden size is above 576].", above=0
    )
    lr: float | None = option(
        None, "Peak learning rate of all other parameters [default: a tenth of the default for mixers].", above=0
    )
    lr_groups: str = option("", "PATTERN=RATE,...: peak rates by parameter name, overriding the two above.")
    schedule: str = option("cosine", "Learning-rate schedule: cosine, wsd or linear.")
    warmup_steps: int = option(50, "Warm-up steps, at most half of the run.", least=0)
    weight_decay: float = option(0.0, "Weight decay of matrices.", least=0)
    clip: float = option(1.0, "Gradient clipping: largest norm.", above=0)
    train: str = option("all", "all, body (no embeddings, no head), mixers, or PATTERN,... of parameter names.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, more time.")
    checkpoint_layers: str = option("", "Gradient checkpointing of these layers only, as 3,5-8.")
    compile: bool = option(False, "torch.compile the layers: a minute at the start, then faster steps.")
    cuda_graph: bool = option(False, "Capture the step as one CUDA graph.")
    deterministic: bool = option(False, "Bitwise reproducible results, slower on a GPU.")
    shard: bool = option(True, "Shard weights over processes (FSDP) instead of replicating them.")
    offload_teacher: bool = option(False, "Keep the teacher's layers in host memory: less GPU memory, slower.")
    eval_every: int = option(100, "Steps between held-out evaluations, 0: at start and end only.", least=0)
    eval_windows: int = option(24, "Held-out sequences to evaluate on.", above=0)
    stop_when_flat: int = option(0, "Early-stopping patience: evaluations without a better reverse KL, 0: never.", least=0)
    skip_bad_batches: int = option(0, "Skip up to this many batches with a non-finite gradient.", least=0)
    checkpoint_merge: int = option(0, "Average the weights of the last K saved states, 0: no averaging.", least=0)
    save_every: int = option(500, "Steps between resumable states, 0: none.", least=0)
    save_minutes: float = option(0.0, "Minutes between resumable states, 0: by steps only.", least=0)
    keep_last: int = option(2, "Resumable states to keep.", above=0)
    seed: int = option(0, "Random seed.", least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.stage not in STAGES:
            raise InputError(f"{setting('stage')} {self.stage} is unknown; use {' or '.join(STAGES)}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"{setting('schedule')} {self.schedule} is unknown; use {', '.join(SCHEDULES)}")
        if self.stop_when_flat and not self.eval_every:
            raise InputError(f"{setting('stop_when_flat')} needs held-out evaluations; give {setting('eval_every')}")
        if self.cuda_graph and (self.stage != "distill" or self.gradient_checkpointing or self.checkpoint_layers):
            raise InputError(f"{setting('cuda_graph')} needs {setting('stage')} distill and no gradient checkpointing")
        if self.cuda_graph and self.offload_teacher:
            raise InputError(
                f"{setting('cuda_graph')} cannot capture an offloaded teacher: leave out {setting('offload_teacher')}"
            )
        if self.compile and self.stage != "distill":
            raise InputError(f"{setting('compile')} needs {setting('stage')} distill: alignment runs mixers, not whole layers")
        if self.checkpoint_merge > 1 and not (self.save_every and self.keep_last >= self.checkpoint_merge):
            raise InputError(
                f"{setting('checkpoint_merge')} {self.checkpoint_merge} averages saved states; "
                f"set {setting('save_every')}, and {setting('keep_last')} to at least {self.checkpoint_merge}"
            )
        self._check_on_policy()
        self.recomputed(None)
        self.rates()
        if self.tokens is None and self.steps is None:
            raise InputError(f"the length is missing: give {setting('tokens')} or {setting('steps')}")

    def _check_on_policy(self) -> None:
        """InputError if `on_policy` contradicts other settings."""
        if not self.on_policy:
            return
        name = setting("on_policy")
        if self.on_policy >= 1:
            raise InputError(f"{name} {self.on_policy:g} must be below 1: the rest of a batch is from the training data")
        if self.stage != "distill" or self.mask != "assistant":
            raise InputError(f"{name} needs {setting('stage')} distill and {setting('mask')} assistant")
        if "ce" in dict(named_numbers(self.loss, "loss", 1.0)):
            raise InputError(f"{name} needs a loss against the teacher alone: ce would train the student on its own mistakes")
        if self.on_policy_temperature == float("inf"):
            raise InputError(f"{setting('on_policy_temperature')} must be finite")
        if not 0 < (rows := self.on_policy_rows) < self.batch_size:
            share = f"{name} {self.on_policy:g} of {setting('batch_size')} {self.batch_size}"
            raise InputError(f"{share} is {rows} sequences; it must be at least 1, and not all")
        if self.on_policy_prompt < 1:
            raise InputError(
                f"{setting('on_policy_tokens')} {self.on_policy_tokens} must leave room for a prompt in "
                f"{setting('seq_len')} {self.seq_len}"
            )

    @property
    def on_policy_rows(self) -> int:
        """Sequences of a batch that the student writes itself."""
        return round(self.on_policy * self.batch_size)

    @property
    def on_policy_prompt(self) -> int:
        """The longest prompt, in tokens, that leaves room for an answer and its end token."""
        return self.seq_len - self.on_policy_tokens - 1

    def decisive(self) -> dict[str, Any]:
        """Returns the settings that determine the result; a resumed run must have the same ones."""
        merging = self.checkpoint_merge > 1  # the result then depends on which states exist
        free = PLACING if merging else (*PLACING, *SAVING)
        if not self.on_policy:  # so that runs that began before there was the setting can be resumed
            free = (*free, *(key for key in asdict(self) if key.startswith("on_policy")))
        unset = [key for key in ("lr_mixer", "lr") if getattr(self, key) is None]  # see with_rates
        return {key: value for key, value in asdict(self).items() if key not in (*free, *unset)}

    def recomputed(self, layers: int | None) -> set[int]:
        """Returns the layers that keep only their input and are recomputed in backward. layers:
        number of layers, None if unknown. InputError for a layer that does not exist."""
        if not self.checkpoint_layers:
            return set(range(layers or 0)) if self.gradient_checkpointing else set()
        chosen = set(parse_indices(self.checkpoint_layers, "checkpoint_layers"))
        if layers is not None and max(chosen) >= layers:
            raise InputError(f"{setting('checkpoint_layers')} {self.checkpoint_layers}: the model has layers 0 to {layers - 1}")
        return chosen

    def rates(self) -> list[tuple[str, float]]:
        """Returns `lr_groups` as (pattern, rate) pairs."""
        return named_numbers(self.lr_groups, "lr_groups") if self.lr_groups else []

    def rate_of(self, name: str) -> float:
        """Returns the peak rate of the parameter `name`."""
        named = (rate for pattern, rate in self.rates() if fnmatchcase(name, pattern))
        return next(named, self.peaks["mixer." not in name])

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak rates of the mixers and of the rest."""
        return self.lr_mixer or NARROW[0], self.lr or NARROW[1]

    def with_rates(self, hidden: int) -> DistillSettings:
        """Returns the settings with the rates that are not set at their defaults for a student of
        this hidden size. The width matters to distillation only: alignment was not measured."""
        mixer, rest = WIDE if hidden > WIDTH and self.stage == "distill" else NARROW
        return replace(self, lr_mixer=self.lr_mixer or mixer, lr=self.lr or rest)

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` is trained."""
        if self.stage == "align":
            return fnmatchcase(name, "*mixer.*")
        if self.train == "body":
            return not fnmatchcase(name, "*embed_tokens.*") and not fnmatchcase(name, "*lm_head.*")
        patterns = {"all": "*", "mixers": "*mixer.*"}.get(self.train, self.train).split(",")
        return any(fnmatchcase(name, pattern.strip()) for pattern in patterns)

    def sharded(self, ranks: int) -> bool:
        """Whether weights are sharded over this number of ranks. InputError if they cannot be."""
        split = self.shard and ranks > 1
        if split and self.cuda_graph:
            raise InputError(f"{setting('cuda_graph')} cannot capture sharded weights: give {setting('shard', False)} too")
        return split

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: `steps`, else as many as fit into `tokens`, at least one."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return max(1, self.tokens // (self.batch_size * self.seq_len))

    @property
    def warmup(self) -> int:
        """Warm-up steps: `warmup_steps`, at most half of the run."""
        return min(self.warmup_steps, self.total_steps // 2)

    @property
    def micro(self) -> int:
        return min(self.micro_batch_size or self.batch_size, self.batch_size)
