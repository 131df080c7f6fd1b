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
    from tests.damage import read_all, subject

FILES = (
    "config.json", "hybridize.json", "model.safetensors.index.json", "scores/loo.json", "eval/results.json",
    "model-00001-of-00001.safetensors",
)  # fmt: skip


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    place = subject(Path(tempfile.mkdtemp(dir="/dev/shm")))
    home = place / "h2"
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
