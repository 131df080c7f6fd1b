"""Every command end to end on a tiny random teacher, and what each says to bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hybridize.commands import COMMANDS, app
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybridize.modeling
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.corpus import open_corpus
from hybridize.data.encode import Encoder
from hybridize.distillation.fidelity import fidelity
from hybridize.evaluation.harness import EvalSettings, evaluate, open_tasks, repeatable
from hybridize.modeling import HybridForCausalLM
from hybridize.runtime.loading import load_hybrid, load_model, load_tokenizer
from hybridize.scoring.loo import answers
from tests.conftest import Runner, make_teacher, write_traces
from tests.test_scoring import silence
from tests.test_surgery import mamba_layers

TASK = """
task: tiny_{kind}
custom_dataset: !function tiny.load
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{extra}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
LOADER = """
import datasets
def load(**_):
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i), "choices": [str(2 * i), "x", "yy"]} for i in range(12)]
    return {"test": datasets.Dataset.from_list(rows)}
"""


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tiny.py").write_text(LOADER)
    choice = dict(kind="choice", output="multiple_choice", target="0", metric="acc", extra='doc_to_choice: "{{choices}}"')
    exact = dict(
        kind="exact", output="generate_until", target='"{{answer}}"', metric="exact_match",
        extra='generation_kwargs: {until: ["\\n"], max_gen_toks: 6}',
    )  # fmt: skip
    for task in (choice, exact):
        (folder / f"{task['kind']}.yaml").write_text(TASK.format(**task))
    return folder


