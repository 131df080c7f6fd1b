"""report: what is gathered, what is shown, and that nothing on the page is more than text."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hybridize.evaluation.gate import LEVEL, compare
from hybridize.report.collect import _interval, collect
from hybridize.report.entries import Report
from hybridize.report.page import change, figure
from hybridize.report.plot import MOST, Axis, Series, chart, charts, short, thinned
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
    for words in (".600", ".839 to 1.000", "0.5000", "75.0%", "8,125", "4,000", "2 of 4", "2.03", "some text"):
        assert words in said, words
    strips = [tag for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "layer mamba"]
    assert len(strips) == 2
    assert told["pictures"] == ["quality"]
    assert [path.name for path in (place / "report").iterdir()] == ["index.html"]
    assert "exists" in cli.fails("report", ".")


def test_the_page_needs_and_runs_nothing(place: Path, cli: Runner) -> None:
    """Names, settings and machines are the files' own words: they are shown, not obeyed."""
    evil = "<script>alert(1)</script>\"'><img src=http://x onerror=1>"
    shutil.move(place / "h2", place / "h<img src=x>2")
    for name in ("teacher", "h<img src=x>2"):
        found = json.loads((place / name / "eval/results.json").read_text())
        found["tasks"] = {evil: found["tasks"]["arc"]}
        (place / name / "eval/results.json").write_text(json.dumps(found))
    cli("report", ".", "--title", evil, "--overwrite")
    text = (place / "report/index.html").read_text()
    page = Reader(text)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr",
        "th", "td", "small", "span", "i", "ul", "li", "svg", "line", "polyline", "circle", "text",
    }  # fmt: skip
    assert evil in page.said
    assert "h<img src=x>2" in page.said
    assert not [attrs for _, attrs in page.tags if {"src", "href", "xlink:href", "style"} & set(attrs)]
    labels = "".join(re.findall(r"(?s)<svg.*?</svg>", text))
    assert "h&lt;img src=x&gt;2: " in labels
    assert "<img" not in labels
    assert not re.search(r"(?i)url\(|@import", text)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)


