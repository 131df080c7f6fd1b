"""Output of a training run: the library's events as lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.distillation.settings import DistillSettings

from .output import Output

if TYPE_CHECKING:
    from hybridize.data.corpus import Corpus, Packing
    from hybridize.distillation.run_dir import RunDir


class TrainingReport:
    """Prints the events of a run and keeps the last one of each kind."""

    def __init__(self, out: Output, settings: DistillSettings) -> None:
        self.out, self.settings = out, settings
        self.last: dict[str, dict[str, Any]] = {}
        self.evaluated: list[float] = []

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event.pop("kind")
        if kind == "note":
            self.out.note(event["text"])
        elif kind == "doing":
            self.out.doing(event["text"])
        elif kind == "rising":
            self.out.warn(
                f"step {event['step']}: the loss is rising, from {event['best']:.4f} to {event['now']:.4f} (mean over about 20 "
                f"steps): {self._lower_rates()}"
            )
        else:
            self.last[kind] = event
            (self._evaluation if kind == "eval" else self._step)(event)

    def _evaluation(self, event: dict[str, Any]) -> None:
        self.evaluated.append(event["reverse_kl"])
        self.out.note(
            f"step {event['step']}: held-out reverse KL {event['reverse_kl']:.4f}, forward KL {event['forward_kl']:.4f}, "
            f"agreement {event['agreement']:.4f} ({event['heldout_tokens']} tokens)"
        )

    def _step(self, event: dict[str, Any]) -> None:
        self.out.progress(
            f"step {event['step']}/{event['steps']}: loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s, "
            f"{_machine(event)}{_clock(event['seconds_left'])} left",
            last=event["step"] == event["steps"],
        )

    def begin(self, corpus: Corpus, place: str, ranks: int) -> None:
        """Shows which tokens have a loss, the packing and the length of the run. place: device and
        data."""
        settings, note = self.settings, self.out.note
        packing = corpus.packing(settings.seed, settings.seq_len)
        note(f"first document, tokens with a loss in \u27e6\u27e7: {corpus.example(settings.seed)}")
        if packing is not None:
            note(f"packing: {packing.held:.1%} of the positions hold text, {packing.learnt:.1%} have a loss{_cut(packing)}")
        at_once = f"{min(settings.micro, settings.batch_size // ranks)} sequences at once"
        note(f"{settings.total_steps} steps of {settings.batch_size} x {settings.seq_len} tokens, {at_once}, on {place}")
        if settings.on_policy:
            note(f"{settings.on_policy_rows} of the {settings.batch_size} sequences of a step are the student's own answers")
        mixer, rest = settings.peaks
        note(f"peak learning rates: {mixer:g} for mixers (--lr-mixer), {rest:g} for the rest (--lr)")
        if settings.warmup < settings.warmup_steps:
            flag = f"--warmup-steps {settings.warmup_steps}"
            note(f"warm-up: {settings.warmup} of {settings.total_steps} steps; it is limited to half of a run ({flag})")

    def interrupted(self, run: RunDir) -> None:
        """Says what is saved of an interrupted run and how to continue it."""
        steps = run.steps()
        if steps:
            saved = f"{steps[-1]} of {self.settings.total_steps} steps are saved in {run.path}"
            self.out.warn(
                f"{saved}; run the same command with --resume to continue, or with --resume --stop-now for a checkpoint of it"
            )
        else:
            self.out.warn(
                f"nothing is saved yet; run the same command with --overwrite to start again; {run.path} can be deleted"
            )

    def end(self, target: Path, used: int, kept: RunDir | None) -> None:
        """Shows the result. used: training tokens. kept: the run's directory, if it was stopped
        early and can be continued."""
        settings = self.settings
        steps = used // (settings.batch_size * settings.seq_len)
        if steps < settings.total_steps and kept is None:
            self.out.note(f"stopped after {steps} steps: no improvement in {settings.stop_when_flat} evaluations")
        if len(self.evaluated) > 1 and self.evaluated[-1] > self.evaluated[0]:
            self.out.warn(
                f"the held-out reverse KL ended at {self.evaluated[-1]:.4f}, above its first value {self.evaluated[0]:.4f}: "
                f"{self._lower_rates()}"
            )

        def human() -> None:
            print(f"{target}: trained on {used:,} tokens")
            if kept is not None:
                print(f"{kept.path} is kept: --resume --overwrite continues from step {steps} of {settings.total_steps}")

        found = {"output": str(target), "steps": steps, "last": self.last.get("step"), "heldout": self.last.get("eval")}
        self.out.result(found, human)

    def _lower_rates(self) -> str:
        """Advice to use lower learning rates, with values."""
        mixer, rest = self.settings.peaks
        lower = f"--lr-mixer {mixer * 0.3:.1g} --lr {rest * 0.3:.1g}"
        return f"the learning rates are too high for this model or warm-up; try {lower}"


def _cut(packing: Packing) -> str:
    """A note on documents that are cut, if there are any."""
    if not packing.cut:
        return ""
    return (
        f"; {packing.cut} of the first {packing.documents} documents are longer than --seq-len and cut into pieces that do not "
        f"see each other (the longest has {packing.longest} tokens)"
    )


def _machine(event: dict[str, Any]) -> str:
    """MFU and peak memory of the GPU, if they are known."""
    share = "" if event["mfu"] is None else f"MFU {event['mfu']:.0%}, "
    return share + ("" if event["peak_memory_gib"] is None else f"{event['peak_memory_gib']:.1f} GiB, ")


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
