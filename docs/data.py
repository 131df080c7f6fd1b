"""Writes the table of chat templates in docs/how-to/data.md: what is trained under each, by the
code that decides.

PYTHONPATH=. python docs/data.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from hybridize.data.encode import Encoder
from tests.chat_templates import FAMILIES, Family
from tests.test_chat_templates import byte_tokenizer, text_of

BEGIN, END = "<!-- table of docs/data.py -->\n", "<!-- end of the table -->\n"
PAGE = Path(__file__).parent / "how-to/data.md"
CHAT = {
    "messages": [
        {"role": "user", "content": "U1"}, {"role": "assistant", "content": "<think>\nT1\n</think>\n\nA1"},
        {"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"},
    ]
}  # fmt: skip


def trained(family: Family) -> tuple[list[str], int]:
    """The trained text of CHAT, answer by answer, and in how many sequences."""
    tokenizer = byte_tokenizer(family)
    parts = Encoder(tokenizer, "assistant", family.template).encode(CHAT, "the chat").parts()
    found = []
    for part in parts:
        keep = [False, *part.loss_mask, False]
        edges = [at for at in range(len(part.ids) + 1) if keep[at] != keep[at + 1]]
        found += [text_of(tokenizer, part.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found, len(parts)


def code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


def table() -> str:
    rows = ["| template | the first answer | the second answer | sequences |", "|---|---|---|---|"]
    for family in FAMILIES:
        answers, count = trained(family)
        rows.append(f"| {family.name} | {' | '.join(map(code, answers))} | {count} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The page with a fresh table."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page())
