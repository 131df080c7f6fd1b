"""Stock runtimes on exported models: `make test-runtimes` installs them and runs this; the default
run skips it.

HYBRIDIZE_VLLM: a Python that has vLLM. HYBRIDIZE_MODEL: a converted checkpoint of your own, whose
answer to a chat message all three must agree on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Runner, hybrid, make_teacher, make_tokenizer
from tests.test_gguf import SPLITTERS
from tests.test_granite import LLAMA3, disturbed
from tests.test_surgery import convert

pytestmark = [
    pytest.mark.skipif("HYBRIDIZE_VLLM" not in os.environ, reason="make test-runtimes installs vLLM and says where"),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="make test-runtimes installs llama-cpp-python"),
]
NEW, CHAT, CHAT_TOKENS = 24, "What is 17 plus 25?", 40
WIDE = dict(hidden_size=128, head_dim=32, intermediate_size=96)  # vLLM's CPU attention has no head of 8
SHAPES: dict[str, dict[str, Any]] = {
    "plain": WIDE,
    "tied, llama3 rope": WIDE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}
TEXTS = (
    "Hello  world!\n\n  It's 2024,\twe'd paid $1,234.56 (99%)...", "x=3*(y+12)//7 #tags\r\n   indented\n", "a",
    "Größe, naïve café, 東京 42", "DON'T stop; they'LL see I'm here  ", " leading and trailing \n",
)  # fmt: skip


def greedy(source: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Continuations by the checkpoint, one prompt at a time, through the end-of-text token."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    outs = [model.generate(torch.tensor([p]), max_new_tokens=new, do_sample=False)[0, len(p) :] for p in prompts]
    return [out.tolist() for out in outs]


def prompts_for(vocab: int) -> list[list[int]]:
    """16 prompts of 3 to 120 tokens; half of them begin alike, for the prefix cache."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, vocab, (n,), generator=g).tolist()  # noqa: E731
    shared = draw(70)
    return [draw(n) for n in (3, 5, 17, 31, 64, 65, 99, 120)] + [shared + draw(n) for n in (1, 2, 8, 20, 33, 40, 45, 50)]


