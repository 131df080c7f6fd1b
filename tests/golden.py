"""Hashes of what the commands write, to compare one version of the code with another on one
machine:

    python -m tests.golden before.json                      # in the old checkout
    python -m tests.golden after.json --against before.json # in the new one

It runs `replace` for each family and mixer, three scorers, a two-step `distill` of each stage and
each export, on tiny random teachers. Of safetensors files it hashes tensors by name, so that the
order of writing does not count; of JSON files all but what names a place, a time, a version or the
code itself. It also lists the keys of each `--json` result. No test runs this: other processors
round otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hybridize.commands import app
from safetensors import safe_open
from typer.testing import CliRunner

from tests.conftest import SHAPES, make_teacher, make_tokenizer, write_traces
from tests.families import FAMILY, make_family

UNSTABLE = {
    "seconds",
    "version",
    "libraries",
    "parent",
    "root",
    "hash",
    "files",
    "tensors",
    "auto_map",
    "seal",
    "transformers_version",
    "run",
}


def run(*arguments: object) -> dict[str, Any]:
    """The `--json` result of a command that must not fail."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (arguments, result.stdout, result.stderr, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def stable(value: Any) -> Any:
    """A JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: stable(part) for key, part in sorted(value.items()) if key not in UNSTABLE}
    return [stable(part) for part in value] if isinstance(value, list) else value


def digest(folder: Path) -> dict[str, str]:
    """File to hash, for each weight file and JSON file of a folder."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name).contiguous()
                    told = (
                        f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.view(torch.uint8).numpy().tobytes()
                        if tensor.ndim
                        else str(tensor).encode()
                    )
                    found[f"{path.relative_to(folder)}:{name}"] = hashlib.sha256(told).hexdigest()[:16]
        elif path.suffix == ".json" and not path.name.startswith("tokenizer"):
            text = json.dumps(stable(json.loads(path.read_text())), sort_keys=True)
            found[str(path.relative_to(folder))] = hashlib.sha256(text.encode()).hexdigest()[:16]
        elif path.suffix == ".gguf":
            found[path.suffix] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def keys(value: Any, place: str = "") -> set[str]:
    """Every path of keys in a JSON object."""
    if not isinstance(value, dict):
        return set()
    return {f"{place}{key}" for key in value} | {found for key, part in value.items() for found in keys(part, f"{place}{key}.")}


def everything() -> dict[str, Any]:
    """Runs the commands in the current folder; step to hashes and to the keys of its result."""
    found: dict[str, Any] = {}

    def step(name: str, output: str | Path, *command: object) -> None:
        result = run(*command, *(["-o", output] if command[0] != "eval" else []))
        place = Path(output)
        hashes = (
            digest(place)
            if place.is_dir()
            else {
                "file": hashlib.sha256(json.dumps(stable(json.loads(place.read_text())), sort_keys=True).encode()).hexdigest()[
                    :16
                ]
            }
        )
        found[name] = {"hashes": hashes, "keys": sorted(k for k in keys(result) if not k.startswith(("features.", "fates.")))}
        print(name, flush=True)

    write_traces(Path("traces.jsonl"), 40)
    for family in FAMILY:
        place = make_family(Path("families") / family, family, vocab_size=260)
        make_tokenizer().save_pretrained(place)
        for kind in SHAPES:
            shape = ["--d-state", 4] if kind == "mamba" else []
            for parts in ("", "z,conv,decay,scale", "z,conv,decay,scale,out"):
                fit = ["--calibrate", "traces.jsonl", "--calibration-parts", parts] if parts else ["--no-calibrate"]
                name = f"replace {family} {kind} {parts or 'plain'}"
                step(name, f"out/{name.replace(' ', '-')}", "replace", place, "--indices", "1,2", "--mixer", kind, *shape, *fit)
    make_teacher(Path("teacher"))
    for score, more in {
        "score-loo": ["--metric", "kl", "--windows", 4, "--seq-len", 64, "--batch-size", 2],
        "score-mmr": ["--steps", 3, "--batch-size", 2, "--seq-len", 64],
        "score-mmr all": ["--train", "all", "--steps", 3, "--batch-size", 2, "--seq-len", 64],
        "score-restore": ["--steps", 3, "--batch-size", 2, "--seq-len", 64, "--windows", 4],
    }.items():
        step(score, f"out/{score.replace(' ', '-')}.json", score.split()[0], "teacher", "--data", "traces.jsonl", *more)
    for kind in SHAPES:
        step(f"replace {kind}", f"h2-{kind}", "replace", "teacher", "--indices", "1,2", "--mixer", kind)
        short = ["--steps", 2, "--batch-size", 2, "--seq-len", 64, "--data", "traces.jsonl", "--save-every", 0]
        for stage, more in {
            "distill": [], "align": ["--stage", "align"], "mixture": ["--loss", "forward-kl=.5,ce=.5", "--micro-batch-size", 1],
            "mixers": ["--train", "mixers", "--schedule", "wsd", "--gradient-checkpointing"],
        }.items():  # fmt: skip
            step(f"distill {kind} {stage}", f"out/kd-{kind}-{stage}", "distill", f"h2-{kind}", *short, *more)
    for form, more in {"hf": [], "granite": [], "gguf": ["--outtype", "f32"]}.items():
        step(f"export {form}", f"out/export-{form}", "export", "h2-mamba2", "--format", form, "--no-verify", *more)
    step("export hf mamba", "out/export-hf-mamba", "export", "h2-mamba", "--format", "hf", "--no-verify")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    output, against = args.output.resolve(), args.against and json.loads(args.against.read_text())
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        found = everything()
    output.write_text(json.dumps(found, indent=1))
    if against is None:
        return
    other = [name for name in {**against, **found} if against.get(name) != found.get(name)]
    for name in other:
        before, after = against.get(name, {}), found.get(name, {})
        for part in ("hashes", "keys"):
            old, new = (
                dict.fromkeys(side.get(part, ())) | dict(side.get("hashes", {}))
                if part == "hashes"
                else dict.fromkeys(side.get(part, ()))
                for side in (before, after)
            )
            changed = [key for key in {**old, **new} if (key in old, old.get(key)) != (key in new, new.get(key))]
            if changed:
                print(f"{name}: {part} differ: {', '.join(changed[:8])}")
    print(f"{len(found)} steps, {len(other)} differ")
    raise SystemExit(bool(other))


if __name__ == "__main__":
    main()