@pytest.mark.parametrize("what", ["block", "mixer"])
def test_the_sweep_answers_as_stock_lm_eval_does_on_each_ablated_model(place: Path, what: str) -> None:
    """The real HFLM on a model whose projections are zero there: the same log-likelihoods, the same
    answers."""
    settings = EvalSettings(("tiny_choice",), batch_size=4, include_path="tasks")
    tokenizer, source = load_tokenizer(place / "teacher"), CheckpointReader(place / "teacher")
    cpu, manager, known = torch.device("cpu"), repeatable(open_tasks(settings)), {}
    ours = load_hybrid(source, cpu, torch.float32)

    def answer(requests: Any) -> list[tuple[float, bool]]:
        keys = [(tuple(read), tuple(wanted)) for read, wanted in requests]
        if not known:
            table = answers(ours, requests, what, 4)
            known.update({key: [row[n] for row in table] for n, key in enumerate(keys)})
        return [known[key][variant] for key in keys]

    def chosen(model: torch.nn.Module, *answerer: Any) -> list[list[float]]:
        samples = evaluate(model, tokenizer, settings, manager, *answerer)["samples"]["tiny_choice"]
        return [[float(value[0]) for value in sample["filtered_resps"]] for sample in samples]

    for variant, layer in enumerate([None, *range(4)]):  # noqa: B007 (`answer` reads it)
        model = load_model(place / "teacher", cpu, torch.float32)
        stock = chosen(model if layer is None else silence(model, layer, what))
        mine = chosen(ours, answer)
        assert len(stock) == len(mine) == 12
        for one, other in zip(mine, stock, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert one.index(max(one)) == other.index(max(other))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with teacher/, traces.jsonl and tasks/, as a user would have it; the current
    directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRIDIZE_DATA", raising=False)
    make_teacher(tmp_path / "teacher")
    write_traces(tmp_path / "traces.jsonl")
    write_tasks(tmp_path / "tasks")
    return tmp_path


TRAIN = ("--steps", 3, "--batch-size", 2, "--seq-len", 48, "--eval-every", 0)


MMR = ("--steps", 1, "--batch-size", 1, "--seq-len", 24)


def test_the_data_that_won_is_named(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable left in the shell must not replace a teacher's traces unheard."""
    cli("score-mmr", "--no-calibrate", *MMR, "-o", "a.json")
    assert "--data is not given: traces.jsonl is used" in cli.stderr
    (place / "traces.jsonl").rename(place / "other.jsonl")
    monkeypatch.setenv("HYBRIDIZE_DATA", "other.jsonl")
    cli("score-mmr", "--no-calibrate", *MMR, "-o", "b.json")
    assert "--data is not given: other.jsonl (from $HYBRIDIZE_DATA) is used" in cli.stderr
    cli("score-mmr", "--no-calibrate", "--data", "other.jsonl", *MMR, "-o", "c.json")
    assert "--data is not given" not in cli.stderr


def test_a_metric_that_tells_nothing_says_so(place: Path, cli: Runner) -> None:
    """Accuracy on twelve questions that a random model answers by chance."""
    cli("score-loo", "--tasks", "tiny_choice", "--include-path", "tasks")
    assert "warning: accuracy hardly distinguishes these layers: the median rank uncertainty is" in cli.stderr
    assert "layers that --metric kl and score-mmr chose trained far better" in cli.stderr


def test_a_teacher_that_waits_in_host_memory(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1,2", "--no-calibrate", "-o", "h2")
    for stage in ("distill", "align"):
        found = []
        for flag in ("--no-offload-teacher", "--offload-teacher"):
            cli("distill", "h2", "--stage", stage, *TRAIN, flag, "-o", "out", "--overwrite", "--json")
            found.append(json.loads(cli.stdout)["last"]["loss"])
        assert found[0] == found[1]
    assert "cannot capture an offloaded teacher" in cli.fails(
        "distill", "h2", *TRAIN, "--offload-teacher", "--cuda-graph", "-o", "out2"
    )


def test_documents_that_are_cut_are_told(place: Path, cli: Runner) -> None:
    cli("distill", "teacher", "--loss", "ce", *TRAIN, "--seq-len", 16)
    assert "documents are longer than --seq-len and cut into pieces that do not see each other (the longest has " in cli.stderr


def test_the_whole_chain(place: Path, cli: Runner) -> None:
    cli("score-loo", "--metric", "margin", "--tasks", "tiny_choice", "--include-path", "tasks")
    cli("replace", "--layers", 1)
    cli("distill", "h1", "--data", "traces.jsonl", "-o", "h1-kd", *TRAIN)
    cli("score-mmr", "h1-kd", "--steps", 2, "--batch-size", 2, "--seq-len", 48)
    cli("replace", "h1-kd", "--layers", 3, "-o", "h3")
    cli("distill", "h3", "-o", "h3-kd", *TRAIN)
    cli("distill", "h3-kd", "--loss", "ce", "-o", "h3-sft", *TRAIN)
    cli(
        "eval",
        "h3-sft",
        "--tasks",
        "tiny_choice,tiny_exact",
        "--include-path",
        "tasks",
        "--baseline",
        "teacher",
        "--max-drop",
        1,
        "--allow-inconclusive",
    )
    cli("export", "h3-sft", "-o", "release")

    assert len(mamba_layers(place / "h3-sft")) == 3
    note = json.loads((place / "h3-sft/hybridize.json").read_text())
    assert (note["command"], note["parent"]["path"], note["root"]["path"]) == ("distill", "../h3-kd", "../teacher")
    assert note["tokens"] == 3 * 3 * 2 * 48
    assert [part["rows"] for part in note["data"]] == [23, 23, 24]  # one of 24 is held out where a teacher measures it
    assert note["settings"]["engine"] == "torch"
    results = json.loads((place / "h3-sft/eval/results.json").read_text())
    assert len(results["tasks"]["tiny_exact"]["documents"]) == 12
    assert results["settings"]["tasks"] == ["tiny_choice", "tiny_exact"]
    losses = [json.loads(line)["loss"] for line in (place / "h3-kd/metrics.jsonl").open()]
    assert len(losses) == 3
    assert not list(place.glob("*.run"))
    assert not list(place.glob(".*tmp*"))
    card = (place / "release/README.md").read_text()
    assert "3 of its 4 attention layers were replaced by Mamba layers" in card
    tokens = torch.randint(4, 260, (1, 9))
    first = AutoModelForCausalLM.from_pretrained("h3").model.norm.weight
    last = AutoModelForCausalLM.from_pretrained("h3-sft")
    assert not torch.equal(first, last.model.norm.weight)
    assert last(tokens).logits.isfinite().all()


def test_defaults_of_a_chain_without_names(place: Path, cli: Runner) -> None:
    cli("score-mmr", "--steps", 1, "--batch-size", 1, "--seq-len", 48)
    cli("replace", "--layers", 2)
    cli("distill", "h2", *TRAIN)
    cli("export", "h2-kd")
    assert (place / "h2-kd-hf/config.json").exists()


def test_score_loo_by_accuracy_reads_the_drop_of_the_task(place: Path, cli: Runner) -> None:
    cli("score-loo", "--tasks", "tiny_choice", "--include-path", "tasks", "--limit", 5, "-o", "s.json", "--json")
    found = json.loads((place / "s.json").read_text())
    assert (found["metric"], found["settings"]["limit"]) == ("accuracy", 5)
    cli("eval", "--tasks", "tiny_choice", "--include-path", "tasks", "--limit", 5, "--json")
    whole = json.loads(cli.stdout)["tasks"]["tiny_choice"]["value"]
    for score in found["layers"]:
        assert round((whole - score["score"]) * 5, 6) in range(6)


def test_json_is_one_object_and_quiet_is_silent(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1", "--json")
    assert json.loads(cli.stdout)["converted"] == [1]
    cli("replace", "--indices", "1", "--overwrite", "--quiet")
    assert (cli.stdout, cli.stderr) == ("", "")


def test_dry_run_names_the_source_of_every_row_and_writes_nothing(place: Path, cli: Runner) -> None:
    before = sorted(place.iterdir())
    text = cli("replace", "--indices", "1", "--mixer", "mamba", "--dry-run")
    lines = [line for line in text.splitlines() if line.startswith("model.layers.1.mixer.")]
    assert len(lines) == 8
    (rows,) = [line for line in lines if "in_proj" in line]
    for part in (
        "x[32:48] = model.layers.1.self_attn.v_proj.weight[0:16]",
        "C[64:96] = model.layers.1.self_attn.q_proj.weight",
    ):
        assert part in rows
    text = cli("replace", "--indices", "1", "--dry-run")
    (rows,) = [line for line in text.splitlines() if "in_proj" in line]
    assert "x[32:64] = model.layers.1.self_attn.v_proj.weight, each 8 rows repeated to 32" in rows
    assert rows.endswith("(then calibrated)")
    assert sorted(place.iterdir()) == before


def test_settings_from_a_file_and_flags_over_them(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1")
    (place / "plan.toml").write_text('steps = 2\nbatch-size = 2\nseq_len = 48\nloss = "forward-kl"\n')
    cli("distill", "h1", "-o", "out", "--config", "plan.toml", "--steps", 1)
    made = json.loads((place / "out/hybridize.json").read_text())["settings"]
    assert (made["steps"], made["loss"], made["batch_size"]) == (1, "forward-kl", 2)
    (place / "plan.yaml").write_text("stepps: 2\n")
    assert "unknown setting 'stepps'" in cli.fails("distill", "h1", "-o", "out2", "--config", "plan.yaml")
    (place / "plan.yaml").write_text("steps: 1.5\n")
    assert "steps is 1.5, not of type int" in cli.fails("distill", "h1", "-o", "out2", "--config", "plan.yaml")
    (place / "plan.yaml").write_text("steps: 9\nbatch-size: 2\nseq-len: 48\nlr-mixer: 1e-3\n")
    cli("distill", "h1", "-o", "out3", "--config", "plan.yaml", "--tokens", 96)
    assert json.loads((place / "out3/hybridize.json").read_text())["tokens"] == 96
    (place / "plan.yaml").write_text("steps: [\n")
    assert "plan.yaml is not valid YAML" in cli.fails("distill", "h1", "-o", "out2", "--config", "plan.yaml")
    Path("plan.yaml").write_text("steps: 2\nlr: 1e-3\nsteps: 3\n")  # which of the two is meant?
    assert "duplicate key 'steps'" in cli.fails("distill", "h1", "-o", "out2", "--config", "plan.yaml")


def test_a_teacher_that_was_fine_tuned_first_can_be_converted(place: Path, cli: Runner) -> None:
    cli("distill", "teacher", "--loss", "ce", "-o", "tuned", *TRAIN)
    cli("replace", "tuned", "--indices", "1")
    assert [o["origin"] for o in json.loads((place / "h1/hybridize.json").read_text())["layers"]][1] == "calibrated"


def test_buffers_of_old_checkpoints_survive_training(place: Path, cli: Runner) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(place / "teacher/model.safetensors") | {name: torch.arange(4.0)}
    save_file(tensors, place / "teacher/model.safetensors", metadata={"format": "pt"})
    cli("replace", "--indices", "1")
    cli("distill", "h1", *TRAIN)
    (shard,) = (place / "h1-kd").glob("*.safetensors")
    assert torch.equal(load_file(shard)[name], torch.arange(4.0))


def test_interrupted_and_resumed_on_the_command_line(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.distillation.optimize import Optimization

    cli("replace", "--indices", "1,2")
    cli("distill", "h2", "-o", "whole", *TRAIN)
    real, calls = Optimization.update, []

    def stops(*arguments: object, **keywords: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(Optimization, "update", stops)
    assert cli.fails("distill", "h2", "-o", "parts", *TRAIN, code=130) == "error: interrupted"
    assert not (place / "parts").exists()
    monkeypatch.setattr(Optimization, "update", real)
    assert "--resume" in cli.fails("distill", "h2", "-o", "parts", *TRAIN)
    assert "lr was" in cli.fails("distill", "h2", "-o", "parts", *TRAIN, "--lr", 1, "--resume")
    cli("distill", "h2", "-o", "parts", *TRAIN, "--resume")
    one, two = (next((place / p).glob("*.safetensors")).read_bytes() for p in ("whole", "parts"))
    assert one == two


def test_killed_and_resumed_on_the_command_line(place: Path, cli: Runner) -> None:
    """SIGKILL in the middle of training: the losses and the weights are those of a run that nobody
    killed, bit for bit."""
    cli("replace", "--indices", "1,2")
    plan = ("distill", "h2", "--steps", 60, "--batch-size", 4, "--seq-len", 48, "--save-every", 5, "--eval-every", 25)
    cli(*plan, "-o", "whole")
    command = [sys.executable, "-m", "hybridize.commands", *map(str, plan), "-o", "parts"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are split by threads
    running = subprocess.Popen(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (place / "parts.run/step-00000015/.metadata").exists():
        assert running.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert not (place / "parts").exists()
    cli(*plan, "-o", "parts", "--resume", "--save-every", 7)  # how often is no part of the result
    one, two = (next((place / p).glob("*.safetensors")).read_bytes() for p in ("whole", "parts"))
    assert one == two
    logs = [[(r["step"], r["loss"]) for r in map(json.loads, (place / p / "metrics.jsonl").open())] for p in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 60


def test_every_output_is_logged(place: Path, cli: Runner) -> None:
    cli("eval", "teacher", "--tasks", "tiny_choice", "--include-path", "tasks", "--log-samples")
    lines = [json.loads(line) for line in (place / "teacher/eval/samples.jsonl").open()]
    results = json.loads((place / "teacher/eval/results.json").read_text())["tasks"]["tiny_choice"]
    assert [line["doc_hash"] for line in lines] == [d["hash"] for d in results["documents"]]
    assert [line["acc"] for line in lines] == [d["score"] for d in results["documents"]]
    assert all(len(line["filtered_resps"]) == len(line["arguments"]) for line in lines)


def test_fidelity_to_the_teacher(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1,2", "--no-calibrate")
    small = ("--seq-len", 48, "--windows", 5, "--mask", "assistant")
    cli("eval", "h2", "--fidelity", "traces.jsonl", *small)
    assert "greedy continuations of 5 prompts" in cli.stdout
    found = json.loads((place / "h2/eval/fidelity.json").read_text())
    student, teacher = (load_model(place / p, torch.device("cpu"), torch.float32) for p in ("h2", "teacher"))
    encoder = Encoder(load_tokenizer(place / "teacher"), "assistant", None)
    batches = open_corpus("traces.jsonl", "traces.jsonl", encoder).held_out(5, 48, 4)
    expected = fidelity(student, teacher, batches, torch.float32)
    for name in ("reverse_kl", "forward_kl", "agreement", "perplexity", "tokens"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert sum(bucket["tokens"] for bucket in found["positions"]) == found["tokens"]
    same = json.loads(cli("eval", "teacher", "--fidelity", "traces.jsonl", "--teacher", "teacher", *small, "--json"))
    assert (same["reverse_kl"], same["agreement"]) == (0.0, 1.0)
    assert (same["greedy"]["mean"], same["greedy"]["all_the_same"]) == (64.0, 1.0)
    assert same["perplexity"] == same["teacher_perplexity"]
    assert "exists" in cli.fails("eval", "h2", "--fidelity", "traces.jsonl", *small)
    assert "either --tasks, or --fidelity" in cli.fails("eval", "h2")
    assert "--baseline requires --tasks" in cli.fails(
        "eval", "h2", "--fidelity", "traces.jsonl", "--baseline", "teacher", "--overwrite"
    )


def test_the_gate(place: Path, cli: Runner) -> None:
    common = ("--tasks", "tiny_choice", "--include-path", "tasks")
    cli("eval", "teacher", *common)
    cli("replace", "--indices", "0-3")
    found = json.loads((place / "teacher/eval/results.json").read_text())
    for figure in found["tasks"]["tiny_choice"]["figures"].values():
        figure["value"] = 2.0
    (place / "high.json").write_text(json.dumps(found))
    cli("eval", "h4", *common, "--baseline", "high.json", "--max-drop", 0.1, code=3)
    assert "gate not met: tiny_choice" in cli.stderr
    assert (place / "h4/eval/results.json").exists()
    cli("eval", "h4", *common, "--baseline", "high.json", "--max-drop", 2, "--overwrite")
    assert "not comparable" in cli.fails("eval", "h4", *common, "--baseline", "high.json", "--limit", 3, "--overwrite")
    assert "contradict" in cli.fails(
        "eval", "h4", *common, "--baseline", "teacher", "--max-drop", 1, "--strict", "--confidence", 0.9
    )


def test_the_gate_on_a_checkpoint_and_its_own_results(place: Path, cli: Runner) -> None:
    """A baseline that was evaluated alike is not evaluated again; one that was not is, and then its
    figures are kept."""
    common = ("--tasks", "tiny_choice", "--include-path", "tasks", "--baseline", "teacher", "--overwrite")
    cli("replace", "--indices", "0-3")
    cli("eval", "h4", *common, "--max-drop", 1, "--junit", "ci/out.xml", code=3)
    assert "inconclusive: tiny_choice" in cli.stderr
    assert "there is nothing to lose; --allow-inconclusive accepts this" in cli.stderr
    assert "evaluating the baseline" in cli.stderr
    cli("eval", "h4", *common, "--max-drop", 1, "--junit", "ci/out.xml", "--allow-inconclusive")
    assert (place / "h4/eval/baseline.json").exists()
    assert 'failures="0"' in (place / "ci/out.xml").read_text()
    gate = ("--max-drop", 1, "--confidence", 0.9, "--allow-inconclusive", "--json")
    found = json.loads(cli("eval", "h4", *common, *gate))
    assert "h4/eval/baseline.json: same checkpoint, same settings" in cli.stderr
    assert {drop["metric"] for drop in found["drops"]} == set(found["tasks"]["tiny_choice"]["figures"])
    for drop in found["drops"]:
        assert drop["low"] <= drop["drop"] <= drop["high"]
        assert (drop["failed"], drop["outcome"]) == (False, "cannot tell")
        assert drop["p"] is not None
        assert drop["smallest_drop"] == 1 / drop["documents"]
    chosen = json.loads(cli("eval", "h4", *common, *gate, "--metric", "tiny_choice=acc"))
    assert [drop["metric"] for drop in chosen["drops"]] == ["acc,none"]
    assert "the task has acc,none" in cli.fails("eval", "h4", *common, "--metric", "tiny_choice=f1")
    assert "which is not in --tasks" in cli.fails("eval", "h4", *common, "--metric", "other=acc")
    assert "is not TASK=METRIC" in cli.fails("eval", "h4", *common, "--metric", "acc")
    cli("eval", "teacher", *common[:4])
    cli("eval", "h4", *common)
    assert "teacher/eval/results.json: same checkpoint" in cli.stderr
    cli("eval", "h4", *common, "--limit", 2)
    assert "evaluating the baseline" in cli.stderr
    assert "(limited to 2 documents per task)" in cli.stdout
    cli("eval", "h4", *common, "--max-drop", -1, "--strict", "--junit", "ci/out.xml", code=3)
    assert "interval" in cli.stderr
    assert "<failure" in (place / "ci/out.xml").read_text()
    assert "is a directory" in cli.fails("eval", "h4", *common, "--junit", "ci")


def test_an_interrupted_run_says_what_is_saved(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.distillation.optimize import Optimization

    cli("replace", "--indices", "1")
    common = ("distill", "h1", "--steps", 4, "--batch-size", 2, "--seq-len", 48, "--warmup-steps", 50, "--device", "cpu")
    update, calls = Optimization.update, []

    def interrupted(*given: object) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "update", interrupted)
        cli.fails(*common, code=130)
    assert "2 of 4 steps are saved in h1-kd.run; run the same command with --resume to continue" in cli.stderr
    assert "warm-up: 2 of 4 steps; it is limited to half of a run (--warmup-steps 50)" in cli.stderr
    cli(*common, "--resume")
    assert (place / "h1-kd/config.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cli.fails(*common, "-o", "none", code=130)
    assert "nothing is saved yet" in cli.stderr


def test_training_that_harms_says_so(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1")
    common = ("distill", "h1", "--steps", 6, "--batch-size", 2, "--seq-len", 48, "--device", "cpu", "--eval-every", 0)
    cli(*common, "-o", "good", "--lr", 1e-9, "--lr-mixer", 1e-3)
    assert "above its first value" not in cli.stderr
    cli(*common, "-o", "bad", "--lr", 3, "--lr-mixer", 3)
    assert re.search(
        r"held-out reverse KL ended at [\d.]+, above its first value [\d.]+: .* --lr-mixer 0.9 --lr 0.9", cli.stderr
    )


def test_the_package_is_the_command_line_too() -> None:
    done = subprocess.run([sys.executable, "-m", "hybridize", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hybridize ")


BAD = [
    (("distill", "--loss", "ce", "--steps", 1, "--cuda-graph"), "--cuda-graph needs a CUDA device"),
    (("distill", "--steps", 1, "--stage", "align", "--cuda-graph"), "--cuda-graph needs --stage distill"),
    (("distill", "--steps", 1, "--stage", "align", "--compile"), "--compile needs --stage distill"),
    (("distill", "--loss", "ce", "--steps", 1, "--checkpoint-layers", "4"), "the model has layers 0 to 3"),
    (("distill", "--loss", "ce", "--steps", 1, "--train", "nothing.*"), "has no tensor with such a name"),
    (("distill", "--loss", "ce", "--steps", 1, "--track", "mlflow"), "--track mlflow is unknown"),
    (("distill", "--loss", "ce", "--steps", 1, "--data", "traces.jsonl=0"), "must have the form NAME=NUMBER"),
    (("distill", "--loss", "ce", "--steps", 1, "--eval-data", "./no.jsonl"), "--eval-data ./no.jsonl does not exist"),
    (("replace", "nowhere/", "--layers", 1), "nowhere/ does not exist"),
    (("replace", "./nowhere", "--layers", 1), "./nowhere does not exist"),
    (("replace", "half", "--indices", 1), "is missing, though the index names it"),
    (("replace", "bert", "--indices", 1), "'bert' model; supported families: llama"),
    (("replace", "classifier", "--indices", 1), "not a causal language model but LlamaForSequenceClassification"),
    (("replace", "sinking", "--indices", 1), "self_attn.sinks has no place in a llama model"),
    (("replace", "--layers", 1), "has no scores"),
    (("replace", "--layers", 9), "has only 4 layers"),
    (("replace", "--layers", 1, "--scores", "nothing.json"), "nothing.json is missing"),
    (("replace", "--indices", "9"), "there is no layer 9"),
    (("replace", "--indices", "x"), "not a list like"),
    (("replace",), "either --layers N or --indices"),
    (("replace", "--indices", "1", "-o", "teacher"), "is or contains the input"),
    (("replace", "--indices", "1", "-o", "tasks"), "tasks exists"),
    (("replace", "--indices", "1", "--mixer", "mamba", "--d-state", 3), "must divide the head dimension"),
    (("replace", "--indices", "1", "--d-state", 3), "mixers is the head size, 8"),
    (("replace", "--indices", "1", "--dt-rank", 2), "--dt-rank has no use with --mixer mamba2"),
    (("replace", "--indices", "1", "--mixer", "mamba3"), "--mixer mamba3 is unknown; use mamba or mamba2"),
    (("replace", "--indices", "1", "--calibrate", "nothing.jsonl"), "nothing.jsonl does not exist"),
    (("replace", "--indices", "1", "--calibrate", "traces.jsonl", "--no-calibrate"), "contradict each other"),
    (("replace", "--indices", "1", "--calibration-parts", "z,d"), "choose from z,conv,decay,scale,out"),
    (("replace", "--indices", "1", "--calibration-tokens", 10), "--calibration-tokens 10 must be at least 32"),
    (("score-mmr", "--mixer", "gru"), "--mixer gru is unknown"),
    (("distill", "--data", "nothing.jsonl", "--steps", 1), "nothing.jsonl does not exist"),
    (("distill", "--data", "empty.jsonl", "--steps", 1), "empty.jsonl has no rows"),
    (("distill", "--data", "bad.jsonl", "--steps", 1), "bad.jsonl:2"),
    (("distill",), "--tokens or --steps"),
    (("distill", "--steps", 0), "must be positive"),
    (("distill", "--steps", 1, "--loss", "kl"), "'kl' is unknown"),
    (("distill", "--steps", 1, "--device", "cuda:9x"), "cuda:9x"),
    (("distill", "--steps", 1, "--dtype", "int8"), "int8 is unknown"),
    (("distill", "--steps", 1, "--teacher", "other"), "vocabulary"),
    (("eval", "--tasks", "no_such_task", "--include-path", "tasks"), "no task 'no_such_task'"),
    (("eval", "--tasks", "tiny_choice", "--include-path", "nowhere"), "nowhere is not a directory"),
    (("eval", "--tasks", "tiny_choice", "--include-path", "tasks", "--max-drop", 1), "--max-drop requires --baseline"),
    (("eval", "--fidelity", "traces.jsonl", "--junit", "x.xml"), "--junit does not apply to --fidelity"),
    (("eval", "--fidelity", "traces.jsonl", "--samples", 3), "--samples does not apply to --fidelity"),
    (("score-loo", "--metric", "speed"), "--metric speed is unknown"),
    (("score-mmr", "--steps", 0), "must be positive"),
    (("score-mmr", "--repeats", 0), "--repeats 0 must be positive"),
    (("score-mmr", "--train", "body"), "--train body is unknown; use mixers or all"),
    (("score-mmr", "--seq-len", 99999, "--mask", "none"), "does not fill one sequence"),
    (("score-loo", "--tasks", "no_such_task", "--include-path", "tasks"), "no task 'no_such_task'"),
    (("score-loo", "--tasks", "tiny_exact", "--include-path", "tasks"), "tiny_exact is of kind generate_until"),
    (("export",), "is not a hybrid"),
    (("replace", "--indices", "1", "-o", ".", "--overwrite"), "contains the input"),
    (("replace", "--indices", "1", "-o", "tasks", "--overwrite"), "not a checkpoint"),
    (("replace", "--indices", "1", "--teacher", "teacher"), "--teacher requires --init-from teacher"),
    (("distill", "--steps", 1, "--dtype", "float16"), "float16 loses small gradients"),
    (("distill", "--steps", 1, "--train", "mixers"), "has no Mamba layer"),
    (("eval", "--tasks", "tiny_choice", "--include-path", "tasks", "-o", "traces.jsonl"), "results go into a directory"),
    (("score-loo", "--metric", "kl", "--mask", "none", "--seq-len", 99999), "does not fill one window"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(map(str, a)) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_2_before_weights(
    place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch, arguments: tuple, says: str
) -> None:
    def copied(name: str, **changes: object) -> Path:
        make_teacher(place / name, layers=2)
        config = json.loads((place / name / "config.json").read_text()) | changes
        (place / name / "config.json").write_text(json.dumps(config))
        return place / name

    wanted = str(arguments)
    if "half" in wanted:
        copied("half")
        (place / "half/model.safetensors").unlink()
        (place / "half/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    if "bert" in wanted:
        copied("bert", model_type="bert")
    if "classifier" in wanted:
        copied("classifier", architectures=["LlamaForSequenceClassification"])
    if "sinking" in wanted:
        file = make_teacher(place / "sinking", layers=2) / "model.safetensors"
        save_file({**load_file(file), "model.layers.1.self_attn.sinks": torch.zeros(4)}, file, {"format": "pt"})
    if "other" in wanted:
        make_teacher(place / "other", layers=2, vocab=300)
    (place / "empty.jsonl").write_text("\n")
    (place / "bad.jsonl").write_text('{"text": "a"}\n{"x": 1}\n')

    def files() -> list[str]:  # what Python keeps of a task's own module is no output
        return sorted(str(p) for p in place.rglob("*") if "__pycache__" not in p.parts)

    before = files()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    for kind in (AutoModelForCausalLM, HybridForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", never)
    assert says in cli.fails(*arguments)
    assert files() == before


def test_unknown_flags_are_usage_errors(cli: Runner) -> None:
    cli("replace", "--laiers", 3, code=2)
    assert "No such option" in cli.stderr
    cli("no-such-command", code=2)


def test_a_layer_that_is_mamba_already(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1")
    assert "layer 1 is already a Mamba layer" in cli.fails("replace", "h1", "--indices", "1")
    assert "never converts one back" in cli.fails("replace", "h1", "--layers", 0)
    assert "and all mixers must agree" in cli.fails("replace", "h1", "--indices", "2", "--d-state", 4)
    assert "--mixer mamba: the checkpoint's mixers have mamba2" in cli.fails(
        "replace", "h1", "--indices", "2", "--mixer", "mamba"
    )
    cli("replace", "h1", "--layers", 1, "-o", "same")


def test_flags_are_frozen() -> None:
    """The command line is an interface: a change here is a change for every script that calls it."""
    import typer.main

    found = {
        name.replace("_", "-"): sorted(option for p in command.params for option in p.opts if option.startswith("--"))
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert set(found) == {name.replace("_", "-") for name in COMMANDS}
    expected = json.loads((Path(__file__).parent / "flags.json").read_text())
    assert found == expected


def test_the_commands_stand_in_groups_and_their_lines_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["--help"]).stdout.split("\nConvert:\n")[1]
    assert [line for line in shown.splitlines() if line.endswith(":")] == ["Measure:", "Serve:", "Maintain:"]
    lines = [line for line in shown.splitlines() if line.startswith("  ")]
    assert [line.split()[0].replace("-", "_") for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("..") and len(line) <= 80 for line in lines), shown


def test_help_is_fast_and_free_of_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hybridize.commands import app, COMMANDS\n"
        "for name in ['', *COMMANDS]:\n"
        "    args = ([name.replace('_', '-')] if name else []) + ['--help']\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'rich.table'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


def test_the_library_knows_no_command_line() -> None:
    for path in Path(hybridize.__file__).parent.rglob("*.py"):
        if path.name == "__main__.py":  # `python -m hybridize`
            continue
        text = path.read_text()
        for word in ("import typer", "from typer", "import rich", "from rich", "hybridize.commands", "sys.argv"):
            assert word not in text, (path, word)


def test_debug_shows_the_traceback(place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("HYBRIDIZE_DEBUG", "1")
    result = CliRunner().invoke(app, ["replace", "--layers", "1"])
    assert type(result.exception).__name__ == "InputError"
