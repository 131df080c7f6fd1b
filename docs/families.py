"""Writes docs/families.md: every family, what its attention has, and what becomes of it, by the code that decides.

PYTHONPATH=. python docs/families.py [OUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.surgery.features import features
from tests.families import FAMILY, make_family

HEAD = """# Families

What surgery makes of each family's attention, written by `python docs/families.py` from the code
that decides, on tiny random models of the real classes ([tests/families.py](../tests/families.py)).
Else `q_proj` becomes C, `k_proj` B, `v_proj` x and `o_proj` `out_proj`, key/value heads are
repeated to query heads, and RoPE ends. Another tensor in an attention layer, a family that is not
here, or RoPE of type longrope is refused by its name before anything is written. All of these pass
the same tests: cached, padded, packed, in beams, with gradient checkpointing
([tests/test_families.py](../tests/test_families.py)).

| teacher | has -> becomes |
|---|---|
"""
EVERYWHERE = ("RoPE (default)", "query heads on")  # not worth a line of each family


def table() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (family, _) in FAMILY.items():
            found = features(CheckpointReader(make_family(Path(folder) / name, name)))
            lines = [f"{has} -> {becomes}" for has, becomes in found.items() if not any(words in has for words in EVERYWHERE)]
            title = f"`{family}`" + (f" ({name})" if name != family else "")
            rows.append(f"| {title} | {'<br>'.join(lines) or 'nothing else'} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".md")).write_text(table())
