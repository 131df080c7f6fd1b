"""Checkpoints from strangers: no code of theirs runs, nothing of ours gets out, and no one is
called."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hybridize.checkpoint.manifest import hidden
from tests.conftest import Runner, make_place

SMALL = ("--data", "traces.jsonl", "--seq-len", 16, "--limit", 12)
COMMANDS: dict[str, tuple[Any, ...]] = {
    "inspect": ("inspect", "CHECKPOINT"),
    "verify": ("verify", "CHECKPOINT"),
    "replace": (
        "replace", "CHECKPOINT", "--indices", "0", "--calibrate", "traces.jsonl", "--calibration-tokens", 200, "-o", "out",
    ),
    "distill": ("distill", "CHECKPOINT", *SMALL, "--steps", 1, "--batch-size", 1, "-o", "out"),
    "score-loo": ("score-loo", "CHECKPOINT", "--metric", "kl", *SMALL, "--windows", 1, "-o", "s.json"),
    "score-mmr": ("score-mmr", "CHECKPOINT", *SMALL, "--steps", 1, "--batch-size", 1, "--no-calibrate", "-o", "s.json"),
    "score-restore": (
        "score-restore", "CHECKPOINT", *SMALL, "--steps", 0, "--windows", 1, "--no-calibrate", "--eval-data", "traces.jsonl",
        "-o", "s.json",
    ),
    "eval": ("eval", "CHECKPOINT", "--fidelity", "traces.jsonl", "--seq-len", 16, "--windows", 1, "-o", "results"),
    "export": ("export", "CHECKPOINT", "--no-verify", "-o", "out"),
    "generate": ("generate", "CHECKPOINT", "hello", "--max-new-tokens", 2),
    "bench": (
        "bench", "CHECKPOINT", "--contexts", 8, "--batches", 1, "--steps", 1, "--repeats", 1, "--generations", "",
        "--memory", 1, "-o", "timed",
    ),
    "report": ("report", "CHECKPOINT", "-o", "page"),
}  # fmt: skip


class Marker:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def evil(path: Path, marker: Path) -> None:
    """Code wherever a checkpoint can point to some: config, tokenizer, generation settings, pickled
    weights, adapters."""
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    classes = "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    (path / "evil.py").write_text(
        f"{code}{classes}class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\n"
    )
    (path / "custom_generate").mkdir()
    (path / "custom_generate/generate.py").write_text(code)
    for name, added in (
        ("config.json", {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}),
        ("generation_config.json", {"custom_generate": "evil.py"}),
    ):
        found = json.loads((path / name).read_text()) if (path / name).exists() else {}
        (path / name).write_text(json.dumps(found | added))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "adapter_model.bin"):
        (path / name).write_bytes(pickle.dumps(Marker(marker)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = ("replace", "teacher", "--indices", "1,2", "--no-calibrate", "-o", "h2")
    return make_place(tmp_path_factory.mktemp("hostile"), command)


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(cli: Runner, command: str, checkpoint: str) -> int:
    from hybridize.commands import app
    from typer.testing import CliRunner

    arguments = [checkpoint if word == "CHECKPOINT" else str(word) for word in COMMANDS[command]]
    found = CliRunner().invoke(app, arguments)
    assert "Traceback" not in found.stderr
    assert found.exit_code in (0, 1, 2)
    return found.exit_code


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("checkpoint", ["teacher", "h2"])
def test_no_code_of_a_checkpoint_runs(place: Path, cli: Runner, command: str, checkpoint: str) -> None:
    marker = place / "ran"
    evil(place / "teacher", marker)
    evil(place / "h2", marker)
    run(cli, command, checkpoint)
    assert not marker.exists()


def test_the_marker_would_be_seen(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap itself: with --trust-remote-code the tokenizer's code does run."""
    evil(place / "teacher", place / "ran")
    pickle.loads((place / "teacher/model.pt").read_bytes())
    assert (place / "ran").exists()
    (place / "ran").unlink()
    monkeypatch.setitem(COMMANDS, "trusting", (*COMMANDS["eval"], "--trust-remote-code"))
    run(cli, "trusting", "teacher")
    assert (place / "ran").exists()


