"""A coverage-guided fuzz run over every reader of a checkpoint.

    pip install atheris
    python -m tests.reliability.fuzz CORPUS [-max_total_time=600]

CORPUS is a folder of inputs; one that is empty gets the files of a tiny hybrid and what earlier
runs kept (corpus.zip, which CI reads too) as seeds. An input's first byte says which file of the
hybrid the rest of it takes the place of. JSON, a safetensors header too, has its values replaced as
often as its bytes, since few changed bytes are JSON still. What is neither an answer nor an
InputError stops the run with a stack.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hybridize"]):
    from tests.damage import FILES, KEPT, ODD, WEIGHTS, places, put, read_all, replaced, subject


def twisted(text: bytes, rng: random.Random) -> bytes:
    """JSON with one to three of its values replaced, moved elsewhere or gone. ValueError where it
    is no JSON."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        there = places(value)
        place = rng.choice(there)
        at = value
        for key in place[:-1]:
            at = at[key]
        if place and rng.random() < 0.2:
            del at[place[-1]]
        elif place and isinstance(at, dict) and rng.random() < 0.1:
            at[rng.choice(["", "x", "__class__", "../x", str(place[-1]) * 2])] = at.pop(place[-1])
        else:
            other = value
            for key in rng.choice(there):
                other = other[key]
            value = put(value, place, json.loads(json.dumps(rng.choice([other, *ODD]))))
    return json.dumps(value).encode()


def mutate(data: bytes, most: int, seed: int, seeds: list[bytes]) -> bytes:
    """A neighbour of an input, or of a seed where the input has no structure to change."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, most)
    for given in (data, rng.choice(seeds)):
        head, body = given[:1], given[1:]
        with contextlib.suppress(ValueError, RecursionError):
            if head and FILES[head[0] % len(FILES)] != WEIGHTS:
                return (head + twisted(body, rng))[:most]
            end = 8 + int.from_bytes(body[:8], "little")
            header = twisted(body[8:end], rng)
            return (head + len(header).to_bytes(8, "little") + header + body[end:])[:most]
    return data


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    place = subject(Path(tempfile.mkdtemp(dir="/dev/shm")))
    home = place / "h2"
    seeds = [bytes([number]) + (home / name).read_bytes() for number, name in enumerate(FILES)]
    if not any(corpus.iterdir()):
        with zipfile.ZipFile(KEPT) as kept:
            kept.extractall(corpus)
        for number, content in enumerate(seeds):
            (corpus / f"seed-{number}").write_bytes(content)

    def one(data: bytes) -> None:
        with replaced(home, data):
            read_all(home)

    # whole files all reach the same code: without keep_seed libFuzzer would keep the shortest alone
    flags = ["-keep_seed=1", "-len_control=0", f"-max_len={2 * max(map(len, seeds))}"]
    atheris.Setup([sys.argv[0], str(corpus), *flags, *sys.argv[2:]], one, custom_mutator=functools.partial(mutate, seeds=seeds))
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
