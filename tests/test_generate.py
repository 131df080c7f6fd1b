"""generate: what a sampler draws, that answers depend on prompt and seed alone, and what is left of
an interrupted run."""

from __future__ import annotations

import fcntl
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hybridize.data.rows import read_rows
from hybridize.errors import InputError
from hybridize.generation.sampling import Sampler, SamplingSettings, distribution
from hybridize.generation.settings import read_generation
from hybridize.generation.traces import Traces
from hybridize.generation.writing import Wanted, seed_of, write
from hybridize.runtime.loading import load_tokenizer
from tests.conftest import Runner, hybrid


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.0]), top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_distribution_is_transformers_own(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(4, 37)
    made = SamplingSettings(temperature, top_k, top_p, min_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(None, logits.clone()).softmax(-1)
    probabilities, ids = distribution(logits, made)
    found = torch.zeros_like(logits).scatter(1, ids, probabilities)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_sampler_draws_from_the_distribution_and_greedy_takes_the_best() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 8)
    sampler = Sampler(SamplingSettings(1.0, top_p=0.9), 1, 4000, torch.device("cpu"))
    sampler.begin(0, 5, seed=3)
    drawn = torch.stack([sampler(logits, torch.tensor([5 + at]), logits) for at in range(4000)])[:, 0]
    probabilities, ids = distribution(logits, sampler.settings)
    expected = torch.zeros(8).scatter(0, ids[0], probabilities[0])
    assert (torch.bincount(drawn, minlength=8) / 4000 - expected).abs().max() < 0.03
    assert int(Sampler(SamplingSettings(), 1, 1, torch.device("cpu"))(logits, torch.tensor([5]), logits)) == int(
        logits.argmax()
    )


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}]
)
def test_bad_sampling(bad: dict[str, float]) -> None:
    with pytest.raises(InputError):
        SamplingSettings(**bad)  # type: ignore[arg-type]


def test_an_answer_depends_on_its_prompt_and_seed_alone(kind: str) -> None:
    """In any company, in any row, at any time."""
    model = hybrid("amma", kind).eval()
    wanted = [Wanted((n, 0), [3 + n, *range(2, 2 + 3 * n)], seed_of(7, (n, 0))) for n in range(5)]
    told = dict(longest=13, new=9, ends={1}, settings=SamplingSettings(1.5))
    alone = {w.key: next(iter(write(model, [w], rows=1, **told))) for w in wanted}
    for rows in (2, 5):
        together = {found.key: found for found in write(model, wanted[::-1], rows=rows, **told)}
        assert together == alone
    assert len({tuple(found.ids) for found in alone.values()}) == 5
    ends = {alone[wanted[2].key].ids[4]}
    cut = next(iter(write(model, [wanted[2]], rows=1, **{**told, "ends": ends})))
    first = alone[wanted[2].key].ids.index(next(iter(ends)))
    assert cut.ended
    assert cut.ids == alone[wanted[2].key].ids[:first]


def chat_prompts(path: Path, count: int = 5) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "old"}]} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_traces_can_be_distilled_on(cli: Runner, teacher: Path, tmp_path: Path) -> None:
    prompts, output = chat_prompts(tmp_path / "prompts.jsonl"), tmp_path / "traces.jsonl"
    common = [
        "generate",
        teacher,
        "--prompts",
        prompts,
        "--max-new-tokens",
        6,
        "--temperature",
        1,
        "--samples",
        2,
        "-o",
        output,
    ]
    told = json.loads(cli(*common, "--json"))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert told["answers"] == len(lines)
    assert told["answers"] + told["empty"] == 10
    assert [(line["row"], line["sample"]) for line in lines] == sorted((line["row"], line["sample"]) for line in lines)
    assert all(line["messages"][0]["content"] == f"say {line['row']}" and len(line["messages"]) == 2 for line in lines)
    assert len(read_rows(str(output))) == len(lines)
    assert not list(tmp_path.glob("*.part"))
    assert "exists" in cli.fails(*common)
    before = output.read_text()
    cli(*common, "--overwrite", "--batch-size", 3)
    assert output.read_text() == before
    cli(*common, "--overwrite", "--seed", 1)
    assert output.read_text() != before


