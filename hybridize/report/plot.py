"""The report's charts as inline SVG: no library, no script, colours from the page's style sheet,
which has light and dark ones.

All text is escaped, because names of checkpoints are untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from hybridize.evaluation.gate import LEVEL
from hybridize.report.entries import Entry, Key, Report

COLOURS = 8  # number of colour classes in the page's style sheet, c0 to c7
MOST = 200  # most points in a curve
WIDE, NARROW = (940, 340), (350, 310)  # size of a chart in pixels, for wide and for narrow screens
LETTER = 7.2  # largest width of a letter in a label, in pixels
Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """label: with its unit. told: formats a tick. log: logarithmic scale."""

    label: str
    told: Callable[[float], str]
    log: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line. colour: index of a colour class; None draws a faint
    line without dots, to connect the points of other series. label: write the name beside the last
    point. spread: lower and upper end of the interval of each y."""

    name: str
    points: tuple[Point, ...]
    colour: int | None = None
    dots: bool = False
    label: bool = False
    spread: tuple[Point, ...] = ()


def thinned(points: Sequence[Point], most: int = MOST) -> tuple[Point, ...]:
    """Evenly chosen points, at most `most`, including the first and last. Points that are not
    finite are dropped."""
    good = [point for point in points if all(map(math.isfinite, point))]
    if len(good) <= most:
        return tuple(good)
    return tuple(good[round(at * (len(good) - 1) / (most - 1))] for at in range(most))


def short(value: float) -> str:
    """A number as a short axis label, such as 1.5, 20k or 3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{value * 100:.4g}%"


def keys_of(report: Report, main: bool) -> list[Key]:
    """Keys of all metrics in the report: the main ones of tasks and groups, or the others."""
    return list(dict.fromkeys(key for e in report.entries for key, figure in e.figures.items() if figure.main == main))


def speed_ratio(report: Report, entry: Entry) -> float | None:
    """Decoding speed relative to the teacher's, in the report's cell and on the same machine, or
    None."""
    cell = report.cell
    mine = None if cell is None else entry.step(*cell)
    if cell is None or mine is None:
        return None
    if any(report.teacher(other) is entry for other in report.entries):
        return 1.0
    teacher = report.teacher(entry)
    theirs = None if teacher is None else teacher.step(*cell)
    if theirs is None or mine["machine"] != theirs["machine"]:
        return None
    return float(mine["tokens_per_second"] / theirs["tokens_per_second"])


def charts(report: Report) -> dict[str, tuple[str, str]]:
    """Title and SVG, by name, of every chart for which there is data."""
    found = {}
    if drawn := _quality_chart(report):
        found["quality"] = drawn
    for name, title, label in (
        ("loss", "Training loss", "loss"),
        ("reverse_kl", "Held-out reverse KL to the teacher", "reverse KL, nats per token"),
    ):
        series = [
            Series(entry.name, thinned(points), at, dots=name == "reverse_kl")
            for at, entry in enumerate(report.entries)
            if len(points := entry.loss if name == "loss" else entry.kl) > 1
        ]
        if series:
            values = [y for one in series for _, y in one.points]
            log = min(values) > 0 and max(values) > 20 * min(values)
            up = Axis(label + (" (log scale)" if log else ""), short, log)
            found[name] = title, chart(title, Axis("training tokens since the teacher", short), up, series)
    return found


def _quality_chart(report: Report) -> tuple[str, str] | None:
    """Title and SVG of quality against speed, or against the number of Mamba layers if fewer than
    two stages have a speed. None if there are fewer than two points."""
    up, quality = _quality(report)
    cell = report.cell
    across: list[tuple[Axis, str, list[float | None]]] = []
    if cell is not None:
        where = f"batch {cell[1]} after {cell[0]:,} tokens"
        ratios = [speed_ratio(report, entry) for entry in report.entries]
        speeds = [entry.throughput(*cell) for entry in report.entries]
        across.append((Axis(f"decoding speed relative to the teacher ({where})", short), "speed", ratios))
        across.append((Axis(f"decoding, tokens per second ({where})", short), "speed", speeds))
    layers = [None if entry.shape is None else float(entry.mixers) for entry in report.entries]
    across.append((Axis("Mamba layers", short), "Mamba layers", layers))
    for axis, against, places in across:
        both = list(enumerate(zip(places, quality, strict=True)))
        points = [(at, x, y) for at, (x, y) in both if x is not None and y is not None]
        if len(points) < 2:
            continue
        path = Series("", tuple((x, y[0]) for _, x, y in points))
        dots = [Series(report.entries[at].name, ((x, y[0]),), at, True, True, y[1]) for at, x, y in points]
        title = f"Quality against {against}"
        return title, chart(title, axis, up, [path, *dots])
    return None


Quality = tuple[float, tuple[Point, ...]]  # value, and its interval or nothing


def _quality(report: Report) -> tuple[Axis, list[Quality | None]]:
    """The axis and each entry's quality: its scores as a share of the teacher's, otherwise the mean
    over its tasks, otherwise its agreement with the teacher."""
    entries = report.entries
    pairs = [(entry, teacher) for entry in entries if entry.drops and (teacher := report.teacher(entry)) is not None]
    keys = [key for key in keys_of(report, True) if all(_has_share(entry, key) for entry, _ in pairs)]
    if pairs and keys:
        mean = "mean over " if len(keys) > 1 else ""
        roots = [id(teacher) for _, teacher in pairs]
        shares = [_share(e, keys) if e.drops else (1.0, ()) if id(e) in roots else None for e in entries]
        named = ", ".join(task for task, _ in keys[:3]) if len(keys) <= 3 else f"{len(keys)} tasks"
        label = f"share of the teacher's score, {mean}{named}" + (f"; bars: {LEVEL:.0%} interval" if len(keys) == 1 else "")
        return Axis(label, percent), shares
    have = [entry for entry in entries if entry.figures]
    common = [key for key in keys_of(report, True) if all(key in e.figures and e.figures[key].better for e in have)]
    if len(have) > 1 and common:
        means = [sum(e.figures[key].value for key in common) / len(common) if e.figures else None for e in entries]
        return Axis("mean over tasks", short), [None if mean is None else (mean, ()) for mean in means]
    agreed: list[Quality | None] = [None if entry.fidelity is None else (entry.fidelity["agreement"], ()) for entry in entries]
    return Axis("top-1 agreement with the teacher", percent), agreed


def _has_share(entry: Entry, key: Key) -> bool:
    """Whether the metric can be given as a share of the teacher's."""
    drop = entry.drops.get(key)
    return drop is not None and entry.figures[key].better and drop.baseline > 0


