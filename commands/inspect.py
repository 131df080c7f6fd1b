"""hybridize inspect"""

from __future__ import annotations

from typing import Any

from hybridize.checkpoint.manifest import MIXER_LAYER

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import guarded
from .shared.strip import draw_strip


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    revision: opt.Revision = None,
    *,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint's config, manifest and scores; writes nothing. Shows layout, parameters,
    memory, lineage and rankings.

    Also works on teachers and hub ids. No weights are loaded.
    """
    out = speech.output()
    from dataclasses import asdict

    from hybridize.anatomy import LONG, anatomy, config_of, lineage, rankings
    from hybridize.surgery.teacher import family_of

    path, raw = config_of(checkpoint, revision)
    family = family_of(raw, checkpoint)
    found = anatomy(raw, str(path))
    steps, scores = lineage(path), rankings(path, checkpoint)

    def human() -> None:
        mixers = found.kinds.count(MIXER_LAYER)
        kind = f", {found.mixer['kind']}" if found.mixer else ""
        print(f"{checkpoint}: {family}, {len(found.kinds)} layers, {mixers} Mamba{kind}")
        print(f"  {draw_strip(found.kinds)}")
        counts = [f"{_short(count, 1000, ['', ' k', ' M', ' B'])} {name}" for name, count in found.parameters.items()]
        print(f"  parameters: {counts[0]}: {', '.join(counts[1:])}; stored as {found.dtype}")
        state, token, after, before = (
            _short(count, 1024, [" B", " KiB", " MiB", " GiB"])
            for count in (found.state, found.kv, found.at_long, found.teacher_at_long)
        )
        print(f"  cache of a sequence: {state} plus {token} per token; {after} at {LONG} tokens ({before} with attention only)")
        for depth, step in enumerate(steps):
            print(f"  {'   ' * max(0, depth - 1)}{'`- ' if depth else ''}{step['checkpoint']}{_made(step)}")
        for entry in scores:
            order = ", ".join(map(str, entry.get("ranking", [])))
            text = entry.get("error") or f"{order} (by {entry['metric']}, in order of conversion)"
            print(f"  {entry['kind']}: {text}")

    out.result(
        {"checkpoint": checkpoint, "family": family, **asdict(found), "long": LONG, "lineage": steps, "scores": scores}, human
    )


def _short(count: float, step: int, units: list[str]) -> str:
    """A number with a unit; each unit is `step` times the one before."""
    for unit in units[:-1]:
        if count < step:
            return f"{count:.0f}{unit}" if unit == units[0] else f"{count:.1f}{unit}"
        count /= step
    return f"{count:.1f}{units[-1]}"


def _made(step: dict[str, Any]) -> str:
    """How a checkpoint of the lineage was made."""
    if step["command"] is None:
        return " (not found)" if step.get("missing") else ""
    tokens = f", {step['tokens']:,} training tokens" if step["tokens"] else ""
    return f" ({step['command']}{tokens})"