def test_a_run_is_gone_on_with(cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, output = chat_prompts(tmp_path / "prompts.jsonl"), tmp_path / "traces.jsonl"
    common = ["generate", teacher, "--prompts", prompts, "--max-new-tokens", 6, "--temperature", 1, "-o", output]
    cli(*common)
    whole = output.read_text()
    output.unlink()
    add = Traces.add

    def interrupted(self: Traces, key: tuple[int, int], line: dict[str, object]) -> None:
        if len(self.lines) == 2:
            raise KeyboardInterrupt
        add(self, key, line)

    with monkeypatch.context() as patched:
        patched.setattr(Traces, "add", interrupted)
        cli.fails(*common, code=130)
    part = tmp_path / "traces.jsonl.part"
    assert not output.exists()
    assert len(part.read_text().splitlines()) == 3
    part.write_text(part.read_text() + '{"messages": [{"ro')  # the last line was torn
    assert "continue it with --resume" in cli.fails(*common)
    assert "started with another seed" in cli.fails(*common, "--seed", 3, "--resume")
    kept = prompts.read_text()
    prompts.write_text(kept.replace("say 0", "say no"))
    assert "started with another prompts" in cli.fails(*common, "--resume")
    prompts.write_text(kept)
    gc.collect()  # the interrupted run's file was in this process too
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "written by another process" in cli.fails(*common, "--resume")
    cli(*common, "--resume")
    assert output.read_text() == whole
    assert not part.exists()
    part.write_text("what\n" * 2)
    output.unlink()
    assert "not a line of an unfinished run" in cli.fails(*common, "--resume")


def test_one_prompt_is_answered_on_stdout(cli: Runner, teacher: Path) -> None:
    told = json.loads(cli("generate", teacher, "hello", "--max-new-tokens", 5, "--json"))
    (answer,) = told["answers"]
    assert cli("generate", teacher, "hello", "--max-new-tokens", 5).startswith(answer["text"])
    two = json.loads(cli("generate", teacher, "hello", "--max-new-tokens", 5, "--samples", 2, "--temperature", 2, "--json"))
    assert len(two["answers"]) == 2
    assert answer["tokens"] <= 5


def test_what_ends_an_answer_and_what_samples(teacher: Path, tmp_path: Path) -> None:
    """End tokens of generation_config.json and config.json, else the tokenizer's; its sampling only
    where it samples."""
    home = shutil.copytree(teacher, tmp_path / "other")
    tokenizer = load_tokenizer(home)
    for said, wanted in (
        ({"do_sample": False, "top_p": 0.5, "eos_token_id": [7, 9]}, SamplingSettings()),
        ({"do_sample": True, "top_p": 0.5, "top_k": 3, "eos_token_id": 7}, SamplingSettings(1.0, 3, 0.5)),
        ({"do_sample": True}, SamplingSettings(1.0, 50)),
    ):
        (home / "generation_config.json").write_text(json.dumps(said))
        found = read_generation(home, {"eos_token_id": 5}, tokenizer, {})
        assert found.sampling == wanted
        own = said.get("eos_token_id", [])
        assert found.ends == {*(own if isinstance(own, list) else [own]), 5}
    (home / "generation_config.json").unlink()
    assert read_generation(home, {"eos_token_id": [5, 6]}, tokenizer, {}).ends == {5, 6}
    assert read_generation(home, {}, tokenizer, {}).ends == {tokenizer.eos_token_id}
    asked = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1}
    assert read_generation(home, {}, tokenizer, asked).sampling == SamplingSettings(0.7, 0, 0.9, 0.1)


def test_bad_input(cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "either one prompt" in cli.fails("generate", teacher)
    assert "either one prompt" in cli.fails("generate", teacher, "hi", "--prompts", "x.jsonl")
    assert "does not exist" in cli.fails("generate", teacher, "--prompts", tmp_path / "none.jsonl")
    rows = tmp_path / "rows.jsonl"
    for row, complaint in (
        ("[1]", "not a JSON object"), ('{"text": "a"}', "neither `messages`"), ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message before"), ('{"prompt": ""}', "neither"),
    ):  # fmt: skip
        rows.write_text(row + "\n")
        assert complaint in cli.fails("generate", teacher, "--prompts", rows, "-o", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.part").exists()
    assert "is a directory" in cli.fails("generate", teacher, "--prompts", chat_prompts(rows), "-o", tmp_path)
    assert "--top-p" in cli.fails("generate", teacher, "hi", "--top-p", 0)
    assert "--samples above 1 requires --temperature above 0" in cli.fails("generate", teacher, "hi", "--samples", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "does not support torchrun" in cli.fails("generate", teacher, "hi")