def test_a_damaged_file_is_named_and_the_rest_shown(place: Path, cli: Runner) -> None:
    (place / "h2/eval/results.json").write_text('{"format": 1')
    (place / "bench/bench.json").write_text('{"checkpoints": {"h2": 3}}')
    (place / "odd").mkdir()
    (place / "odd/config.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')
    told = json.loads(cli("report", ".", "--json"))
    assert [Path(problem.split(":")[0]).parent.name for problem in told["problems"]] == ["odd", "eval", "bench"]
    assert sorted(told["checkpoints"]) == ["h2", "teacher"]
    assert cli.stderr.count("warning: not read") == 3
    assert "h2/eval/results.json" in " ".join(Reader((place / "report/index.html").read_text()).said)


def test_two_benches_of_one_checkpoint(place: Path, cli: Runner) -> None:
    """One of steps, one of generations; and one with nonsense in it, which costs no more than
    itself."""
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


def log(path: Path, key: str, values: list[float | None]) -> None:
    rows = [{"step": at + 1, "tokens": 100 * (at + 1), key: value} for at, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(folder: Path, **changes: object) -> None:
    found = json.loads((folder / "hybridize.json").read_text())
    (folder / "hybridize.json").write_text(json.dumps(found | changes))


@pytest.fixture
def family(place: Path, cli: Runner) -> Path:
    """The same with stages whose names are in another order than they were made, and exports of
    one."""
    shutil.move(place / "h2", place / "z2")
    cli("replace", "z2", "--indices", "0", "--no-calibrate", "-q", "-o", "b3")
    shutil.copytree(place / "b3", place / "a3-kd")
    parent = {"path": "../b3", "hash": "x"}
    manifest(place / "a3-kd", command="distill", tokens=2000, parent=parent)
    log(place / "a3-kd/metrics.jsonl", "loss", [*(3.0 - at / 1000 for at in range(999)), None])
    log(place / "a3-kd/eval.jsonl", "reverse_kl", [2.0, 1.0, 0.5])
    (place / "a3-kd/eval").mkdir()
    (place / "a3-kd/eval/results.json").write_text(json.dumps(results([1.0] * 8 + [0.0] * 12)))
    cli("export", "b3", "--format", "hf", "--no-verify", "-q", "-o", "b3-hf")
    cli("export", "b3", "--format", "gguf", "--no-verify", "-q", "-o", "b3-gguf")
    return place


def page_of(cli: Runner, folder: Path) -> str:
    told = json.loads(cli("report", folder, "-o", folder.parent / "out", "--overwrite", "--json"))
    assert told["problems"] == []
    return (folder.parent / "out/index.html").read_text()


def words(text: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Reader(re.sub(r"(?s)<style>.*?</style>", "", text)).said))


def test_stages_stand_in_the_order_of_conversion(family: Path, cli: Runner) -> None:
    """And the one with most Mamba layers that has results is told of first."""
    report = collect([family])
    assert [entry.name for entry in report.entries] == ["teacher", "z2", "b3", "a3-kd"]
    said = words(page_of(cli, family))
    assert said.index("z2") > said.index("a3-kd: 3 of 4 layers are Mamba, arc .400 against 1.000 (-.600, 95% interval -.")


def test_the_drop_shown_is_the_gates(family: Path, cli: Runner) -> None:
    teacher, ours = (json.loads((family / name / "eval/results.json").read_text()) for name in ("teacher", "a3-kd"))
    (drop,) = compare(ours, teacher)
    interval = drop.interval(LEVEL)
    assert interval is not None
    shown = f"{change(-drop.drop)} ({change(-interval[1])} to {change(-interval[0])})"
    assert f"{figure(0.4)} {shown}" in words(page_of(cli, family))
    assert shown.startswith("-.600 (-.")


def test_results_that_cannot_be_compared_are_shown_alone(family: Path, cli: Runner) -> None:
    (family / "a3-kd/eval/results.json").write_text(json.dumps(results([1.0] * 20, settings={"limit": 20}, limited=True)))
    said = words(page_of(cli, family))
    assert "a3-kd is not compared: the baseline was evaluated with limit" in said
    assert "a3-kd*" in said


def test_groups_and_the_baseline_beside_the_results(family: Path, cli: Runner) -> None:
    """A teacher that was evaluated as a baseline only; a group stands for its tasks; recall is told
    by length."""
    shutil.rmtree(family / "teacher/eval")
    tasks = {f"recall_{kind}_{length}": length for kind in ("needle", "lookup") for length in (512, 1024)}
    content = json.loads((family / "b3/hybridize.json").read_text())["root"]["hash"]
    (family / "b3/eval").mkdir()
    for name, share, hash_ in (("baseline", 1.0, content), ("results", 0.5, "b3")):
        made: dict[str, object] = {}
        for task, length in tasks.items():
            right = round(20 * share * (1 if length == 512 else 0.5))
            made[task] = results([1.0] * right + [0.0] * (20 - right))["tasks"]["arc"]  # type: ignore[index]
        mean = 0.75 * share
        groups = {"recall": {"tasks": list(tasks), "figures": {"acc,none": mean}}}
        told = results([1.0], checkpoint=hash_, tasks=made, groups=groups)
        (family / f"b3/eval/{name}.json").write_text(json.dumps(told))
    report = collect([family])
    by_name = {entry.name: entry for entry in report.entries}
    assert by_name["teacher"].recall == {512: 1.0, 1024: 0.5}
    assert by_name["b3"].recall == {512: 0.5, 1024: 0.25}
    assert abs(by_name["b3"].drops["recall", "acc,none"].drop - 0.375) < 1e-9
    assert set(by_name["b3"].figures) == {("recall", "acc,none")}
    said = words(page_of(cli, family))
    assert "Recall by length tokens teacher b3 512 1.000 .500 1,024 .500 .250" in said


def test_no_path_of_the_machine_is_on_the_page(family: Path, cli: Runner) -> None:
    """Not of checkpoints, of settings or of what could not be read; and not in what --json tells of
    it."""
    found = json.loads((family / "z2/eval/fidelity.json").read_text())
    (family / "z2/eval/fidelity.json").write_text(json.dumps(found | {"settings": {"data": "/home/me/secret/text.jsonl"}}))
    (family / "b3/eval").mkdir()
    (family / "b3/eval/results.json").write_text("{")
    (family / "teacher/eval/results.json").write_text("{")
    told = json.loads(cli("report", family, "--json"))
    text = (family / "report/index.html").read_text()
    assert len(told["problems"]) == 2
    for part in (text, json.dumps(told["problems"])):
        assert str(family) not in part
        assert "/home/me" not in part
    assert "text.jsonl" in text
    assert "teacher → z2 (replace) → b3 (replace) → a3-kd (distill)" in words(text)


def test_paths_are_shortened_and_addresses_kept(tmp_path: Path) -> None:
    report = Report([], [], [tmp_path])
    assert report.clean(f"{tmp_path}/a/b.json is bad, '/srv/x/y.json' too") == "a/b.json is bad, 'y.json' too"
    assert report.clean("https://host.org/a/b and 3/4 of a/b") == "https://host.org/a/b and 3/4 of a/b"
    assert report.shown("/root/.cache/hub/models--org--some-name/snapshots/0f3") == "org/some-name"
    assert report.shown("org/name") == "org/name"
    assert report.shown("../gone") == "gone"


def test_exports_are_listed_below_their_checkpoint(family: Path, cli: Runner) -> None:
    report = collect([family])
    assert report.problems == []
    assert {e.name: [x.name for x in e.exports] for e in report.entries if e.exports} == {"b3": ["b3-gguf", "b3-hf"]}
    said = words(page_of(cli, family))
    assert "b3-gguf: export as gguf; not verified" in said
    assert "b3 (replace) b3-gguf" in said
    card = family / "b3-hf/README.md"
    card.write_text(card.read_text().replace("not verified: not requested", "transformers: 9 of 9 greedy tokens equal"))
    assert "b3-hf: export as hf; verified, transformers: 9 of 9 greedy tokens equal" in words(page_of(cli, family))
    shutil.rmtree(family / "b3")
    assert [export.name for export in collect([family]).lost] == ["b3-gguf", "b3-hf"]


def test_training_curves(family: Path) -> None:
    """Counted from the teacher on, thinned, without steps that were skipped."""
    report = collect([family])
    entry = report.entries[-1]
    assert len(entry.loss) == 999
    assert entry.loss[0] == (100.0, 3.0)
    assert entry.kl == [(100.0, 2.0), (200.0, 1.0), (300.0, 0.5)]
    drawn = charts(report)
    assert set(drawn) == {"quality", "loss", "reverse_kl"}
    lines = re.findall(r'<polyline class="c3" points="([^"]+)"', drawn["loss"][1])
    assert [len(line.split()) for line in lines] == [MOST, MOST]
    points = [(float(at), float(at)) for at in range(1001)]
    assert (thinned(points)[0], thinned(points)[-1], len(thinned(points))) == (points[0], points[-1], MOST)
    assert thinned([(0.0, float("nan")), (1.0, 2.0)]) == ((1.0, 2.0),)


def test_charts_need_no_library(family: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = json.loads(cli("report", family, "--json"))
    assert told["pictures"] == ["loss", "quality", "reverse_kl"]
    assert (family / "report/index.html").read_text().count("<svg") == 6


def test_a_chart_takes_any_numbers_and_names() -> None:
    for points in (((0.0, 0.0),), ((1.0, 5.0), (1.0, 5.0)), ((-1e12, 1e-9), (1e12, 3.0)), ((3.0, 1e-300), (4.0, 1e300))):
        for log_scale in (False, True):
            drawn = chart("<t>", Axis("x", short), Axis("<y>", short, log_scale), [Series("<b>&", points, 9, True, True)])
            page = Reader(drawn)
            assert {tag for tag, _ in page.tags} <= {"svg", "title", "line", "polyline", "circle", "text"}
            assert "<b>&" in page.said
            assert "nan" not in drawn
    assert [short(value) for value in (0.0, 0.25, 20_000.0, 3e6, 1.5e9)] == ["0", "0.25", "20k", "3M", "1.5B"]


def test_figures_as_they_are_written() -> None:
    assert [figure(value) for value in (0.0, 0.241, 1.0, 10.5)] == [".000", ".241", "1.000", "10.500"]
    assert [change(value) for value in (-0.034, 0.034, 0.0, -1.5)] == ["-.034", "+.034", "0", "-1.500"]


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