def ask_vllm(model: Path, folder: Path, prompts: list[list[int]], chat: str | None = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    ask, answer = folder / "ask.json", folder / "answer.json"
    ask.write_text(json.dumps({"prompts": prompts, "new_tokens": NEW, "chat": chat, "chat_tokens": CHAT_TOKENS}))
    script = Path(__file__).with_name("ask_vllm.py")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [os.environ["HYBRIDIZE_VLLM"], str(script), str(model), str(ask), str(answer)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return json.loads(answer.read_text())


def verified(cli: Runner, source: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Exports with --verify; the runtime's verdict, which must be there."""
    found = json.loads(cli("export", source, "-o", out, "--json", *flags))
    assert found["verified"] is not None, found["unverified"]
    return found["verified"]


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    make_teacher(folder / "teacher", **SHAPES[request.param])
    convert(folder / "teacher", [1, 2], folder / "h")
    return disturbed(folder / "h")


def test_vllm_gives_the_same_tokens(source: Path, tmp_path: Path, cli: Runner) -> None:
    verified(cli, source, tmp_path / "granite", "--format", "granite")
    prompts = prompts_for(260)
    wanted = greedy(source, prompts, NEW)
    for run in ask_vllm(tmp_path / "granite", tmp_path / "ask", prompts)["runs"]:
        assert run == wanted


def test_llama_cpp_gives_the_same_logits(source: Path, tmp_path: Path, cli: Runner) -> None:
    found = verified(cli, source, tmp_path / "f32", "--format", "gguf", "--outtype", "f32")
    assert found["difference"] <= 1e-5 * found["largest_logit"]
    assert found["equal"] == found["tokens"] > 60
    half = verified(cli, source, tmp_path / "f16", "--format", "gguf", "--outtype", "f16")
    assert half["difference"] <= 1e-2 * half["largest_logit"]


def test_llama_cpp_with_biases(tmp_path: Path, cli: Runner) -> None:
    model = hybrid("ama", "mamba2", vocab_size=260, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "h")
    make_tokenizer().save_pretrained(tmp_path / "h")
    found = verified(cli, tmp_path / "h", tmp_path / "out", "--format", "gguf", "--outtype", "f32")
    assert found["difference"] <= 1e-5 * found["largest_logit"]


def test_llama_cpp_with_wide_heads(tmp_path: Path, cli: Runner) -> None:
    make_teacher(tmp_path / "teacher", hidden_size=48, head_dim=16)
    convert(tmp_path / "teacher", [0, 2], tmp_path / "h")
    found = verified(cli, disturbed(tmp_path / "h"), tmp_path / "out", "--format", "gguf", "--outtype", "f32")
    assert found["difference"] <= 1e-5 * found["largest_logit"]


@pytest.mark.parametrize("pre", [pre for pre in SPLITTERS if pre])
def test_llama_cpp_splits_text_the_same(tmp_path: Path, cli: Runner, pre: str) -> None:
    """A small BPE trained behind each splitter that we name, on texts full of digits, blanks,
    contractions and accents."""
    import llama_cpp

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[pre])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|pad|>", "<|end|>"])
    core.train_from_iterator([*TEXTS] * 3, trainer)
    make_teacher(tmp_path / "teacher", vocab=core.get_vocab_size())
    convert(tmp_path / "teacher", [1], tmp_path / "h")
    core.save(str(tmp_path / "h/tokenizer.json"))
    cli("export", tmp_path / "h", "--format", "gguf", "-o", tmp_path / "out", "--no-verify")
    model = llama_cpp.Llama(str(tmp_path / "out/h-F16.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False, special=True) == core.encode(text).ids, text


@pytest.mark.skipif("HYBRIDIZE_MODEL" not in os.environ, reason="make test-runtimes MODEL=a converted checkpoint")
def test_a_converted_model_answers_in_all_three(tmp_path: Path, cli: Runner) -> None:
    """The same chat message, greedy: stock transformers, vLLM and llama.cpp give the checkpoint's
    own words."""
    import llama_cpp

    source = Path(os.environ["HYBRIDIZE_MODEL"])
    print("transformers:", verified(cli, source, tmp_path / "granite", "--format", "granite"))
    print("llama.cpp f32:", verified(cli, source, tmp_path / "f32", "--format", "gguf", "--outtype", "f32"))
    print("llama.cpp q8_0:", verified(cli, source, tmp_path / "q8_0", "--format", "gguf", "--outtype", "q8_0"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    told = [{"role": "user", "content": CHAT}]
    prompt = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "granite", dtype=torch.float32)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=CHAT_TOKENS, do_sample=False)[0, len(prompt) :]
    answers = {"transformers": tokenizer.decode(made, skip_special_tokens=True)}

    prompts = prompts_for(tokenizer.vocab_size)
    found = ask_vllm(tmp_path / "granite", tmp_path / "ask", prompts, CHAT)
    answers["vLLM"] = found["chat"]
    (file,) = (tmp_path / "f32").glob("*.gguf")
    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(str(file), n_ctx=512, type_k=f32, type_v=f32, verbose=False)
    chat = llama.create_chat_completion(told, temperature=0, max_tokens=CHAT_TOKENS)
    answers["llama.cpp"] = chat["choices"][0]["message"]["content"]
    for name, text in answers.items():
        print(f"{name:12} {text!r}")
    assert answers["transformers"].strip()
    assert len(set(answers.values())) == 1
    wanted = greedy(source, prompts, NEW)
    for run in found["runs"]:
        assert run == wanted


def test_the_embedded_teacher_converted(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli("demo")
    cli("replace", "--indices", "2-5", "-o", "h4", "--calibration-tokens", 4096)
    verified(cli, Path("h4"), tmp_path / "granite", "--format", "granite")
    found = verified(cli, Path("h4"), tmp_path / "f32", "--format", "gguf", "--outtype", "f32")
    assert found["difference"] <= 1e-5 * found["largest_logit"]
    eight = verified(cli, Path("h4"), tmp_path / "q8_0", "--format", "gguf", "--outtype", "q8_0")
    assert eight["difference"] <= 5e-2 * eight["largest_logit"]  # a trained model; random weights blow rounding up
    tokenizer = AutoTokenizer.from_pretrained("h4")
    text = "Ann has 4 apples. Bob has 3 more apples than Ann. How many apples does Bob have?"
    told = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)
    prompts = [told["input_ids"]] * 2
    for run in ask_vllm(tmp_path / "granite", tmp_path / "ask", prompts)["runs"]:
        assert run == greedy(Path("h4"), prompts, NEW)
