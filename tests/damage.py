"""Ways to damage a checkpoint, and all of our readers in a row."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hybridize.anatomy import anatomy, lineage, rankings
from hybridize.checkpoint.integrity import verify
from hybridize.checkpoint.json_files import read_json
from hybridize.checkpoint.manifest import read_manifest, root_of
from hybridize.checkpoint.reader import CheckpointReader, carried_files
from hybridize.checkpoint.scores import find_scores, read_scores
from hybridize.evaluation.gate import compare
from hybridize.evaluation.results import read_results
from hybridize.surgery.teacher import check_whole, read_teacher
from tests.conftest import make_place

WEIGHTS = "model-00001-of-00001.safetensors"
FILES = ("config.json", "hybridize.json", "model.safetensors.index.json", "scores/loo.json", "eval/results.json", WEIGHTS)
KEPT = Path(__file__).parent / "reliability/corpus.zip"  # inputs that a fuzz run has found to reach code that others do not
ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 2**31, 2**70, -(2**70), 1.5, 1e308, "", "x", "../x", "\x00", "1" * 500, [], [1], ["x"] * 50, {},
    {"x": 1}, {"kind": "mamba2"}, {"rope_type": "yarn"}, [[[[]]]], {"": None}, "linear_attention", ["linear_attention"] * 4,
]  # fmt: skip


def subject(place: Path) -> Path:
    """PLACE/teacher, and PLACE/h2, a hybrid of it with scores and results."""
    small = ("--data", "traces.jsonl", "--seq-len", 32, "--windows", 2)
    make_place(
        place,
        ("replace", "teacher", "--indices", "1,2", "--calibrate", "traces.jsonl", "--calibration-tokens", 400, "-o", "h2"),
        ("score-loo", "h2", "--metric", "kl", *small, "--teacher", "teacher"),
        ("eval", "h2", "--fidelity", "traces.jsonl", "--seq-len", 32, "--windows", 2),
    )
    scores = [{"doc": n, "hash": str(n), "score": float(n % 2)} for n in range(4)]
    task = {"metric": "acc,none", "value": 0.5, "higher_is_better": True, "documents": scores}
    results = {"format": 1, "checkpoint": "0", "settings": {"tasks": "t"}, "ran": {"dtype": "float32"}, "tasks": {"t": task}}
    (place / "h2/eval/results.json").write_text(json.dumps(results))
    return place


@contextlib.contextmanager
def replaced(home: Path, data: bytes) -> Iterator[None]:
    """An input of the fuzz run in its place: the first byte says in that of which of FILES."""
    file = home / FILES[data[0] % len(FILES)] if data else home / FILES[0]
    before = file.read_bytes()
    file.write_bytes(data[1:])
    try:
        yield
    finally:
        file.write_bytes(before)


def read_all(path: Path) -> None:
    """What commands look at before they do anything, each reader by itself; InputError is an
    answer."""
    from hybridize.errors import InputError

    def answered(step: Any) -> Any:
        try:
            return step()
        except InputError as error:
            said = str(error)
        assert said
        assert "\n" not in said.strip()
        return None

    reader = answered(lambda: CheckpointReader(path))
    answered(lambda: anatomy(read_json(path / "config.json"), str(path)))
    if reader is not None:
        answered(lambda: check_whole(reader))
        answered(lambda: read_teacher(reader))
        answered(lambda: reader.hash)
    answered(lambda: carried_files(path))
    answered(lambda: read_manifest(path))
    answered(lambda: root_of(path))
    answered(lambda: lineage(path))
    answered(lambda: rankings(path, str(path)))
    scores = find_scores(path, str(path))
    if scores is not None:
        answered(lambda: read_scores(scores))
    results = answered(lambda: read_results(path / "eval/results.json"))
    if results is not None:
        answered(lambda: compare(results, results))
    answered(lambda: verify(path))
    answered(lambda: verify(path, deep=True))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    at = value
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return value


@st.composite
def changed_json(draw: st.DrawFn, text: bytes) -> bytes:
    """One to three values replaced by odd ones, or removed."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        if place and draw(st.booleans()) and isinstance(place[-1], str):
            at = value
            for key in place[:-1]:
                at = at[key]
            del at[place[-1]]
        else:
            value = put(value, place, copy.deepcopy(draw(st.sampled_from(ODD))))
        if not isinstance(value, dict | list):
            break
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A byte flipped, a stretch cut out, doubled or overwritten, or the end gone; near the front as
    often as anywhere."""
    near = draw(st.booleans())
    at = draw(st.integers(0, min(len(data), 4000) if near else len(data)))
    how = draw(st.sampled_from(["flip", "cut", "end", "put", "twice"]))
    length = draw(st.integers(1, 64))
    if how == "flip" and at < len(data):
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if how == "cut":
        return data[:at] + data[at + length :]
    if how == "end":
        return data[:at]
    if how == "put":
        return data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at + length :]
    return data[: at + length] + data[at:]
