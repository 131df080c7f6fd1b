"""The report as one page of HTML that needs nothing beside it: no script, no network, pictures inside.

Whatever comes from a file is escaped: names and settings are the checkpoints' own words.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .gate import LEVEL
from .report import Entry, Report

STYLE = """
:root{color-scheme:light dark;--line:#8884}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .2rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:Canvas}
img{max-width:100%;height:auto;background:#fff;border-radius:.4rem}
.strip{display:flex;gap:2px;height:1.4rem;margin:.3rem 0}
.strip i{flex:1;min-width:2px;border-radius:2px;background:#9aa3ad}.strip i.m{background:#1f9d63}.strip i.w{background:#4f9fd1}
.note{font-size:.85rem;opacity:.75;overflow-wrap:anywhere}
li{overflow-wrap:anywhere}
"""
NAMES = {"frontier": "Quality against throughput", "tokens": "Quality against tokens spent"}


def page(report: Report, pictures: Mapping[str, bytes], title: str, made: str) -> str:
    """made: what a reader is told of when and from where."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(made)}</p>']
    for name, data in pictures.items():
        coded = base64.b64encode(data).decode()
        told = escape(NAMES[name])
        parts += [f"<h2>{told}</h2>", f'<img alt="{told}" src="data:image/png;base64,{coded}">']
    parts += _tasks(report) + _fidelity(report) + _speed(report) + _generations(report)
    parts.append("<h2>Checkpoints</h2>")
    parts.append('<p class="note">Green: Mamba; grey: attention; blue: attention in a window. First layer left.</p>')
    for entry in report.entries:
        parts += _card(entry)
    if report.problems:
        parts += ["<h2>Not read</h2>", "<ul>", *(f"<li>{escape(problem)}</li>" for problem in report.problems), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    safe = (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';img-src data:;style-src 'unsafe-inline'\">"
    )
    top = f'<!doctype html><html lang="en"><head>{head}{safe}<title>{escape(title)}</title><style>{STYLE}</style></head>'
    return f"{top}<body>{''.join(parts)}</body></html>\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tasks(report: Report) -> list[str]:
    tasks = report.tasks
    if not tasks:
        return []
    rows, limited = [], False
    for entry in report.entries:
        if not entry.tasks:
            continue
        cells = [entry.name]
        for task in tasks:
            told = entry.tasks.get(task)
            if told is None:
                cells.append("")
                continue
            limited |= told["limited"]
            spread = "" if told["low"] is None else f" ({told['low']:.3f} to {told['high']:.3f})"
            cells.append(f"{told['value']:.3f}{spread}{'*' if told['limited'] else ''}")
        rows.append(cells)
    metrics = {task: next(e.tasks[task]["metric"].split(",")[0] for e in report.entries if task in e.tasks) for task in tasks}
    note = f"In brackets: {LEVEL:.0%} interval over documents." + (" * limited run." if limited else "")
    columns = ["checkpoint", *(f"{task}, {metrics[task]}" for task in tasks)]
    return ["<h2>Tasks</h2>", _table(columns, rows), f'<p class="note">{escape(note)}</p>']


def _fidelity(report: Report) -> list[str]:
    rows = [
        [
            e.name,
            *(f"{e.fidelity[key]:.4f}" for key in ("reverse_kl", "forward_kl", "agreement", "perplexity")),
            e.fidelity["data"],
        ]
        for e in report.entries
        if e.fidelity is not None
    ]
    columns = ["checkpoint", "reverse KL", "forward KL", "agreement", "perplexity", "text"]
    return ["<h2>Fidelity to the teacher</h2>", _table(columns, rows)] if rows else []


def _speed(report: Report) -> list[str]:
    timed = [entry for entry in report.entries if entry.steps]
    if not timed:
        return []
    cells = sorted({(step["context"], step["batch"]) for entry in timed for step in entry.steps})
    rows = [[e.name, *(_count(e.throughput(*cell)) for cell in cells)] for e in timed]
    columns = ["checkpoint", *(f"batch {batch} after {context:,}" for context, batch in cells)]
    machines = ", ".join(sorted({entry.machine for entry in timed}))
    return ["<h2>Decoding, tokens a second</h2>", _table(columns, rows), f'<p class="note">{escape(machines)}</p>']


def _generations(report: Report) -> list[str]:
    rows = [
        [e.name, f"{g['prompt']:,} in, {g['new']:,} out", str(g["batch"]), _count(g.get("tokens_per_second"))]
        for e in report.entries
        for g in e.generations
    ]
    columns = ["checkpoint", "tokens", "batch that fits", "tokens a second"]
    return ["<h2>Whole generations</h2>", _table(columns, rows)] if rows else []


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}"


def _card(entry: Entry) -> list[str]:
    parts = [f"<h3>{escape(entry.name)}</h3>"]
    if entry.shape is None:
        return [*parts, f'<p class="note">{escape(str(entry.path))}: results without their checkpoint</p>']
    shape = entry.shape
    kinds = {"linear_attention": "m", "sliding_attention": "w"}
    blocks = "".join(f'<i class="{kinds.get(kind, "a")}"></i>' for kind in shape.kinds)
    mixers = shape.kinds.count("linear_attention")
    kind = f" ({escape(str(shape.mixer['kind']))})" if shape.mixer else ""
    layers = f"{mixers} of {len(shape.kinds)} layers Mamba"
    told = (
        f"{layers}{kind}, {shape.parameters['total'] / 1e6:,.0f} M parameters; a sequence keeps "
        f"{shape.at_long / 2**20:,.1f} MiB at 32k tokens (all attention: {shape.teacher_at_long / 2**20:,.1f} MiB)"
    )
    parts += [f'<div class="strip" role="img" aria-label="{layers}">{blocks}</div>', f"<p>{told}</p>"]
    steps = []
    for step in entry.lineage:
        spent = f", {step['tokens']:,} tokens seen" if step.get("tokens") else ""
        made = f" ({escape(str(step['command']))}{spent})" if step.get("command") else ""
        steps.append(f"<li>{escape(str(step['checkpoint']))}{made}</li>")
    return [*parts, f'<ol class="note">{"".join(steps)}</ol>']
