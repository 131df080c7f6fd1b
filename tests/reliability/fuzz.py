"""A coverage-guided fuzz run over every reader of a checkpoint.

    pip install atheris
    python -m tests.reliability.fuzz CORPUS [-max_total_time=600]

CORPUS is a folder of inputs; one that is empty gets the files of a tiny hybrid as seeds. An input's first byte says which
file of the hybrid the rest of it takes the place of. What is neither an answer nor an InputError stops the run with a stack.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hybridize"]):
    from tests.conftest import make_place
    from tests.damage import read_all

FILES = (
    "config.json", "hybridize.json", "model.safetensors.index.json", "scores/loo.json", "eval/results.json",
    "model-00001-of-00001.safetensors",
)  # fmt: skip


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    place = make_place(
        Path(tempfile.mkdtemp(dir="/dev/shm")),
        ("replace", "teacher", "--indices", "1,2", "--no-calibrate", "-o", "h2"),
        (
            "score-loo",
            "h2",
            "--metric",
            "kl",
            "--data",
            "traces.jsonl",
            "--seq-len",
            32,
            "--windows",
            2,
            "--teacher",
            "teacher",
        ),
    )
    home = place / "h2"
    (home / "eval").mkdir()
    (home / "eval/results.json").write_text('{"format": 1, "tasks": {}}')
    whole = {name: (home / name).read_bytes() for name in FILES}
    if not any(corpus.iterdir()):
        for number, name in enumerate(FILES):
            (corpus / f"seed-{number}").write_bytes(bytes([number]) + whole[name])

    def one(data: bytes) -> None:
        if not data:
            return
        name = FILES[data[0] % len(FILES)]
        (home / name).write_bytes(data[1:])
        try:
            read_all(home)
        finally:
            (home / name).write_bytes(whole[name])

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