@pytest.mark.parametrize("value", ["someone/kernel", "someone/kernel:attention", {"": "someone/kernel"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_chooses_no_kernels(place: Path, cli: Runner, key: str, value: Any) -> None:
    """transformers takes an attention of the form OWNER/NAME from the hub and runs it."""
    path = place / "teacher/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    said = cli.fails("generate", "teacher", "hello", "--max-new-tokens", 2)
    assert key in said


TEMPLATES = [
    "{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}", "{{ messages.__class__.__base__ }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ lipsum.__globals__ }}", "{{ messages[0]['content'].format.__globals__ }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_reach_nothing(place: Path, cli: Runner, template: str) -> None:
    (place / "teacher/chat_template.jinja").write_text(template)
    code = run(cli, "generate", "teacher")
    assert not (place / "ran").exists()
    assert code == 0 or not (place / "out").exists()
    if code == 0:
        assert "root:" not in cli("generate", "teacher", "hello", "--max-new-tokens", 2, "--json")


def test_links_are_not_copied(place: Path, cli: Runner) -> None:
    """A link to a secret would be in the next checkpoint, and in what is published."""
    (place / "secret").write_text("the key")
    for name in ("tokenizer_secret.json", "vocab.txt", "metrics.jsonl"):
        (place / "h2" / name).symlink_to(place / "secret")
        assert "is a link out of its directory" in cli.fails("export", "h2", "--no-verify", "-o", "out")
        assert not (place / "out").exists()
        (place / "h2" / name).unlink()


def test_a_manifest_leads_to_no_hub(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, **told: Any) -> str:
        asked.append(told["local_files_only"])
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = place / "h2/hybridize.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"root": {"path": "someone/model", "hash": "x"}}))
    assert "name its location with --teacher" in cli.fails("distill", "h2", "--data", "traces.jsonl", "--steps", 1, "-o", "out")
    assert asked == [True]


def test_nobody_is_called(place: Path, tmp_path: Path) -> None:
    """Every command, in a process whose sockets and name look-ups fail and say so."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import socket
        def refuse(*told, **_):
            open({str(tmp_path / "called")!r}, "a").write(repr(told) + "\\n")
            raise OSError("no network here")
        class Socket(socket.socket):
            def connect(self, address):
                if self.family != socket.AF_UNIX:
                    refuse(address)
                return super().connect(address)
        socket.socket, socket.create_connection, socket.getaddrinfo = Socket, refuse, refuse
        """)
    )
    script = textwrap.dedent(f"""
        import sys
        from typer.testing import CliRunner
        from hybridize.commands import app
        for arguments in {[[("h2" if w == "CHECKPOINT" else str(w)) for w in words] for words in COMMANDS.values()]!r}:
            found = CliRunner().invoke(app, [*arguments, *(["--overwrite"] if "-o" in arguments else [])])
            print(arguments[0], found.exit_code, found.stderr[-300:])
            assert found.exit_code == 0, arguments
    """)
    online = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    path = os.pathsep.join([str(guard), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**online, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()


def test_secrets_stay_out_of_manifests(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "A1b2C3d4" * 4
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    (place / f"user:{secret}@host.jsonl").write_bytes((place / "traces.jsonl").read_bytes())
    data = f"user:{secret}@host.jsonl"
    cli("distill", "h2", "--data", data, "--steps", 1, "--batch-size", 1, "--seq-len", 16, "-o", "out")
    cli("replace", "teacher", "--indices", 0, "--calibrate", data, "--calibration-tokens", 200, "-o", "h1")
    cli("export", "out", "--no-verify", "-o", "made")
    for file in (*(place / "out").rglob("*"), *(place / "h1").rglob("*"), *(place / "made").rglob("*")):
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://me:pass@host/x?token=abc&a=1#f", "https://***@host/x?***"),
        ("s3://key@bucket/x", "s3://***@bucket/x"),
        ("hf_" + "x" * 30 + ".jsonl", "***.jsonl"),
        ("org/data:train", "org/data:train"),
        ("traces.jsonl", "traces.jsonl"),
        ("../task-sk-learn-on-long-documents/x.jsonl", "../task-sk-learn-on-long-documents/x.jsonl"),
    ],
)
def test_what_is_hidden(given: str, kept: str) -> None:
    assert hidden(given) == kept
    assert hidden({"a": [given, 3]}) == {"a": [kept, 3]}


def test_cards_and_pages_escape_what_they_quote(place: Path, cli: Runner) -> None:
    path = place / "h2/hybridize.json"
    bad = "<script>alert(1)</script>](http://x) `code` | --- \n# heading"
    found = json.loads(path.read_text())
    found |= {"command": bad, "data": [{"path": bad, "rows": bad}], "settings": {"note": bad}, "tokens": 3}
    path.write_text(json.dumps(found))
    cli("export", "h2", "--no-verify", "-o", "out")
    card = (place / "out/README.md").read_text()
    cli("report", "h2", "-o", "page")
    page = (place / "page/index.html").read_text()
    for text in (card, page):
        assert "<script>alert" not in text
    assert "](http" not in card
    assert "\n# heading" not in card
