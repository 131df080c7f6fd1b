"""Writes docs/reference/families.md: every family, what its attention has, and what becomes of it,
by the code that decides.

PYTHONPATH=. python docs/families.py [OUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.surgery.features import features
from tests.families import FAMILY, make_family

HEAD = """# Supported families

The table shows what `replace` makes of each family's attention. `python docs/families.py` writes it
from the code that decides, on tiny random models of the real classes (`tests/families.py`). In all
families `q_proj` becomes C, `k_proj` becomes B, `v_proj` becomes x and `o_proj` becomes `out_proj`,
KV heads are repeated per query head, and RoPE is dropped. Another tensor in an attention layer, a
family that is not listed, or RoPE of type longrope is refused by name before anything is written.
All families pass the same tests: cached, padded, packed, with beam search, and with gradient
checkpointing (`tests/test_families.py`).

| teacher | feature -> what becomes of it |
|---|---|
"""
PAGE = Path(__file__).parent / "reference/families.md"
EVERYWHERE = ("RoPE (default)", "query heads on")  # the same for all families, and said above the table


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
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(table())
