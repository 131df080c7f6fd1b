"""A day's chain in miniature: many commands in a row, two at a time, on the embedded teacher.

    python -m tests.reliability.load [--commands 200] [--workers 2]

Looks for what grows: peak memory of a kind of command from its first runs to its last, files that
nobody asked for, processes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from tests.reliability.cases import CASES, prepare
from tests.reliability.kill import tree
from tests.reliability.server import Server

CHAIN = (
    "replace", "distill", "score-loo", "score-mmr", "score-restore", "eval", "eval --fidelity", "export granite", "export gguf",
    "generate", "report",
)  # fmt: skip
GROWTH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    cases = {case.name: case for case in CASES}
    peaks: dict[str, list[float]] = defaultdict(list)
    wrong: list[str] = []
    began, before = time.monotonic(), len(psutil.Process().children(recursive=True))

    def work(home: Path, first: Server, count: int) -> None:
        prepare(first, home)
        known: dict[str, Any] = {}
        for number in range(count):
            case = cases[CHAIN[number % len(CHAIN)]]
            done = first.run([*case.argv, "--overwrite"], home)
            if done["rc"] or done["left"]:
                wrong.append(f"{case.name}: rc {done['rc']}, left {done['left']}: {done['stderr'][-300:]}")
                continue
            peaks[case.name].append(done["peak"])
            made = case.look(home / case.output)
            if known.setdefault(case.name, made) != made:
                wrong.append(f"{case.name} gave something else the second time")
            files = {name for name in tree(home) if not name.startswith("out/")}  # which several write in turn
            if number == len(CHAIN) - 1:
                known["files"] = files
        if files != known["files"]:
            wrong.append(f"files: {sorted(files ^ known['files'])[:5]}")

    home = Path(tempfile.mkdtemp())
    servers = [Server() for _ in range(args.workers)]
    threads = [
        threading.Thread(target=work, args=(home / str(i), server, args.commands // args.workers))
        for i, server in enumerate(servers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers:
        server.close()
    shutil.rmtree(home)
    after = len(psutil.Process().children(recursive=True))
    print(f"{sum(map(len, peaks.values()))} commands in {time.monotonic() - began:.0f} s, {args.workers} at a time")
    for name, seen in peaks.items():
        third = max(1, len(seen) // 3)
        early, late = statistics.median(seen[:third]), statistics.median(seen[-third:])
        print(f"{name:18} {len(seen):3} runs, peak {early:6.0f} MiB early, {late:6.0f} MiB late")
        if late > GROWTH * early:
            wrong.append(f"{name} grew from {early:.0f} to {late:.0f} MiB")
    print(f"processes left: {after - before}")
    for said in wrong:
        print("WRONG", said)
    sys.exit(bool(wrong or after != before))


if __name__ == "__main__":
    main()
