"""A mixer, a family, a format, a scorer and a loss from outside go through the whole chain, and
what lacks them says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hybridize.commands import app
from typer.testing import CliRunner

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.distillation.losses import DIVERGENCES, Loss
from hybridize.export.formats import FORMATS
from hybridize.extensions import VARIABLE, load_extensions
from hybridize.modeling import MIXERS
from hybridize.runtime.loading import load_hybrid
from hybridize.scoring.scorers import SCORERS
from hybridize.surgery.families import FAMILIES
from hybridize.surgery.mixers import KINDS
from tests.conftest import Runner, make_tokenizer, worst, write_traces
from tests.families import COMMON

EXAMPLE = Path(__file__).parents[1] / "docs/examples/extension.py"
SHORT = ("--steps", 2, "--batch-size", 2, "--seq-len", 48)


REGISTRIES = (MIXERS, KINDS, FAMILIES, FORMATS, SCORERS, DIVERGENCES)


@pytest.fixture(scope="module")
def added() -> list[dict[str, object]]:
    """What the example adds to each registry; it is imported once a process."""
    before = [set(registry) for registry in REGISTRIES]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(VARIABLE, str(EXAMPLE))
        assert load_extensions() == [str(EXAMPLE)]
    found = [{key: registry[key] for key in set(registry) - known} for registry, known in zip(REGISTRIES, before, strict=True)]
    _forget(found)
    return found


def _forget(added: list[dict[str, object]]) -> None:
    for registry, own in zip(REGISTRIES, added, strict=True):
        for key in own:
            del registry[key]


@pytest.fixture
def extended(added: list[dict[str, object]]) -> Iterator[None]:
    """The example is loaded, and forgotten afterwards."""
    for registry, own in zip(REGISTRIES, added, strict=True):
        registry.update(own)
    yield
    _forget(added)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extended: None) -> Path:
    """A folder with a teacher of the outside family, and traces."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = CONFIG_MAPPING["otter"](**{**COMMON, "vocab_size": 260, "attention_bias": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    write_traces(tmp_path / "traces.jsonl", 40)
    return tmp_path


def test_the_whole_chain(place: Path, cli: Runner) -> None:
    cli("score-depth", "teacher")
    assert json.loads((place / "teacher/scores/depth.json").read_text())["settings"] == {"downwards": False}
    cli("replace", "--layers", 2, "--mixer", "retention")
    assert "layers by teacher/scores/depth.json (depth, depth)" in cli.stderr
    assert "verified on" in cli.stdout  # by the kind's own `vectors`
    assert "calibrated conv, decay, scale on" in cli.stdout
    config = json.loads((place / "h2/config.json").read_text())
    assert config["base_model_type"] == "otter"
    assert config["mixer"]["kind"] == "retention"
    assert config["layer_types"] == ["full_attention", "full_attention", "linear_attention", "linear_attention"]
    cli("score-mmr", "h2", *SHORT)
    cli("distill", "h2", "--loss", "squared=.5,reverse-kl", "--dry-run", *SHORT)
    cli("distill", "h2", "--loss", "squared=.5,reverse-kl", *SHORT)
    cli("eval", "h2-kd", "--fidelity", "traces.jsonl", "--seq-len", 48, "--windows", 2)
    cli("generate", "h2-kd", "1 and 1?", "--max-new-tokens", 4)
    cli("bench", "teacher", "h2-kd", "--contexts", 16, "--batches", 1, "--repeats", 1, "--steps", 2)
    assert "otter" in cli("inspect", "h2-kd")
    cli("verify", "h2-kd")
    cli("export", "h2-kd", "--format", "plain")
    assert "hybridize: largest difference of a logit" in cli.stdout
    refused = cli.fails("export", "h2-kd", "--format", "hf")
    assert "has mixers of kind 'retention', whose code is" in refused
    assert "extension.py" in refused


def test_rules_that_do_not_make_the_class_are_refused_before_anything(
    place: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS["retention"]
    made = type(kind).targets
    monkeypatch.setattr(type(kind), "targets", lambda self, *given: made(self, *given)[1:])
    for flags in ((), ("--dry-run",)):
        said = cli.fails("replace", "--indices", "1,2", "--mixer", "retention", *flags)
        assert "the rules of the mixer kind 'retention' make A_log of shape None" in said
        assert not (place / "h2").exists()


def test_what_was_not_done_is_said(place: Path, cli: Runner) -> None:
    said = cli("replace", "--indices", "1", "--mixer", "retention", "--no-calibrate", "--no-verify")
    assert "not calibrated" in said
    assert "not verified: --no-verify was given" in said


def test_every_export_of_ours_refuses_it_by_name(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1,2", "--mixer", "retention", "--no-calibrate")
    for form in ("granite", "gguf"):
        said = cli.fails("export", "h2", "--format", form)
        assert "'otter' model, whose layers no stock hybrid class has" in said
        assert "use --format hf" not in said  # which refuses it too


@torch.no_grad()
def test_tokens_one_by_one_are_the_whole_text(place: Path, cli: Runner) -> None:
    """What an outside mixer must do for decoding: its cache is that of our own."""
    cli("replace", "--indices", "1,2", "--mixer", "retention")
    model = load_hybrid(CheckpointReader(place / "h2"), torch.device("cpu"), torch.float32)
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    cache, parts = None, []
    for part in ids.split(1, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert worst(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= 1e-4


def test_the_outside_loss_has_its_own_gradient(extended: None) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    leaf = ours.clone().requires_grad_(True)
    wanted = ((theirs.softmax(-1) - leaf.softmax(-1)).square() / 2).sum()
    wanted.backward()
    value, gradient = Loss.parse("squared").per_token(ours, theirs, torch.zeros(3, dtype=torch.long))
    assert float(value.sum()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert leaf.grad is not None
    assert worst(gradient, leaf.grad) <= 1e-5


def test_help_names_the_outside_scorer_and_its_flags(extended: None) -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert "score-depth    Rank layers by their depth alone." in shown.stdout
    assert "--downwards" in CliRunner().invoke(app, ["score-depth", "--help"]).stdout


def test_without_the_extension_what_is_missing_is_named(place: Path, cli: Runner) -> None:
    cli("replace", "--indices", "1", "--mixer", "retention", "--no-calibrate")
    raw = json.loads((place / "h1/config.json").read_text())
    (place / "h1/config.json").write_text(json.dumps({**raw, "base_model_type": "llama"}))
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    said = {}
    for checkpoint in ("h1", "teacher"):
        done = subprocess.run(
            [sys.executable, "-m", "hybridize.commands", "inspect", checkpoint], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        said[checkpoint] = done.stderr
    assert "of unknown kind 'retention'" in said["h1"]
    assert "needs that package to be imported" in said["h1"]
    assert "is a 'otter' model; supported families: llama" in said["teacher"]


def test_an_extension_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('half done')")
    for name, why in ((str(tmp_path / "broken.py"), "RuntimeError: half done"), ("no_such_module", "ModuleNotFoundError")):
        done = subprocess.run(
            [sys.executable, "-m", "hybridize.commands", "inspect", "teacher"], env={**os.environ, VARIABLE: name},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert f"error: the extension {name} cannot be imported: {why}" in done.stderr
        assert "Traceback" not in done.stderr
