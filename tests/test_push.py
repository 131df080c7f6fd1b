"""The card as a hub reads it, and uploads to a stub of the hub's HTTP interface on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.export.card import model_card
from hybridize.export.origin import read_origin
from tests.conftest import Runner, make_place
from tests.test_gate import figured, result


class Hub(BaseHTTPRequestHandler):
    """Knows one user, makes repositories, and takes commits whose files come in the request."""

    server: Any

    def answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.startswith("/api/whoami-v2"):
            self.answer({"name": "somebody", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        else:
            self.answer({"id": "somebody/h1", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            self.answer({"url": f"{self.server.address}/somebody/h1", "id": "somebody/h1", "name": "somebody/h1"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path and not self.server.full:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            where = f"{self.server.address}/somebody/h1/commit/{'1' * 40}"
            self.answer({"success": True, "commitUrl": where, "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self.answer({"error": "the disk is full"}, 507)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files, server.calls, server.made, server.full, server.cards = "", {}, [], None, False, []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_place(tmp_path, ("replace", "teacher", "--indices", "1", "--no-calibrate", "-o", "h1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_export_is_uploaded_whole(place: Path, cli: Runner, hub: Any) -> None:
    told = json.loads(cli("export", "h1", "-o", "out", "--no-verify", "--push-to-hub", "somebody/h1", "--private", "--json"))
    assert told["pushed"] == f"{hub.address}/somebody/h1"
    assert hub.cards == [(place / "out/README.md").read_text()]
    assert (hub.made["name"], hub.made.get("private", hub.made.get("visibility") == "private")) == ("h1", True)
    assert set(hub.files) == {file.name for file in (place / "out").iterdir()}
    for name, content in hub.files.items():
        assert content == (place / "out" / name).read_bytes()


def test_what_the_hub_refuses_is_told_before_or_after_the_work(
    place: Path, cli: Runner, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--private requires --push-to-hub" in cli.fails("export", "h1", "-o", "out", "--private")
    assert "is not a valid repository name" in cli.fails("export", "h1", "-o", "out", "--push-to-hub", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "not logged in to the hub" in cli.fails("export", "h1", "-o", "out", "--push-to-hub", "somebody/h1")
    assert not (place / "out").exists()
    assert not hub.calls
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.full = True
    said = cli.fails("export", "h1", "-o", "out", "--no-verify", "--push-to-hub", "somebody/h1", code=1)
    assert "out is written, but could not be uploaded to somebody/h1" in said
    assert (place / "out/config.json").exists()


def test_the_card_is_one_that_a_hub_reads(place: Path, cli: Runner) -> None:
    """Results as a model-index, the teacher's beside them for people; licence and base model where
    they are known."""
    (place / "teacher/README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    eval_dir = place / "h1/eval"
    eval_dir.mkdir()
    right = {"exact_match__strict-match": [0.0] * 4, "exact_match__flexible-extract": [1.0, 0.0, 1.0, 1.0]}
    found = {**figured(**right), "format": 1, "limited": True, "groups": {"g": {"tasks": ["t"], "figures": {"acc,none": 0.5}}}}
    (eval_dir / "results.json").write_text(json.dumps(found))
    (eval_dir / "baseline.json").write_text(
        json.dumps({**result([1.0] * 4), "format": 1, **figured(**{**right, "exact_match__strict-match": [1.0] * 4})})
    )
    fidelity = {"reverse_kl": 0.08, "agreement": 0.9, "tokens": 2048, "settings": {"data": "held.txt"}}
    (eval_dir / "fidelity.json").write_text(json.dumps(fidelity))
    manifest = json.loads((place / "h1/hybridize.json").read_text())
    manifest["data"] = [{"path": "/home/someone/traces.jsonl", "rows": 4}, {"path": "open/set", "rows": 2}]
    source = CheckpointReader(place / "h1")
    origin = read_origin(source, manifest, "org/teacher-1b")
    text = model_card(source, manifest, "", origin=origin, name="h1-hf")
    card = ModelCard(text)
    assert card.data.base_model == "org/teacher-1b"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["traces.jsonl", "open/set"]
    assert card.data.library_name == "transformers"
    assert "hybridize" in card.data.tags
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results == {
        ("g", "acc"): 0.5, ("t", "exact_match (strict-match)"): 0.0, ("t", "exact_match (flexible-extract)"): 0.75,
    }  # fmt: skip
    assert "| t | exact_match_ strict-match | 0.0000 | 1.0000 | 4 (limited) |" in card.content
    assert "reverse KL 0.0800 nats per token, top-1 agreement 90.0%" in card.content
    assert "/home/someone" not in text
    assert str(place) not in text
    cli("export", "h1", "-o", "out", "--no-verify", "--base-model", "org/teacher-1b", "--license", "mit")
    assert ModelCard.load(place / "out/README.md").data.license == "mit"
    assert "is not a hub id" in cli.fails("export", "h1", "-o", "no", "--base-model", "just-a-name")


def test_a_card_without_anything_known_says_so(place: Path) -> None:
    source = CheckpointReader(place / "h1")
    card = ModelCard(model_card(source, json.loads((place / "h1/hybridize.json").read_text()), ""))
    assert "This model has not been evaluated yet" in card.content
    assert "unknown to hybridize" in card.content
    assert card.data.base_model is None
    assert "have not been trained" in card.content
