"""What a kill, a full disk, a directory that cannot be written to, inputs that vanish and a second
writer leave behind.

A few points each here; `python -m tests.reliability.kill` tries fifty a command, see
docs/concepts/reliability.md.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.cases import CASES, Case, checkpoint, prepare
from tests.reliability.kill import Trial, kill, tree
from tests.reliability.server import Server

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Server]:
    """A second one, to run beside the first."""
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def template(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reliability") / "template"
    prepare(server, place)
    return place


@pytest.fixture
def work(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "work"))


def told(found: dict[str, Any], code: int = 1) -> str:
    """The one sentence that a failed run says."""
    assert found["rc"] == code, found
    (line,) = [line for line in found["stderr"].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in found["stderr"]
    assert "HYBRIDIZE_DEBUG" not in line, f"not a sentence of ours: {line}"
    return line


@pytest.mark.parametrize(("name", "old", "points"), [("replace", True, 5), ("distill", False, 4), ("eval", False, 5)])
def test_killed_anywhere(server: Server, template: Path, tmp_path: Path, name: str, old: bool, points: int) -> None:
    case = BY_NAME[name].overwriting() if old else BY_NAME[name]
    found = kill(Trial(server, case, template, tmp_path / "work", old), points)
    assert found["broken"] == []
    assert sum(found["ends"].values()) == points
    assert set(found["ends"]) - {"0"}, "every run was over before it was struck"


@pytest.mark.parametrize("name", ["replace", "distill", "score-loo", "export granite", "export gguf", "generate", "demo"])
def test_a_full_disk(server: Server, work: Path, name: str) -> None:
    """A limit on the size of files, which Linux reports as a disk does that is full (EFBIG in place
    of ENOSPC)."""
    case, before = BY_NAME[name], tree(work)
    for again, limit in enumerate((100, 20_000, 300_000)):
        found = server.run([*case.argv, *(case.again if again else ())], work, file_limit=limit)
        if found["rc"] == 0:
            assert limit > 100
            case.look(work / case.output)
            break
        assert any(words in told(found) for words in ("could not be", "File too large"))
        after = tree(work)
        assert not (work / case.output).exists() or case.output.startswith("teacher")
        assert {name: digest for name, digest in after.items() if name in before} == before
        assert {Path(name).parts[0] for name in set(after) - set(before)} <= {*case.unfinished, "new", "teacher"}
    shutil.rmtree(work / "new", ignore_errors=True)
    assert server.run([*case.argv, *case.again], work)["rc"] in (0, 2)
    case.look(work / case.output)


def test_a_small_file_system_that_runs_full(server: Server, template: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    size = sum(file.stat().st_size for file in template.rglob("*") if file.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size + 1_000_000}", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs rights that this user lacks")
    try:
        work, case = Path(shutil.copytree(template, place / "work")), BY_NAME["replace"]
        before = tree(work)
        assert "could not be written: " in told(server.run(list(case.argv), work))
        assert tree(work) == before
        shutil.rmtree(work / "h2")
        assert server.run(list(case.argv), work)["rc"] == 0
        checkpoint(work / "out")
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", ["replace", "distill", "score-loo", "eval", "export gguf", "generate", "report"])
def test_a_directory_that_cannot_be_written_to(server: Server, work: Path, name: str) -> None:
    """Found before the work starts; scores of a checkpoint that is read-only go beside it instead."""
    case = BY_NAME[name]
    home = work / "teacher" if name == "score-loo" else work
    before = tree(work)
    mode = home.stat().st_mode
    home.chmod(0o555)
    try:
        found = server.run(list(case.argv), work, ordinary=True)
    finally:
        home.chmod(mode)
    if name == "score-loo":
        assert found["rc"] == 0, found
        assert (work / "scores/teacher/loo.json").exists()
        return
    assert "no write permission" in told(found, 2)
    assert found["seconds"] < 30
    assert tree(work) == before


@pytest.mark.parametrize("name", ["replace", "score-loo", "export granite", "generate"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_an_input_that_vanishes(server: Server, template: Path, tmp_path: Path, name: str, share: float) -> None:
    """Files that are open stay readable; the rest is missed by name. Nothing half-made appears."""
    case, place = BY_NAME[name], tmp_path / "work"
    gone = next(word for word in case.argv if word in ("teacher", "h2"))
    shutil.copytree(template, place)
    touches = server.run(list(case.argv), place)["events"]
    wanted = case.look(place / case.output)
    shutil.rmtree(place)
    shutil.copytree(template, place)
    found = server.run(list(case.argv), place, event=max(1, round(share * touches)), remove=str(place / gone))
    if found["rc"] == 0:
        assert case.look(place / case.output) == wanted
        return
    assert found["rc"] in (1, 2)
    (line,) = [line for line in found["stderr"].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in found["stderr"]
    assert not (place / case.output).exists()
    assert not [path for path in place.rglob("*") if ".tmp-" in path.name], line


@pytest.mark.parametrize("name", ["replace", "distill", "generate", "score-mmr"])
def test_two_writers_of_one_output(server: Server, other: Server, work: Path, name: str) -> None:
    """One wins, and the other says so."""
    case, ends = BY_NAME[name], list[dict[str, Any]]()
    threads = [threading.Thread(target=lambda s=s: ends.append(s.run(list(case.argv), work))) for s in (server, other)]
    other.run(["--version"], work)  # until it has started
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(end["rc"] for end in ends)[0] == 0, ends
    (lost,) = [end for end in ends if end["rc"] != 0]
    said = told(lost, lost["rc"])
    assert any(
        words in said for words in ("another process", "appeared while", "created by another", "exists", "unfinished run")
    )
    case.look(work / case.output)
    assert not [path for path in work.rglob("*") if ".tmp-" in path.name or path.name in case.unfinished]


def test_overwriting_what_another_has_just_made(server: Server, other: Server, work: Path) -> None:
    """--overwrite means what was there when the command began."""
    case = Case("replace", (*BY_NAME["replace"].argv, "--overwrite"), "out", checkpoint)
    assert server.run(list(case.argv), work)["rc"] == 0
    slow: list[dict[str, Any]] = []
    other.run(["--version"], work)
    first = threading.Thread(target=lambda: slow.append(server.run(["replace", "teacher", *case.argv[2:]], work)))
    first.start()
    quick = other.run(
        ["replace", "teacher", "--indices", "2", "--no-calibrate", "--no-verify", "-o", "out", "--overwrite"], work
    )
    first.join()
    assert quick["rc"] == 0, quick
    if slow[0]["rc"] != 0:  # else it was done before the quick one began
        assert "was created by another command" in told(slow[0])
        assert len(checkpoint(work / "out")) == 64
