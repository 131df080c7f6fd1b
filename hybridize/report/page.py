"""The report as a self-contained HTML page: no script, no network, charts as inline SVG.

All text that comes from a file is escaped, because names and settings are untrusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hybridize.evaluation.gate import LEVEL
from hybridize.modeling import MIXER_LAYER
from hybridize.report.entries import Entry, Export, Key, Report
from hybridize.report.plot import COLOURS, keys_of, speed_ratio

LIGHT = ("#5c6670", "#1668b8", "#c2500a", "#157a4a", "#8a3fb5", "#b3243f", "#0d7c86", "#8a6d00")
DARK = ("#aab4be", "#6db3f5", "#f59a5b", "#5fcf94", "#c99bf0", "#f58a9b", "#5ccfd8", "#dcc04f")
STYLE = (
    """
:root{color-scheme:light dark;--line:#8885;--mamba:#1a8754;--attention:#7d8792;--window:#2f7fb5;LIGHT}
@media (prefers-color-scheme:dark){:root{--line:#8888;--mamba:#2f9d68;--attention:#5d6771;--window:#3f8fc5;DARK}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:62rem;padding:1rem}
h1{font-size:1.4rem;line-height:1.2;margin:.2rem 0}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .2rem}
p{margin:.4rem 0}.lead{font-size:1.1rem;line-height:1.4;margin:.7rem 0 1rem;overflow-wrap:anywhere}
.note{font-size:.85rem;opacity:.8;overflow-wrap:anywhere}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th{vertical-align:bottom;font-weight:600;white-space:normal;max-width:9rem;overflow-wrap:break-word;line-height:1.25}
.strips th{white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:Canvas;padding-left:0}
td:first-child{max-width:11rem;overflow:hidden;text-overflow:ellipsis}
small{display:block;font-size:.8rem;opacity:.8;font-weight:400}
svg{display:block;max-width:100%;height:auto;overflow:visible}svg.narrow{display:none}
text{fill:currentColor;font:12.5px system-ui,sans-serif}text.name{font-weight:600}
line,polyline{fill:none;stroke:currentColor;stroke-width:1}.grid{opacity:.15}.axis{opacity:.6}
polyline{stroke-width:1.8;stroke-linejoin:round}.joined{stroke-width:1.5;stroke-dasharray:4 4;opacity:.45}
.spread{stroke-width:1.5;opacity:.7}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem;margin:.2rem 0}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.4rem;vertical-align:-.08rem}
.strips{border-collapse:separate;border-spacing:2px;font-size:.8rem}
.strips th,.strips td{border:0;padding:0 .5rem 0 0;vertical-align:middle;line-height:1.4rem}
.strips th{font-weight:400;opacity:.8;text-align:left}.strips td.layer{padding:0;min-width:1.1rem;height:1.4rem;
border-radius:3px;text-align:center;color:#fff;font-size:.7rem;background:var(--attention)}
.strips td.mamba{background:var(--mamba)}
.strips td:last-child{text-align:left;padding-left:.6rem}
.strips td.window{background:var(--window)}.strips td.none{background:none}
ul{padding-left:1.2rem;margin:.3rem 0}li{overflow-wrap:anywhere;margin:.2rem 0}
@media (max-width:600px){body{padding:.7rem}svg.wide{display:none}svg.narrow{display:block}th,td{padding:.3rem .5rem}
td:first-child{max-width:7.5rem}.strips td.layer{min-width:.85rem;font-size:.6rem}.lead{font-size:1rem}}
""".replace("LIGHT", "".join(f"--c{at}:{colour};" for at, colour in enumerate(LIGHT))).replace(
        "DARK", "".join(f"--c{at}:{colour};" for at, colour in enumerate(DARK))
    )
    + "".join(
        f"polyline.c{at},line.c{at}{{stroke:var(--c{at})}}circle.c{at}{{fill:var(--c{at})}}i.c{at}{{background:var(--c{at})}}"
        for at in range(COLOURS)
    )
)
LETTERS = {MIXER_LAYER: ("M", "mamba"), "sliding_attention": ("w", "window")}
HEADLINE_TASKS = 3  # most tasks in the headline


def page(report: Report, pictures: Mapping[str, tuple[str, str]], title: str, made: str) -> str:
    """The whole page. pictures: title and SVG by name. made: the line below the title."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(made)}</p>']
    if lead := headline(report):
        parts.append(f'<p class="lead">{escape(lead)}</p>')
    if "quality" in pictures:
        parts += [f"<h2>{escape(pictures['quality'][0])}</h2>", pictures["quality"][1]]
    parts += [*_stages(report), *_training(report, pictures), *_recall(report), *_layouts(report), *_lineage(report)]
    parts += [*_other_metrics(report), *_fidelity(report), *_speed(report), *_generations(report)]
    if report.problems:
        parts += ["<h2>Not read</h2>", "<ul>", *(f"<li>{escape(problem)}</li>" for problem in report.problems), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    safe = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline'\">"
    top = f'<!doctype html><html lang="en"><head>{head}{safe}<title>{escape(title)}</title><style>{STYLE}</style></head>'
    return f"{top}<body>{''.join(parts)}</body></html>\n"


def figure(value: float) -> str:
    """A number with three decimals and without a leading zero."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def change(value: float) -> str:
    """A difference with its sign, with three decimals."""
    text = figure(value)
    return "0" if text.strip("-") == ".000" else text if text.startswith("-") else f"+{text}"


def headline(report: Report) -> str:
    """One sentence on speed, loss of quality and number of Mamba layers, for the stage with the
    most Mamba layers that has results."""
    found = [entry for entry in report.entries if entry.mixers and (entry.figures or entry.fidelity or entry.steps)]
    if not found:
        return ""
    entry = max(reversed(found), key=lambda entry: (bool(entry.figures), entry.mixers))
    assert entry.shape is not None
    parts = [f"{entry.mixers} of {len(entry.shape.kinds)} layers are Mamba"]
    ratio, cell = speed_ratio(report, entry), report.cell
    if ratio is not None and cell is not None:
        parts.append(f"{ratio:.2g} times the teacher's decoding speed (batch {cell[1]} after {cell[0]:,} tokens)")
    for key in [key for key in keys_of(report, True) if key in entry.figures][:HEADLINE_TASKS]:
        text, drop = f"{key[0]} {figure(entry.figures[key].value)}", entry.drops.get(key)
        if drop is not None:
            interval = drop.interval(LEVEL)
            spread = "" if interval is None else f", {LEVEL:.0%} interval {change(-interval[1])} to {change(-interval[0])}"
            text += f" against {figure(drop.baseline)} ({change(-drop.drop)}{spread})"
        parts.append(text)
    if not entry.figures and entry.fidelity is not None:
        parts.append(f"reverse KL {entry.fidelity['reverse_kl']:.3f} to the teacher")
    return f"{entry.name}: {', '.join(parts)}" + (" (limited run)" if entry.limited else "")


Cell = str | tuple[str, str]  # content of a table cell, and a second line in small print


def _table(columns: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    def inside(cell: Cell) -> str:
        return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"

    head = "".join(f"<th>{inside(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{inside(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _filled(columns: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """A table without its empty columns."""
    kept = [at for at in range(len(columns)) if at == 0 or any(row[at] for row in rows)]
    return _table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows])


def _stages(report: Report) -> list[str]:
    """The main table: one row per stage, in order of conversion."""
    keys, cell = keys_of(report, True), report.cell
    columns: list[Cell] = ["stage", "Mamba layers", "training tokens"]
    columns.append("speed" if cell is None else ("speed relative to teacher", f"batch {cell[1]} after {cell[0]:,} tokens"))
    columns += [_column(report, key) for key in keys] + ["reverse KL", "agreement"]
    rows: list[list[Cell]] = []
    for entry in report.entries:
        ratio, shape = speed_ratio(report, entry), entry.shape
        row: list[Cell] = [entry.name + ("*" if entry.limited else "")]
        row += ["" if shape is None else f"{entry.mixers} of {len(shape.kinds)}", f"{entry.tokens:,}" if entry.tokens else ""]
        row.append("" if ratio is None else f"{ratio:.2f}")
        row += [_score(entry, key) for key in keys]
        kl = entry.fidelity
        row += ["", ""] if kl is None else [f"{kl['reverse_kl']:.4f}", f"{kl['agreement']:.1%}"]
        rows.append(row)
    notes = []
    if any(entry.drops for entry in report.entries):
        notes.append(
            f"Below a metric: its difference from the teacher's, negative if it is worse, with the {LEVEL:.0%} "
            "confidence interval, paired over documents."
        )
    if any(figure.low is not None for entry in report.entries if not entry.drops for figure in entry.figures.values()):
        notes.append(f"Below a metric without a comparison: its own {LEVEL:.0%} confidence interval over documents.")
    notes += ["* Limited run."] * any(entry.limited for entry in report.entries)
    notes += [f"{e.name} is not compared: {e.apart}." for e in report.entries if e.apart]
    return ["<h2>Stages</h2>", _filled(columns, rows), f'<p class="note">{escape(" ".join(notes))}</p>']


def _column(report: Report, key: Key) -> Cell:
    better = next(entry.figures[key].better for entry in report.entries if key in entry.figures)
    return key[0].replace("_", "_\u200b"), key[1].removesuffix(",none").replace(",", ", ") + (
        "" if better else ", lower is better"
    )


def _score(entry: Entry, key: Key) -> Cell:
    """A metric, and below it the difference from the teacher's, or otherwise its own interval."""
    found, drop = entry.figures.get(key), entry.drops.get(key)
    if found is None:
        return ""
    if drop is None:
        return figure(found.value) if found.low is None or found.high is None else (
            figure(found.value), f"{figure(found.low)} to {figure(found.high)}"
        )  # fmt: skip
    interval = drop.interval(LEVEL)
    spread = "" if interval is None else f" ({change(-interval[1])} to {change(-interval[0])})"
    return figure(found.value), change(-drop.drop) + spread


def _other_metrics(report: Report) -> list[str]:
    """The metrics of tasks other than their main ones."""
    keys = keys_of(report, False)
    rows = [[e.name, *(_score(e, key) for key in keys)] for e in report.entries if any(key in e.figures for key in keys)]
    return ["<h2>Other metrics</h2>", _table(["stage", *(_column(report, key) for key in keys)], rows)] if rows else []


def _training(report: Report, pictures: Mapping[str, tuple[str, str]]) -> list[str]:
    parts: list[str] = []
    for name, entries in (("loss", [e.loss for e in report.entries]), ("reverse_kl", [e.kl for e in report.entries])):
        if name in pictures:
            names = "".join(
                f'<span><i class="c{at % COLOURS}"></i>{escape(report.entries[at].name)}</span>'
                for at, points in enumerate(entries)
                if len(points) > 1
            )
            parts += [f"<h3>{escape(pictures[name][0])}</h3>", pictures[name][1], f'<p class="legend">{names}</p>']
    return ["<h2>Training</h2>", *parts] if parts else []


def _recall(report: Report) -> list[str]:
    found = [entry for entry in report.entries if entry.recall]
    lengths = sorted({length for entry in found for length in entry.recall})
    rows = [[f"{length:,}", *(figure(e.recall[length]) if length in e.recall else "" for e in found)] for length in lengths]
    note = '<p class="note">Share of correct answers to questions about earlier text; mean over the kinds of tasks.</p>'
    return ["<h2>Recall by length</h2>", _table(["tokens", *(e.name for e in found)], rows), note] if found else []


def _layouts(report: Report) -> list[str]:
    """The layer types of all stages, one row per stage, below the layer numbers."""
    found = [(entry, entry.shape) for entry in report.entries if entry.shape is not None]
    if not found:
        return []
    most = max(len(shape.kinds) for _, shape in found)
    step = 1 if most <= 12 else 4
    numbers = "".join(f'<th colspan="{min(step, most - at)}">{at}</th>' for at in range(0, most, step))
    rows = []
    for entry, shape in found:
        kinds = [LETTERS.get(kind, ("a", "attention")) for kind in shape.kinds]
        cells = "".join(f'<td class="layer {kind}">{letter}</td>' for letter, kind in kinds)
        cells += '<td class="layer none"></td>' * (most - len(kinds))
        kind = f" {shape.mixer['kind']}" if shape.mixer else ""
        memory = f"{shape.parameters['total'] / 1e6:,.0f} M parameters; {shape.at_long / 2**20:,.1f} MiB"
        summary = escape(f"{entry.mixers} of {len(kinds)}{kind}; {memory}")
        rows.append(f"<tr><td>{escape(entry.name)}</td>{cells}<td>{summary}</td></tr>")
    table = (
        f'<table class="strips"><thead><tr><th>layer</th>{numbers}<th></th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    note = "M: Mamba; a: attention; w: sliding-window attention. MiB: cache of one sequence at 32k tokens."
    return ["<h2>Layouts</h2>", f'<div class="scroll">{table}</div>', f'<p class="note">{note}</p>']


def _lineage(report: Report) -> list[str]:
    """The lineage of each stage, with its exports."""
    items = []
    for entry in report.entries:
        if entry.shape is None:
            items.append(f"<li>{escape(entry.name)}: results without a checkpoint</li>")
            continue
        steps = [step["checkpoint"] + (f" ({step['command']})" if step["command"] else "") for step in entry.lineage]
        items.append(f"<li>{escape(' → '.join(steps))}{_exports(entry.exports)}</li>")
    parts = ["<h2>Lineage and exports</h2>", f"<ul>{''.join(items)}</ul>"]
    if report.lost:
        parts += ["<p>Exports of checkpoints that are not in this report:</p>", _exports(report.lost)]
    return parts


def _exports(exports: Sequence[Export]) -> str:
    def verified(export: Export) -> str:
        if export.verified is None:
            return ""
        return f"; {'' if export.verified.startswith('not verified') else 'verified, '}{export.verified}"

    items = "".join(f"<li>{escape(f'{e.name}: export as {e.form}{verified(e)}')}</li>" for e in exports)
    return f"<ul>{items}</ul>" if items else ""


def _fidelity(report: Report) -> list[str]:
    rows: list[list[str]] = []
    for entry in report.entries:
        if fidelity := entry.fidelity:
            figures = [
                f"{fidelity[key]:.4f}" for key in ("reverse_kl", "forward_kl", "agreement", "perplexity", "teacher_perplexity")
            ]
            rows.append([entry.name, *figures, fidelity["data"]])
    columns = ["stage", "reverse KL", "forward KL", "agreement", "perplexity", "teacher's", "text"]
    return ["<h2>Fidelity to the teacher</h2>", _table(columns, rows)] if rows else []


def _speed(report: Report) -> list[str]:
    timed = [entry for entry in report.entries if entry.steps]
    if not timed:
        return []
    cells = sorted({(step["context"], step["batch"]) for entry in timed for step in entry.steps})
    rows = [[e.name, *(_count(e.throughput(*cell)) for cell in cells)] for e in timed]
    columns: list[Cell] = ["stage", *((f"batch {batch}", f"after {context:,}") for context, batch in cells)]
    machines = ", ".join(sorted({step["machine"] for entry in timed for step in entry.steps}))
    return ["<h2>Decoding, tokens per second</h2>", _table(columns, rows), f'<p class="note">{escape(machines)}</p>']


def _generations(report: Report) -> list[str]:
    rows = [
        [e.name, f"{g['prompt']:,} in, {g['new']:,} out", str(g["batch"]), _count(g.get("tokens_per_second"))]
        for e in report.entries
        for g in e.generations
    ]
    columns = ["stage", "tokens", "largest batch", "tokens per second"]
    return ["<h2>Whole generations</h2>", _table(columns, rows)] if rows else []


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}"
