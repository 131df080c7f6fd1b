"""Output of `bench`: machine, prefill, decoding steps, break-even contexts, whole generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .output import Output

GIB = 2**30


def show_bench(out: Output, path: Path, found: dict[str, Any], names: list[str]) -> None:
    """Prints all results. names: of the checkpoints; the first is the reference of the
    comparison."""
    how = "interleaved" if found["interleaved"] else "one after the other"
    print(f"{found['machine']}, {found['settings']['dtype']}, {found['bandwidth'] / 1e12:.2f} TB/s; {how}")
    for name in names:
        print(f"  {name}: {found['checkpoints'][name]['weight_bytes'] / GIB:.2f} GiB of weights")
    _show_prefill(out, path, found["checkpoints"], names)
    _show_steps(out, found["checkpoints"], names)
    _show_break_even(found, names)
    _show_generations(out, found["checkpoints"], names)


def _show_prefill(out: Output, path: Path, checkpoints: dict[str, Any], names: list[str]) -> None:
    rows = []
    for name in names:
        for entry in checkpoints[name]["prefill"]:
            first = entry["first_token"]["ms"]
            rows.append([name, str(entry["context"]), f"{first:.1f}", f"{entry['tokens_per_second']:,.0f}"])
    if rows:
        out.table(f"{path}: prefill", ["checkpoint", "context", "ms to first token", "tokens/s"], rows)


def _show_steps(out: Output, checkpoints: dict[str, Any], names: list[str]) -> None:
    rows = []
    for name in names:
        for entry, other in zip(checkpoints[name]["steps"], checkpoints[names[0]]["steps"], strict=True):
            cell = [name, str(entry["context"]), str(entry["batch"])]
            if entry["ms"] is None:
                rows.append([*cell, "does not fit", "", "", "", f"{entry['wanted_bytes'] / GIB:.2f}", ""])
                continue
            times = "" if other["ms"] is None else f"{other['ms'] / entry['ms']:.2f}"
            rows.append([
                *cell, f"{entry['ms']:.2f}", f"{(entry['most_ms'] - entry['least_ms']) / 2 / entry['ms']:.0%}",
                f"{entry['tokens_per_second']:,.0f}", f"{entry['times_floor']:.2f}",
                f"{(entry['kv_bytes'] + entry['state_bytes']) / GIB:.2f}", times,
            ])  # fmt: skip
    if rows:
        columns = [
            "checkpoint", "context", "batch", "ms per step", "+-", "tokens/s", "x bandwidth bound", "cache GiB", "speedup",
        ]  # fmt: skip
        out.table("decoding; x bandwidth bound: time relative to only moving a step's bytes", columns, rows)


def _show_break_even(found: dict[str, Any], names: list[str]) -> None:
    from hybridize.benchmark.grid import break_even

    checkpoints = found["checkpoints"]
    for name in names[1:] if found["settings"]["contexts"] else ():
        for batch in found["settings"]["batches"]:
            at = break_even(checkpoints[name]["steps"], checkpoints[names[0]]["steps"], batch)
            which = "not faster at the longest context" if at is None else f"faster from {at:,.0f} tokens on"
            print(f"{name} against {names[0]}, batch {batch}: {which}")


def _show_generations(out: Output, checkpoints: dict[str, Any], names: list[str]) -> None:
    rows = []
    for name in names:
        for entry, other in zip(checkpoints[name]["generations"], checkpoints[names[0]]["generations"], strict=True):
            cell = [name, f"{entry['prompt']} -> {entry['new']}", str(entry["batch"])]
            if not entry["batch"]:
                rows.append([*cell, "does not fit", "", ""])
                continue
            times = f"{entry['tokens_per_second'] / other['tokens_per_second']:.2f}" if other["batch"] else ""
            rows.append([*cell, f"{entry['tokens_per_second']:,.0f}", f"{entry['times_floor']:.2f}", times])
    if rows:
        columns = ["checkpoint", "tokens", "largest batch", "tokens/s", "x bandwidth bound at mid-length", "speedup"]
        out.table("whole generations, from steps timed at six context lengths", columns, rows)
