"""report: what is gathered, what is shown, and that nothing on the page is more than text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hybridize.evaluation.report import _interval, collect
from tests.conftest import Runner, make_teacher


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def results(values: list[float], **changes: object) -> dict[str, object]:
    documents = [{"doc": i, "hash": str(i), "score": v} for i, v in enumerate(values)]
    task = {"metric": "acc,none", "value": sum(values) / len(values), "higher_is_better": True, "documents": documents}
    return {"format": 1, "checkpoint": "x", "settings": {}, "limited": False, "tasks": {"arc": task}} | changes


@pytest.fixture
def place(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher and a hybrid with results, fidelity and a bench."""
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    cli("replace", "--indices", "1,2", "--no-calibrate", "-q")
    for name, values in (("teacher", [1.0] * 20), ("h2", [1.0] * 12 + [0.0] * 8)):
        (tmp_path / name / "eval").mkdir()
        (tmp_path / name / "eval/results.json").write_text(json.dumps(results(values)))
    fidelity = {"reverse_kl": 0.5, "forward_kl": 0.25, "agreement": 0.75, "perplexity": 9.0, "teacher_perplexity": 8.0}
    (tmp_path / "h2/eval/fidelity.json").write_text(json.dumps(fidelity | {"settings": {"data": "some text"}}))
    step = {"context": 64, "batch": 8, "ms": 2.0, "tokens_per_second": 4000.0}
    speeds = {"teacher": 4000.0, "h2": 8125.0}
    told = {name: {"steps": [step | {"tokens_per_second": speed}], "generations": []} for name, speed in speeds.items()}
    (tmp_path / "bench").mkdir()
    paths = {"teacher": "teacher", "h2": "./h2"}
    (tmp_path / "bench/bench.json").write_text(json.dumps({"machine": "a <b>GPU</b>", "paths": paths, "checkpoints": told}))
    return tmp_path


def test_what_is_there_is_shown(place: Path, cli: Runner) -> None:
    told = json.loads(cli("report", ".", "--json"))
    assert sorted(told["checkpoints"]) == ["h2", "teacher"]
    assert told["problems"] == []
    page = Reader((place / "report/index.html").read_text())
    said = " ".join(page.said)
    for figure in ("0.600 (0.387 to 0.781)", "0.5000", "0.7500", "8,125", "4,000", "2 of 4 layers Mamba", "some text"):
        assert figure in said, figure
    strips = [tag for tag, attrs in page.tags if tag == "i" and attrs["class"] == "m"]
    assert len(strips) == 2
    assert told["pictures"] == sorted(p.stem for p in (place / "report").glob("*.png"))
    assert "exists" in cli.fails("report", ".")


def test_the_page_needs_and_runs_nothing(place: Path, cli: Runner) -> None:
    """Names, settings and machines are the files' own words: they are shown, not obeyed."""
    evil = "<script>alert(1)</script>\"'><img src=http://x onerror=1>"
    shutil.move(place / "h2", place / "h<img src=x>2")
    found = json.loads((place / "teacher/eval/results.json").read_text())
    found["tasks"] = {evil: found["tasks"]["arc"]}
    (place / "teacher/eval/results.json").write_text(json.dumps(found))
    cli("report", ".", "--title", evil, "--overwrite")
    text = (place / "report/index.html").read_text()
    page = Reader(text)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "img", "div", "table", "thead", "tbody", "tr",
        "th", "td", "i", "ol", "ul", "li",
    }  # fmt: skip
    assert evil in page.said
    assert "h<img src=x>2" in page.said
    sources = [attrs[key] for _, attrs in page.tags for key in attrs if key in ("src", "href")]
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(?i)url\(|@import", text)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)


def test_a_damaged_file_is_named_and_the_rest_shown(place: Path, cli: Runner) -> None:
    (place / "h2/eval/results.json").write_text('{"format": 1')
    (place / "bench/bench.json").write_text('{"checkpoints": {"h2": 3}}')
    (place / "odd").mkdir()
    (place / "odd/config.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')
    told = json.loads(cli("report", ".", "--json"))
    assert [Path(problem.split(":")[0]).parent.name for problem in told["problems"]] == ["odd", "bench", "eval"]
    assert sorted(told["checkpoints"]) == ["h2", "teacher"]
    assert cli.stderr.count("warning: not read") == 3
    assert "h2/eval/results.json" in " ".join(Reader((place / "report/index.html").read_text()).said)


def test_two_benches_of_one_checkpoint(place: Path, cli: Runner) -> None:
    """One of steps, one of generations; and one with nonsense in it, which costs no more than itself."""
    made = {"h2": {"steps": [], "generations": [{"prompt": 1, "new": 9, "batch": 2, "tokens_per_second": 77.0}]}}
    for name, told in (("more", made), ("odd", {"h2": {"steps": [3], "generations": []}})):
        (place / name).mkdir()
        (place / name / "bench.json").write_text(json.dumps({"machine": "m", "paths": {"h2": "h2"}, "checkpoints": told}))
    told = json.loads(cli("report", ".", "--json"))
    assert len(told["problems"]) == 1
    said = " ".join(Reader((place / "report/index.html").read_text()).said)
    assert "8,125" in said
    assert "77" in said


def test_results_without_a_checkpoint_and_folders_of_one_name(place: Path) -> None:
    (place / "runs/a").mkdir(parents=True)
    (place / "runs/a/results.json").write_text(json.dumps(results([0.0, 1.0])))
    shutil.copytree(place / "h2", place / "again/h2")
    report = collect([place])
    assert {entry.name for entry in report.entries} == {"a", "again/h2", f"{place.name}/h2", "teacher"}
    assert next(entry for entry in report.entries if entry.name == "a").shape is None
    assert report.cell == (64, 8)


def test_intervals() -> None:
    """Wilson's against the roots of (p - share)^2 = z^2 p (1 - p) / n, which define it."""
    for right, count in ((0, 20), (7, 20), (20, 20)):
        low, high = _interval(torch.tensor([1.0] * right + [0.0] * (count - right), dtype=torch.float64))
        for p in (low, high):
            assert abs((p - right / count) ** 2 - 1.959963985**2 * p * (1 - p) / count) < 1e-9
        assert low < high
    assert _interval(torch.tensor([1.0])) == (None, None)
    low, high = _interval(torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64))
    assert 0.2 <= low < 0.5 < high <= 0.9


def test_bad_input(tmp_path: Path, cli: Runner) -> None:
    assert "does not exist" in cli.fails("report", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in cli.fails("report", tmp_path / "empty", "-o", tmp_path / "r")
    assert not (tmp_path / "r").exists()
