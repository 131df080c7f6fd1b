"""A checkpoint's generation settings: followed as transformers follows them, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as theirs

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.evaluation.harness import EvalSettings, evaluate, open_tasks, repeatable
from hybridize.generation import decoder
from hybridize.generation.sampling import Rules, SamplingSettings, ruled
from hybridize.generation.settings import FOLLOWED, REFUSED, REFUSED_IN_SAMPLING, settings_of
from hybridize.generation.writing import Wanted, write
from hybridize.runtime.loading import load_hybrid, load_model, load_tokenizer
from tests.conftest import Runner, hybrid, make_tokenizer
from tests.families import make_family

CPU, VOCABULARY, ENDS = torch.device("cpu"), 11, (1, 4)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4),
    prompt=st.integers(1, 9), penalty=st.sampled_from([1.0, 0.5, 1.3]), ngram=st.integers(0, 4),
    suppress=st.lists(st.integers(0, VOCABULARY - 1), max_size=3), begin=st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    least=st.integers(0, 10), new=st.integers(0, 6), seed=st.integers(0, 999),
)  # fmt: skip
def test_rules_are_transformers_own(
    rows: list[list[int]], prompt: int, penalty: float, ngram: int, suppress: list[int], begin: list[int], least: int, new: int,
    seed: int,
) -> None:  # fmt: skip
    """Every row by itself against transformers' processors in their order; what stands behind a
    row's tokens is stale."""
    torch.manual_seed(seed)
    logits, history = torch.randn(len(rows), VOCABULARY), torch.randint(0, VOCABULARY, (len(rows), 12))
    for at, row in enumerate(rows):
        history[at, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    starts = lengths.clamp(max=prompt)
    rules = Rules(penalty, ngram, tuple(suppress), tuple(begin), (), least, new, ENDS)
    found = ruled(logits, history, lengths, starts, rules)
    for at, row in enumerate(rows):
        start, ends = int(starts[at]), list(ENDS)
        processors = LogitsProcessorList()
        if penalty != 1:
            processors.append(theirs.RepetitionPenaltyLogitsProcessor(penalty))
        if ngram:
            processors.append(theirs.NoRepeatNGramLogitsProcessor(ngram))
        if least:
            processors.append(theirs.MinLengthLogitsProcessor(least, ends))
        if new:
            processors.append(theirs.MinNewTokensLengthLogitsProcessor(start, new, ends))
        processors.append(theirs.SuppressTokensLogitsProcessor(suppress))
        processors.append(theirs.SuppressTokensAtBeginLogitsProcessor(begin, start))
        wanted = processors(torch.tensor([row]), logits[at : at + 1].clone())[0]
        assert torch.equal(torch.isfinite(found[at]), torch.isfinite(wanted))
        assert torch.allclose(found[at], wanted, rtol=1e-6, atol=0)


NAMES = (*FOLLOWED, "all")


@pytest.mark.parametrize("name", NAMES)
def test_answers_equal_transformers_generate(name: str, kind: str) -> None:
    """Greedy, side by side in our decoder and one by one in transformers', with settings that this
    model's answers run into."""
    model, prompts = hybrid("amma", kind), [[3 + n, *range(2, 5 + n)] for n in range(4)]

    def stock(ids: list[int], ends: list[int], **chosen: Any) -> list[int]:
        told = dict(
            max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0, attention_mask=torch.ones(1, len(ids))
        )
        return model.generate(torch.tensor([ids]), **told, **chosen)[0, len(ids) :].tolist()

    plain = [stock(ids, [1]) for ids in prompts]
    ends = [1, plain[0][3]]
    before = [stock(ids, ends) for ids in prompts]
    every: dict[str, Any] = {
        "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "suppress_tokens": [plain[0][1], plain[1][2]],
        "begin_suppress_tokens": [answer[0] for answer in plain], "min_length": 12, "min_new_tokens": 9,
        "bad_words_ids": [[plain[0][2]], [plain[2][1]]],
    }  # fmt: skip
    chosen = every if name == "all" else {name: every[name]}
    generation = settings_of({**vars(GenerationConfig()), **chosen}, {}, False, ends)
    assert not generation.others
    wanted = [Wanted((n, 0), ids, 0) for n, ids in enumerate(prompts)]
    written = write(model, wanted, 9, 20, generation.ends, generation.sampling, rows=4, rules=generation.rules)
    found = {one.key[0]: one for one in written}
    answers = [stock(ids, ends, **chosen) for ids in prompts]
    for n, answer in enumerate(answers):
        assert found[n].ids == (answer[:-1] if answer[-1] in ends else answer)
        assert found[n].ended == (answer[-1] in ends)
    assert answers != before, "settings that change nothing would show nothing"


@pytest.mark.gpu
def test_a_captured_step_follows_them_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers with the step as a CUDA graph and call by call; a logit that is not finite
    is seen in both."""
    model = hybrid("amma", kind).to("cuda")
    rules = Rules(1.7, 2, (5, 7), (9, 3), (8,), 12, 9, (1, 6))
    wanted = [Wanted((n, 0), [3 + n, *range(2, 5 + n)], n) for n in range(4)]
    for sampling in (SamplingSettings(), SamplingSettings(1.2, 20, 0.9)):
        found = []
        for capture in (True, False):
            monkeypatch.setattr(decoder, "can_capture", lambda _, capture=capture: capture)
            written = write(model, wanted, 9, 20, {1, 6}, sampling, rows=4, rules=rules)
            found.append({one.key: (one.ids, one.ended, one.broken) for one in written})
        assert found[0] == found[1]
        assert not any(broken for _, _, broken in found[0].values())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    monkeypatch.setattr(decoder, "can_capture", lambda _: True)
    assert all(one.broken for one in write(model, wanted, 9, 20, {1, 6}, SamplingSettings(), rows=4))


def test_every_setting_is_followed_refused_or_of_no_effect() -> None:
    """Any that transformers adds must be looked at: which tokens are written may hang on it."""
    no_effect = {  # caches, outputs, ids, beams without beams, drafts, lengths that the command gives
        "max_length", "max_new_tokens", "early_stopping", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
        "length_penalty", "renormalize_logits", "remove_invalid_values", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
        "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "compile_config", "disable_compile", "continuous_batching_config",
        "low_memory", "diversity_penalty", "prefill_chunk_size", "transformers_version", "use_mtp", "assistant_ensemble_weight",
        "speculation_type",
    }  # fmt: skip
    drawn = {"do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id"}
    known = set(FOLLOWED) | set(REFUSED) | set(REFUSED_IN_SAMPLING) | drawn | no_effect
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= known


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"num_beams": 4}, "num_beams"), ({"guidance_scale": 1.5}, "guidance_scale"), ({"stop_strings": ["a"]}, "stop_strings"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id"), ({"bad_words_ids": [[4, 5]]}, "bad_words_ids"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_refused_by_name(
    cli: Runner, teacher: Path, tmp_path: Path, said: dict[str, Any], name: str
) -> None:
    home = shutil.copytree(teacher, tmp_path / "home")
    (home / "generation_config.json").write_text(json.dumps(said))
    assert f"generation_config.json has {name} = " in cli.fails("generate", home, "hi", "--max-new-tokens", 2)
    (home / "generation_config.json").write_text(json.dumps({"typical_p": 0.9, "temperature": 0.6, "top_k": 3}))
    cli("generate", home, "hi", "--max-new-tokens", 2)  # of no effect where nothing is sampled


EXACT = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["zzzz"], max_gen_toks: {new}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def both_ways(home: Path, place: Path, new: int, model: Any, side: int = 1) -> tuple[list[Any], list[Any]]:
    """Answers of stock lm-eval, `side` documents a batch, and of ours."""
    (place / "docs.jsonl").write_text("".join(json.dumps({"text": f"say {n}" * (n + 1)}) + "\n" for n in range(4)))
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks/plain.yaml").write_text(EXACT.format(name="plain", file=place / "docs.jsonl", new=new))
    chosen = EvalSettings(("plain",), batch_size=4, include_path=str(place / "tasks"))
    manager, tokenizer = repeatable(open_tasks(chosen)), load_tokenizer(home)
    stock = HFLM(pretrained=load_model(home, CPU, torch.float32), tokenizer=tokenizer, batch_size=side)
    wanted = simple_evaluate(model=stock, tasks=["plain"], task_manager=manager, log_samples=True, bootstrap_iters=0)
    found = evaluate(model, tokenizer, chosen, manager)
    return [s["resps"] for s in wanted["samples"]["plain"]], [s["resps"] for s in found["samples"]["plain"]]


@pytest.mark.parametrize(
    "said", [{"no_repeat_ngram_size": 2}, {"repetition_penalty": 2.0, "suppress_tokens": [40, 41]}, {"num_beams": 2}]
)
def test_eval_follows_them_as_stock_lm_eval_does(teacher: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    home = shutil.copytree(teacher, tmp_path / "home")
    plain, _ = both_ways(home, tmp_path, 12, load_hybrid(CheckpointReader(home), CPU, torch.float32))
    (home / "generation_config.json").write_text(json.dumps(said | {"eos_token_id": 1, "pad_token_id": 0}))
    wanted, found = both_ways(home, tmp_path, 12, load_hybrid(CheckpointReader(home), CPU, torch.float32))
    assert found == wanted
    assert wanted != plain


def test_eval_of_a_longrope_teacher_answers_as_stock_does(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its original length the tables change, and the old keys with them."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    home = make_family(
        tmp_path / "long", "phi3", rope_parameters=rope, original_max_position_embeddings=24, vocab_size=260
    )  # fmt: skip
    make_tokenizer().save_pretrained(home)
    monkeypatch.chdir(tmp_path)
    common = ("eval", home, "--tasks", "plain", "--include-path", "tasks", "--log-samples", "--device", "cpu", "--overwrite")
    for side in (1, 4):
        wanted, _ = both_ways(home, tmp_path, 24, load_model(home, CPU, torch.float32), side)
        cli(*common, "--batch-size", side, "-o", "ev")
        lines = [json.loads(line) for line in (tmp_path / "ev/samples.jsonl").read_text().splitlines()]
        assert [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])] == wanted
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    assert "longrope" in cli.fails("replace", home, "--indices", 1, "--no-calibrate")
    assert "longrope" in cli.fails("generate", home, "hi")


@pytest.mark.parametrize(
    "said",
    [
        {"min_length": 1e30}, {"min_new_tokens": "3"}, {"min_new_tokens": 0.5}, {"no_repeat_ngram_size": 2.7},
        {"bad_words_ids": [5]},
        {"bad_words_ids": "x"}, {"suppress_tokens": 3}, {"top_k": "many"}, {"repetition_penalty": "x"},
    ],
)  # fmt: skip
def test_settings_of_no_sense_are_named_before_weights(
    cli: Runner, teacher: Path, tmp_path: Path, said: dict[str, Any]
) -> None:
    home = shutil.copytree(teacher, tmp_path / "home")
    (home / "generation_config.json").write_text(json.dumps(said))
    assert "generation_config.json cannot be read" in cli.fails("generate", home, "hi")
    (home / "generation_config.json").write_text('{"no_repeat_ngram_size": -1}')
    cli("generate", home, "hi", "--max-new-tokens", 2)


def test_sampling_settings_of_a_checkpoint_that_samples() -> None:
    made = vars(GenerationConfig()) | {"repetition_penalty": 1.05}
    found = settings_of(made, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, True, [1])
    assert found.sampling == SamplingSettings(0.7, 20, 0.8)
    assert found.rules == Rules(1.05, ends=(1,))
    assert Rules(ends=(1,)).idle
    assert not found.rules.idle