def _share(entry: Entry, keys: Sequence[Key]) -> Quality:
    """Mean over metrics of the share of the teacher's value; with one metric also its interval."""
    drops = [entry.drops[key] for key in keys]
    share = sum(drop.candidate / drop.baseline for drop in drops) / len(drops)
    interval = drops[0].interval(LEVEL) if len(drops) == 1 else None
    if interval is None:
        return share, ()
    return share, ((1 - interval[1] / drops[0].baseline, 1 - interval[0] / drops[0].baseline),)


def chart(title: str, across: Axis, up: Axis, series: Sequence[Series]) -> str:
    """The chart for wide and for narrow screens; the style sheet shows one of the two."""
    drawn = (_Drawing(title, across, up, series, *size, kind).svg() for size, kind in ((WIDE, "wide"), (NARROW, "narrow")))
    return "".join(drawn)


class _Scale:
    """Maps values to pixels and chooses ticks."""

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float, count: int) -> None:
        self.log = log and min(values) > 0
        self.begin, self.end = begin, end
        low, high = min(map(self._of, values)), max(map(self._of, values))
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room
        if low == 0:
            self.low = 0.0
        self.ticks = self._log_ticks(count) if self.log else self._ticks(count)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.begin + (self._of(value) - self.low) / (self.high - self.low) * (self.end - self.begin)

    def _ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = size * next(part for part in (1, 2, 2.5, 5, 10) if part * size >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [at * step for at in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        powers = range(max(-300, math.floor(self.low)), min(300, math.ceil(self.high)) + 1)
        for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [part * 10.0**power for power in powers for part in parts]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
            if len(found) <= count + 2:
                break
        return found


class _Drawing:
    def __init__(
        self, title: str, across: Axis, up: Axis, series: Sequence[Series], width: int, height: int, kind: str
    ) -> None:
        self.title, self.across, self.up, self.series = title, across, up, series
        self.width, self.height, self.kind = width, height, kind
        points = [point for one in series for point in one.points]
        ends = [end for one in series for spread in one.spread for end in spread]
        self.left, self.bottom = 56, height - (62 if kind == "narrow" else 46)
        self.x = _Scale([x for x, _ in points], across.log, self.left, width - 16, max(3, width // 110))
        self.y = _Scale([y for _, y in points] + ends, up.log, self.bottom, 34, 6)
        self.taken: list[Box] = []

    def svg(self) -> str:
        parts = [*self._axes(), *(part for one in self.series for part in self._line(one))]
        parts += [part for one in self.series for part in self._dots(one)]
        self.taken += [
            (self.x(x) - 5, self.y(y) - 5, self.x(x) + 5, self.y(y) + 5) for one in self.series for x, y in one.points
        ]
        parts += [self._label(one) for one in self.series if one.label]
        size = f'class="{self.kind}" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        title = escape(self.title)
        return f'<svg {size} role="img" aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'

    def _axes(self) -> list[str]:
        parts = []
        for value in self.y.ticks:
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.width - 16}" y1="{at:.1f}" y2="{at:.1f}"></line>')
            parts.append(_text(self.left - 7, at + 4, self.up.told(value), "end"))
        for value in self.x.ticks:
            at = self.x(value)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{self.bottom}" y2="{self.bottom + 5}"></line>')
            parts.append(_text(at, self.bottom + 18, self.across.told(value), "middle"))
        parts.append(
            f'<line class="axis" x1="{self.left}" x2="{self.width - 16}" y1="{self.bottom}" y2="{self.bottom}"></line>'
        )
        label = self.up.label
        if LETTER * len(label) > self.width and ", " in label:
            label, rest = label.split(", ", 1)
            parts.append(_text(4, 27, rest, "start"))
        parts.append(_text(4, 12, label, "start"))
        label, down = self.across.label, 6
        if LETTER * len(label) > self.width and " (" in label:
            label, rest = label.split(" (", 1)
            parts.append(_text(self.width - 16, self.height - 6, f"({rest}", "end"))
            down = 21
        parts.append(_text(self.width - 16, self.height - down, label, "end"))
        return parts

    def _line(self, one: Series) -> list[str]:
        if len(one.points) < 2:
            return []
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in one.points)
        self.taken += self._steps(one) if one.colour is None else []
        return [f'<polyline class="{_colour(one)}" points="{path}"></polyline>']

    def _steps(self, one: Series) -> list[Box]:
        """Small boxes along a line, so that labels avoid it."""
        found = []
        for (x, y), (u, v) in pairwise((self.x(x), self.y(y)) for x, y in one.points):
            count = int(math.hypot(u - x, v - y) // 8) + 1
            for at in range(count + 1):
                across, up = x + (u - x) * at / count, y + (v - y) * at / count
                found.append((across - 1, up - 1, across + 1, up + 1))
        return found

    def _dots(self, one: Series) -> list[str]:
        if not one.dots:
            return []
        parts = []
        for (x, _), (low, high) in zip(one.points, one.spread, strict=False):
            at = self.x(x)
            parts.append(
                f'<line class="{_colour(one)} spread" x1="{at:.1f}" x2="{at:.1f}" y1="{self.y(low):.1f}" '
                f'y2="{self.y(high):.1f}"></line>'
            )
        for x, y in one.points:
            hint = escape(f"{one.name}: {self.across.told(x)}, {self.up.told(y)}")
            parts.append(
                f'<circle class="{_colour(one)}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{5 if one.label else 3}">'
                f"<title>{hint}</title></circle>"
            )
        return parts

    def _label(self, one: Series) -> str:
        """The name of a series, placed where it overlaps least with what is already drawn."""
        most = self.width // 16
        name = one.name if len(one.name) <= most else one.name[: most - 1] + "…"
        x, y = self.x(one.points[-1][0]), self.y(one.points[-1][1])
        long = LETTER * len(name)
        places = []
        for down in (4, -9, 19, -22, 32, -35, 45):
            beside = (10.0, -10.0 - long) if down == 4 else (8.0, -8.0 - long, -long / 2)
            places += [(x + shift, y + down) for shift in beside]
        box = lambda at: (at[0], at[1] - 12, at[0] + long, at[1] + 3)  # noqa: E731
        inside = [at for at in places if at[0] >= self.left and at[0] + long <= self.width and 26 < at[1] < self.bottom - 2]
        best = min(inside or places[:1], key=lambda at: sum(_overlap(box(at), other) for other in self.taken))
        self.taken.append(box(best))
        return _text(*best, name, "start", "name")


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes share."""
    across, up = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0


def _colour(one: Series) -> str:
    return "joined" if one.colour is None else f"c{one.colour % COLOURS}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
