"""Kills every writing command at many points of its run and looks at what is left.

    python -m tests.reliability.kill [--points 50] [--commands replace distill ...] [--json FILE]

Half of the points are touches of the file system, evenly spaced over all that an undisturbed run
makes; the others are moments, evenly spaced over its time. Signals take turns. After each: inputs
are byte for byte what they were, the output is absent, the old one or complete; and after a second
run with the same arguments it is complete, the same as the undisturbed run's, with no file beside
it that that does not leave. Each command starts from a directory made afresh.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.reliability.cases import CASES, Case, prepare
from tests.reliability.server import Server

INPUTS = ("teacher", "h2", "tasks")
SIGNALS = ("KILL", "TERM", "INT")
ENDS = {"KILL": (-9,), "TERM": (130, -15), "INT": (130, -2)}  # or 0, where the run was over before


class Broken(AssertionError):
    """A promise that was not kept."""


def tree(place: Path) -> dict[str, str]:
    """Every file and its hash, every empty directory."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[name] = "empty directory"
    return found


def insist(what: bool, said: str) -> None:
    if not what:
        raise Broken(said)


class Trial:
    """One command: a template of its working directory, and what an undisturbed run makes of it."""

    def __init__(self, server: Server, case: Case, template: Path, place: Path, old: bool = False) -> None:
        self.server, self.case, self.place = server, case, place
        self.template = template
        self.fresh()
        self.plain = server.run(list(case.argv), place)
        insist(self.plain["rc"] == 0, f"the undisturbed run failed: {self.plain['stderr'][-2000:]}")
        self.wanted = case.look(place / case.output)
        self.names = set(tree(place))
        self.fresh()
        self.plain |= {"seconds": server.run(list(case.argv), place)["seconds"]}  # of a server that is warm
        if old:  # from here on there is something in the way
            self.template = place.with_name(place.name + "-old")
            shutil.copytree(place, self.template)
        self.inputs = tree(self.template)

    def fresh(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.template, self.place)

    def output(self) -> Any:
        """What complete outputs share, or None where there is none."""
        path = self.place / self.case.output
        return self.case.look(path) if path.exists() else None

    def look(self) -> bool:
        """Right after a fault: whether the output is complete."""
        home, after = self.case.output.split("/")[0], tree(self.place)
        for name, digest in self.inputs.items():
            own = name == self.case.output or (home not in INPUTS and name.startswith(f"{home}/"))
            insist(own or after.get(name) == digest, f"input {name} changed")
        try:
            made = self.output()
        except Exception as error:
            raise Broken(f"the output is there and incomplete: {error!r}") from error
        for name in set(after) - self.names:
            temporary = any(part.startswith(".") and ".tmp-" in part for part in Path(name).parts)
            unfinished = any(part in self.case.unfinished for part in Path(name).parts)
            insist(temporary or unfinished or name in (home, str(Path(self.case.output).parent)), f"{name} lies there")
        insist(made is None or made == self.wanted, "the output differs from the undisturbed run's")
        return made is not None

    def again(self) -> None:
        """A second run with the same arguments."""
        second = self.server.run([*self.case.argv, *self.case.again], self.place)
        complete = second["rc"] == 2 and "exists" in second["stderr"] and self.output() is not None
        insist(second["rc"] == 0 or complete, f"the second run ended with {second['rc']}: {second['stderr'][-600:]}")
        insist(self.output() == self.wanted, "the second run's output differs from the undisturbed run's")
        rest = set(tree(self.place)) ^ self.names
        insist(not rest, f"after the second run: {sorted(rest)[:5]} left or missing")
        insist(not second["left"], f"the second run left {second['left']} in TMPDIR")

    def strike(self, **fault: Any) -> dict[str, Any]:
        self.fresh()
        found = self.server.run(list(self.case.argv), self.place, **fault)
        insist(not found["hung"], "it hung")
        insist("Traceback" not in found["stderr"], f"a traceback: {found['stderr'][-1500:]}")
        return found


def points(count: int, events: int, seconds: float) -> list[dict[str, Any]]:
    touches = max(1, min(events, count // 2))
    found: list[dict[str, Any]] = [{"event": 1 + round(i * (events - 1) / max(1, touches - 1))} for i in range(touches)]
    moments = count - len(found)
    found += [{"after": seconds * (i + 0.5) / moments} for i in range(moments)]
    return [{**point, "signal": SIGNALS[i % len(SIGNALS)]} for i, point in enumerate(found)]


def kill(trial: Trial, count: int) -> dict[str, Any]:
    """Every point; what broke, and how many runs ended how."""
    ends: dict[str, int] = {}
    broken, left = [], 0
    for point in points(count, trial.plain["events"], trial.plain["seconds"]):
        try:
            found = trial.strike(**point)
            insist(found["rc"] in (0, *ENDS[point["signal"]]), f"ended with {found['rc']}: {found['stderr'][-600:]}")
            ends[str(found["rc"])] = ends.get(str(found["rc"]), 0) + 1
            left += trial.look()
            trial.again()
        except Broken as error:
            broken.append({**point, "said": str(error)})
    return {"points": count, "events": trial.plain["events"], "ends": ends, "complete": left, "broken": broken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--commands", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    server, failed, table = Server(), 0, {}
    with tempfile.TemporaryDirectory() as home:
        template = Path(home) / "template"
        prepare(server, template)
        cases = [(case, old) for case in CASES if case.name in args.commands for old in (False, True)]
        for number, (case, old) in enumerate(cases):
            began = time.monotonic()
            told = case.overwriting() if old else case
            try:
                trial = Trial(server, told, template, Path(home) / f"work{number}", old)
                found = kill(trial, args.points)
            except Broken as error:
                found = {"broken": [{"said": str(error)}], "ends": {}, "events": 0, "complete": 0}
            table[told.name] = found
            failed += len(found["broken"])
            seconds = time.monotonic() - began
            said = f"{found['events']:5} touches, ends {found['ends']}, {found['complete']} complete, {seconds:.0f} s"
            kept = f"{len(found['broken'])} BROKEN" if found["broken"] else "all kept"
            print(f"{told.name:34} {said} {kept}", flush=True)
            for entry in found["broken"][:6]:
                print("   ", entry, flush=True)
    server.close()
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
