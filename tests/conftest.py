"""A tiny random teacher with tokenizer and traces, made afresh; no downloads."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hybridize.commands import app
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hybridize.modeling import HybridConfig, HybridForCausalLM, kernels_missing

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1], model_max_length=512, padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_teacher(path: Path, layers: int = 4, vocab: int = 260, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)  # logits that differ between tokens, so that equal greedy tokens mean something
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write_traces(path: Path, count: int = 24) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": f"That is {2 * i}."}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHAPES = {
    "mamba": {"kind": "mamba", "d_inner": 32, "d_state": 4, "d_conv": 4, "dt_rank": 2, "expand": "head"},
    "mamba2": {"kind": "mamba2", "d_inner": 32, "d_state": 8, "d_conv": 4},
}


def hybrid_config(kinds: str, kind: str = "mamba", **changes: object) -> HybridConfig:
    """`kinds`: a letter a layer, m Mamba, a attention; kind: which mixer."""
    settings = dict(
        base_model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=len(kinds),
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, mixer=SHAPES[kind],
        layer_types=[{"m": "linear_attention", "a": "full_attention"}[kind] for kind in kinds],
    )  # fmt: skip
    return HybridConfig(**{**settings, **changes})


def hybrid(kinds: str, kind: str = "mamba", seed: int = 0, **changes: object) -> HybridForCausalLM:
    torch.manual_seed(seed)
    model = HybridForCausalLM(hybrid_config(kinds, kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and not name.endswith(("A_log", "D", "dt_bias")):
                parameter.mul_(5)
    return model


@pytest.fixture(params=list(SHAPES))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of mixer in turn."""
    return request.param


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_traces(tmp_path_factory.mktemp("data") / "traces.jsonl")


def make_place(place: Path, *commands: tuple[object, ...]) -> Path:
    """A folder with the tiny teacher and its traces, in which `commands` have run."""
    make_teacher(place / "teacher")
    write_traces(place / "traces.jsonl", 40)
    with contextlib.chdir(place):
        for command in commands:
            Runner()(*command)
    return place


class Runner:
    """Runs the command line in process; keeps stdout and stderr apart."""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        self.stdout, self.stderr = result.stdout, result.stderr
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        return result.stdout

    def fails(self, *arguments: object, code: int = 2) -> str:
        """Runs what must fail; returns the one sentence it says."""
        self(*arguments, code=code)
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0]


@pytest.fixture
def cli() -> Runner:
    return Runner()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = kernels_missing()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs the CUDA kernels: {reason}"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws without a generator of their own are the same in every run; HYBRIDIZE_TEST_SEED gives
    others."""
    torch.manual_seed(int(os.environ.get("HYBRIDIZE_TEST_SEED", "0")))


@pytest.fixture(scope="session", autouse=True)
def untuned() -> None:
    """One small configuration for each Triton kernel: trying them all takes a minute a shape, and
    no test reads a clock."""
    if kernels_missing() is not None:
        return
    import mamba_ssm.ops.triton as home
    from triton.runtime.autotuner import Autotuner

    for found in pkgutil.iter_modules(home.__path__):
        for kernel in vars(importlib.import_module(f"{home.__name__}.{found.name}")).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = [min(kernel.configs, key=lambda c: (sum(c.kwargs.values()), c.num_stages))]


def interrupt_after(steps: int) -> Callable[..., None]:
    """What may stand in for `Optimization.update`: it raises an interrupt once it has taken so many
    steps."""
    from hybridize.distillation.optimize import Optimization

    update, count = Optimization.update, list[int]()

    def stopping(*given: object) -> None:
        update(*given)  # type: ignore[arg-type]
        count.append(1)
        if len(count) == steps:
            raise KeyboardInterrupt

    return stopping


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the size of `other`; printed, so that a failure shows how far
    off it is."""
    assert one.shape == other.shape
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    assert torch.isfinite(one).all()
    difference = (one - other).abs()
    print(f"max difference {difference.max():.3e}, mean {difference.mean():.3e}, size {other.abs().max():.3e}")
    return float(difference.max() / other.abs().max().clamp(min=1e-30))


def rounding(model: torch.nn.Module, run: Callable[[], Sequence[torch.Tensor]], draws: int = 3) -> list[float]:
    """What float32 explains of a difference between two ways to compute the same: how far each
    result of `run` moves where every weight is off by one unit in its last place. Two ways round
    every operation once or so differently, as such weights would; so a small multiple of this
    bounds their difference on any CPU, however the sums cancel."""
    base, moved = [value.detach().clone() for value in run()], []
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
                parameter.copy_(kept[name] * (1 + signs * torch.finfo(torch.float32).eps))
        moved.append([float((value.detach() - before).abs().max()) for value, before in zip(run(), base, strict=True)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    found = [max(each) for each in zip(*moved, strict=True)]
    print("rounding explains", ", ".join(f"{value:.2e}" for value in found))
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, of finite values."""
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return float((one.detach() - other.detach()).abs().max())
