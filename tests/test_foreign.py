"""Foreign runtimes that die, hang or print nonsense while an export is verified: one sentence, and
the file is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridize.export import verify
from hybridize.export.formats import FORMATS
from tests.conftest import Runner, hybrid, make_tokenizer

RUNTIMES = {
    "kills itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV on this CPU ("),
    "hangs": ("import time; time.sleep(600)", "gave no answer in 3 s on this CPU ("),
    "prints garbage": (
        "import atexit, sys; print(chr(0xfffd) * 99); atexit._clear(); open(__import__('json').load(sys.stdin)['answer'], 'w')"
        ".write('nonsense'); __import__('os')._exit(0)",
        "ended without a readable answer",
    ),
    "ends": ("import os; os._exit(0)", "ended without a readable answer"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    hybrid("ammam", "mamba2", vocab_size=260).save_pretrained(tmp_path / "h")
    make_tokenizer().save_pretrained(tmp_path / "h")
    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return tmp_path


@pytest.mark.parametrize("what", RUNTIMES)
def test_what_it_does_is_told_and_the_file_kept(place: Path, cli: Runner, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, says = RUNTIMES[what]
    monkeypatch.setattr(verify, "PATIENCE", 3.0 if what == "hangs" else 120.0)
    (place / "packages/llama_cpp.py").write_text(code)
    told = json.loads(cli("export", "h", "--format", "gguf", "-o", "out", "--json"))
    assert says in told["unverified"]
    assert "llama.cpp (llama-cpp-python" in told["unverified"]
    assert f"warning: out is written but not verified: {told['unverified']}" in cli.stderr
    assert (place / "out" / "h-F16.gguf").stat().st_size > 1000
    assert says in (place / "out/README.md").read_text()
    assert says in cli.fails("export", "h", "--format", "gguf", "-o", "no", "--verify", code=1)
    assert not (place / "no").exists()


def test_what_it_says_is_wrong_is_no_crash(place: Path, cli: Runner) -> None:
    (place / "packages/llama_cpp.py").write_text("raise ValueError('no such architecture')")
    said = cli.fails("export", "h", "--format", "gguf", "-o", "out", code=1)
    assert "(ValueError: no such architecture); not exported" in said
    assert not (place / "out").exists()


def test_a_runtime_that_is_not_there_is_asked_for_in_vain(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS["gguf"], "missing", lambda: "llama-cpp-python is not installed")
    assert "--verify: llama-cpp-python is not installed" in cli.fails(
        "export", "h", "--format", "gguf", "-o", "out", "--verify"
    )
    cli("export", "h", "--format", "gguf", "-o", "out")
    assert "not verified: llama-cpp-python is not installed" in cli.stdout
