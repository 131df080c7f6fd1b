"""The verdict on an export: what passes, what does not, and what a tie is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridize.errors import WorkError
from hybridize.export.formats import FORMATS
from hybridize.export.formats.gguf import BOUNDS
from hybridize.export.verify import BOUND, Reference, judge
from tests.conftest import Runner
from tests.test_granite import make_hybrid, stock

PROMPTS, SEQUENCES = [[1, 2], [3]], [[1, 2, 0, 1], [3, 2]]


def reference() -> Reference:
    """Two prompts over three tokens; each greedy token leads by 1, but the last one, which leads by
    1e-5."""
    rows = [torch.tensor([[9.0, 8, 7], [9, 8, 7], [8, 9, 7], [9, 8, 7]]), torch.tensor([[8.0, 8.99999, 9], [9, 8, 7]])]
    return Reference(PROMPTS, SEQUENCES, rows)


def verdict(made: list[list[int]], change: float = 0.0, share: float = BOUND, exact: bool = True):
    wanted = reference()
    return judge("it", wanted, [part + change for part in wanted.logits], made, share, exact)


def test_equal_is_equal() -> None:
    found = verdict([[0, 1], [2]])
    assert (found.difference, found.equal, found.tokens, found.ties) == (0.0, 3, 3, 0)
    assert "3 of 3 greedy tokens equal" in found.sentence()


def test_a_tie_is_told_apart_from_a_difference() -> None:
    found = verdict([[0, 1], [1]])
    assert (found.equal, found.ties) == (2, 1)
    with pytest.raises(WorkError, match=r"continues differently than the checkpoint \(2, not 1\)"):
        verdict([[0, 2], [2]])


def test_a_reference_that_is_not_greedy_is_no_tie() -> None:
    """The token that the runtime chose is far above the reference's: no rounding explains that."""
    wanted = Reference([[1]], [[1, 2]], [torch.tensor([[9.0, 8, 1], [0, 0, 0]])])
    with pytest.raises(WorkError, match="continues differently"):
        judge("it", wanted, wanted.logits, [[0]], BOUND, exact=True)


def test_too_few_tokens_are_not_equal() -> None:
    with pytest.raises(WorkError, match=r"\(None, not 0\)"):
        verdict([[], [2]])


@pytest.mark.parametrize("exact", [True, False])
def test_no_number_at_all(exact: bool) -> None:
    wanted = reference()
    spoiled = [wanted.logits[0], wanted.logits[1] * torch.nan]
    with pytest.raises(WorkError, match="not finite"):
        judge("it", wanted, spoiled, [[0, 1], [2]], 0.5, exact)


def test_bounds() -> None:
    assert verdict([[0, 1], [2]], change=8e-4).difference == pytest.approx(8e-4, rel=1e-2)
    with pytest.raises(WorkError, match=r"differ by 1\.0e-03, more than 9\.0e-04"):
        verdict([[0, 1], [2]], change=1e-3)
    rounded = verdict([[2, 2], [0]], change=0.1, share=BOUNDS["f16"], exact=False)
    assert (rounded.equal, rounded.ties) == (0, 0)
    with pytest.raises(WorkError, match="differ by 5"):
        verdict([[0, 1], [2]], change=5.0, share=BOUNDS["q8_0"], exact=False)


@pytest.mark.parametrize("form", ["hf", pytest.param("granite", marks=stock)])
def test_generation_settings_of_the_checkpoint_do_not_matter(tmp_path: Path, cli: Runner, form: str) -> None:
    source = make_hybrid(tmp_path)
    own = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(own | {"repetition_penalty": 1.7, "do_sample": True}))
    found = json.loads(cli("export", source, "--format", form, "-o", tmp_path / "out", "--json"))["verified"]
    assert (found["equal"], found["ties"]) == (found["tokens"], 0)


def test_code_that_does_not_run_never_appears(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf is verified through the files that are exported, not through the classes of this package."""
    source, real = make_hybrid(tmp_path), FORMATS["hf"].write

    def spoiled(checkpoint: object, plan: object, path: Path, *arguments: object) -> Path:
        made = real(checkpoint, plan, path, *arguments)
        (path / "mamba2.py").write_text("raise RuntimeError('spoiled')")
        return made

    monkeypatch.setattr(FORMATS["hf"], "write", spoiled)
    before = sorted(tmp_path.rglob("*"))
    text = cli.fails("export", source, "-o", tmp_path / "out", code=1)
    assert "the export does not load in transformers" in text
    assert "(RuntimeError: spoiled)" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_tokenizer_is_told_before_anything_is_written(tmp_path: Path, cli: Runner) -> None:
    source = make_hybrid(tmp_path)
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert "--no-verify skips it" in cli.fails("export", source, "-o", tmp_path / "out")
    cli("export", source, "-o", tmp_path / "out", "--no-verify")
