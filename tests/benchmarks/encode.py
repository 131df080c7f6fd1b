"""Encoding of rows against its floor: each conversation rendered once by its chat template and
tokenised once.

    python -m tests.benchmarks.encode TOKENIZER_DIR ROWS.jsonl [--rows 4000] [--repeats 5]

One process, one thread for each; ours and the floor take turns, so both see the same machine.
Prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from hybridize.data.encode import Encoder
from hybridize.data.forms import Conversation, read_form
from hybridize.data.rows import read_rows
from hybridize.runtime.loading import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows")
    parser.add_argument("--rows", dest="count", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer, rows = load_tokenizer(args.tokenizer), read_rows(args.rows, args.count)
    loaded = [(row, rows.where(at)) for at, row in enumerate(rows)]
    times: dict[str, list[float]] = {"floor": [], "ours": []}
    tokens = {}
    for _ in range(args.repeats):
        begin = time.perf_counter()
        counted = 0
        for row, where in loaded:
            form, _ = read_form(row, where)
            assert isinstance(form, Conversation)
            text = tokenizer.apply_chat_template(form.messages, tokenize=False, **form.kwargs)
            counted += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        times["floor"].append(time.perf_counter() - begin)
        tokens["floor"] = counted
        encoder, begin = Encoder(tokenizer, "assistant"), time.perf_counter()
        tokens["ours"] = sum(len(encoder.read(row, where).ids) for row, where in loaded)
        times["ours"].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.2f} s, {len(loaded) / value:,.0f} rows/s, {tokens[name] / value:,.0f} tokens/s")
    print(f"ours / floor: {medians['ours'] / medians['floor']:.2f}")


if __name__ == "__main__":
    main()
