"""Data classes of a report: checkpoints with their measurements and exports. Paths are shown
without the machine's folders."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.anatomy import Anatomy
from hybridize.evaluation.gate import Drop
from hybridize.modeling import MIXER_LAYER

Key = tuple[str, str]  # a task or group, and one of its metrics


@dataclass(frozen=True)
class Figure:
    """Value of one metric. better: whether higher is better. main: whether it is the task's or
    group's main metric. low, high: its confidence interval at LEVEL, if the scores of documents are
    known."""

    value: float
    better: bool
    main: bool
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Export:
    """A checkpoint in another format. parent: the checkpoint it was made from. verified: result of
    the comparison with it, as the model card has it, or None."""

    name: str
    form: str
    parent: Path
    verified: str | None


@dataclass
class Entry:
    """A checkpoint, or a results file without one.

    origin: path and content hash of the teacher, from the manifest. baseline: the teacher's results
    that an evaluation wrote beside the entry's own. figures: metrics of tasks and groups, in the
    order of the file. drops: their comparison with the teacher's; apart: why there is none. steps,
    generations: from bench.json. loss, kl: pairs of training tokens since the teacher and the value
    logged there.
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
        """Number of Mamba layers."""
        return 0 if self.shape is None else self.shape.kinds.count(MIXER_LAYER)

    def step(self, context: int, batch: int) -> dict[str, Any] | None:
        """The benchmark entry for this context and batch, or None if it has no speed."""
        for step in self.steps:
            if (step["context"], step["batch"]) == (context, batch) and step["tokens_per_second"] is not None:
                return step
        return None

    def throughput(self, context: int, batch: int) -> float | None:
        """Decoding speed in tokens per second at this context and batch, or None."""
        step = self.step(context, batch)
        return None if step is None else float(step["tokens_per_second"])


@dataclass
class Report:
    """entries: in order of conversion. lost: exports whose checkpoint is not among them. bases: the
    folders that the report is made from. problems: files that could not be read, and why."""

    entries: list[Entry]
    problems: list[str]
    bases: list[Path] = field(default_factory=list)
    lost: list[Export] = field(default_factory=list)

    @property
    def cell(self) -> tuple[int, int] | None:
        """Context and batch of the benchmark cell that most checkpoints have, the largest of
        several."""
        have: dict[tuple[int, int], int] = {}
        for entry in self.entries:
            for step in entry.steps:
                if step["tokens_per_second"] is not None:
                    key = step["context"], step["batch"]
                    have[key] = have.get(key, 0) + 1
        return max(have, key=lambda key: (have[key], key[0] * key[1], key), default=None)

    def teacher(self, entry: Entry) -> Entry | None:
        """The root teacher of `entry`, found by path, otherwise by the content hash in its results;
        None if it is not in the report."""
        path, content = entry.origin
        others = [other for other in self.entries if other is not entry and other.mixers == 0]
        same = (o for o in others if content and o.results is not None and o.results.get("checkpoint") == content)
        return next((other for other in others if other.path == path), None) or next(same, None)

    def shown(self, path: str | Path) -> str:
        """A path without the machine's folders: relative to one of `bases`, otherwise its last
        part; hub ids are kept."""
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
        """A sentence with every absolute path shortened as by `shown`."""
        for base in sorted(self.bases, key=lambda base: -len(str(base))):
            if base != base.parent:
                text = text.replace(f"{base}/", "").replace(str(base), base.name)
        return re.sub(r"(?<![\w:/.])~?/(?:[^\s/<>\"']+/)+[^\s/:<>\"',;()]*", lambda found: self.shown(found[0]), text)
