"""What a report is made of: checkpoints with what was measured on them, and the exports of each.
Paths are shown without the machine's folders."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.anatomy import Anatomy
from hybridize.evaluation.gate import Drop
from hybridize.modeling import MIXER_LAYER

Key = tuple[str, str]  # a task or group, and which of its figures


@dataclass(frozen=True)
class Figure:
    """main: what the task or group is called by. low, high: its interval at LEVEL, where documents'
    scores are known."""

    value: float
    better: bool
    main: bool
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Export:
    """A checkpoint in another format. parent: of which checkpoint. verified: what its own card says
    of that, if it says it."""

    name: str
    form: str
    parent: Path
    verified: str | None


@dataclass
class Entry:
    """A checkpoint, or a results file without one.

    origin: the teacher's place and content hash, as the manifest has them. baseline: the teacher's
    results that an evaluation left beside the entry's own. figures: of tasks and groups, in the
    order of the file. drops: the same held against the teacher's; apart: why they cannot be. steps,
    generations: bench.json's. loss, kl: training tokens since the teacher, and what was logged
    then.
    """

    name: str
    path: Path
    shape: Anatomy | None = None
    tokens: int = 0
    lineage: list[dict[str, Any]] = field(default_factory=list)
    origin: tuple[Path | None, str] = (None, "")
    results: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    figures: dict[Key, Figure] = field(default_factory=dict)
    drops: dict[Key, Drop] = field(default_factory=dict)
    apart: str | None = None
    limited: bool = False
    recall: dict[int, float] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    loss: list[tuple[float, float]] = field(default_factory=list)
    kl: list[tuple[float, float]] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)

    @property
    def mixers(self) -> int:
        return 0 if self.shape is None else self.shape.kinds.count(MIXER_LAYER)

    def step(self, context: int, batch: int) -> dict[str, Any] | None:
        """That cell of the bench, where it has a speed."""
        for step in self.steps:
            if (step["context"], step["batch"]) == (context, batch) and step["tokens_per_second"] is not None:
                return step
        return None

    def throughput(self, context: int, batch: int) -> float | None:
        """Tokens a second of decoding, in that cell of the bench."""
        step = self.step(context, batch)
        return None if step is None else float(step["tokens_per_second"])


@dataclass
class Report:
    """entries: in the order of conversion. lost: exports whose checkpoint is not among them. bases:
    the folders given."""

    entries: list[Entry]
    problems: list[str]
    bases: list[Path] = field(default_factory=list)
    lost: list[Export] = field(default_factory=list)

    @property
    def cell(self) -> tuple[int, int] | None:
        """Context and batch of the largest cell of the bench that most checkpoints have."""
        have: dict[tuple[int, int], int] = {}
        for entry in self.entries:
            for step in entry.steps:
                if step["tokens_per_second"] is not None:
                    key = step["context"], step["batch"]
                    have[key] = have.get(key, 0) + 1
        return max(have, key=lambda key: (have[key], key[0] * key[1], key), default=None)

    def teacher(self, entry: Entry) -> Entry | None:
        """What `entry` was made from in the beginning, by place, else by the content that was
        evaluated."""
        place, content = entry.origin
        others = [other for other in self.entries if other is not entry and other.mixers == 0]
        same = (o for o in others if content and o.results is not None and o.results.get("checkpoint") == content)
        return next((other for other in others if other.path == place), None) or next(same, None)

    def shown(self, path: str | Path) -> str:
        """A path as a reader may see it: from a folder that was given, else its name; hub ids as
        they are."""
        text = str(path)
        if hub := re.search(r"models--([^/]+)/snapshots/", text):
            return hub[1].replace("--", "/")
        if not Path(text).is_absolute():
            return text if not text.startswith((".", "~")) else Path(text).name
        for base in self.bases:
            if Path(text).is_relative_to(base) and Path(text) != base:
                return str(Path(text).relative_to(base))
        return Path(text).name

    def clean(self, text: str) -> str:
        """A sentence in which every absolute path is shown as above."""
        for base in sorted(self.bases, key=lambda base: -len(str(base))):
            if base != base.parent:
                text = text.replace(f"{base}/", "").replace(str(base), base.name)
        return re.sub(r"(?<![\w:/.])~?/(?:[^\s/<>\"']+/)+[^\s/:<>\"',;()]*", lambda found: self.shown(found[0]), text)
