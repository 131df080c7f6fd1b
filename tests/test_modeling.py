"""The hybrid model: caches, padding, packing, generation, types. docs/concepts/architecture.md's
numbers on tiny random models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hybridize.errors import InputError
from hybridize.modeling import FLOAT32, HybridConfig
from hybridize.runtime.loading import load_model
from tests.conftest import apart, hybrid, hybrid_config, rounding, worst

LAYOUTS = ["ammam", "mmm", "aa", "ma"]
ROUNDS = 16  # times what one unit in the last place of every weight explains, see conftest.rounding
# on CUDA a cached step runs the torch backend against the kernel, which may differ by 1e-3 of the
# largest entry
CUDA = 1e-3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def ids(batch: int, length: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def check(one: torch.Tensor, other: torch.Tensor, explained: float) -> None:
    """Both are the same but for rounding; on CUDA, two backends."""
    size = float(other.detach().abs().max())
    bound = ROUNDS * explained if one.device.type == "cpu" else max(CUDA * size, ROUNDS * explained)
    difference = apart(one, other)
    print(f"difference {difference:.2e}, bound {bound:.2e}, size {size:.2e}")
    assert difference <= bound


def check_greedy(model: torch.nn.Module, prompt: torch.Tensor, one: list[int], other: list[int]) -> None:
    """Two greedy continuations are the same up to where the two tokens are as likely as rounding
    can tell."""
    at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return
    read = torch.cat([prompt, torch.tensor(one[:at], dtype=torch.long, device=prompt.device)])[None]
    logits = model(read).logits[0, -1]
    (explained,) = rounding(model, lambda: [model(read).logits[0, -1]])
    assert abs(float(logits[one[at]] - logits[other[at]])) <= 2 * ROUNDS * explained


@torch.no_grad()
def sequence_log(model: torch.nn.Module, sequence: torch.Tensor, start: int) -> torch.Tensor:
    """Log-probability of a sequence's tokens from `start` on, up to its end token."""
    logs = model(sequence[None]).logits[0, :-1].log_softmax(-1).gather(1, sequence[1:, None])[start - 1 :, 0]
    ended = (sequence[start:] == 1).cumsum(0) - (sequence[start:] == 1).long()
    return logs[ended == 0].sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [[9, 1, 1, 1, 8], [3, 17], [20], [1] * 20])
def test_cached_is_full(kind: str, layout: str, parts: list[int], device: str) -> None:
    model, tokens = hybrid(layout, kind).to(device), ids(3, 20, device=device)
    full = model(tokens, use_cache=False).logits
    cache, outs = None, []
    for part in tokens.split(parts, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outs.append(out.logits)
    check(torch.cat(outs, 1), full, *rounding(model, lambda: [model(tokens, use_cache=False).logits]))
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_left_padding_changes_nothing(kind: str, layout: str, device: str) -> None:
    model, lengths = hybrid(layout, kind).to(device), [12, 5, 9]
    rows = [ids(1, n, seed=n, device=device) for n in lengths]
    batch = torch.full((3, 12), 0, device=device)
    mask = torch.zeros(3, 12, dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        batch[i, 12 - row.shape[1] :], mask[i, 12 - row.shape[1] :] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    tokens = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for i, row in enumerate(rows):
        check(logits[i, 12 - row.shape[1] :], model(row).logits[0], *rounding(model, lambda row=row: [model(row).logits]))
        alone = model.generate(row, max_new_tokens=8, do_sample=False)[0, row.shape[1] :].tolist()
        check_greedy(model, row[0], tokens[i, 12:].tolist(), alone)


def test_a_segment_of_padding_leaves_every_state_alone(kind: str) -> None:
    model = hybrid("mmam", kind)
    cache = model(ids(1, 6), use_cache=True).past_key_values
    before = [layer.recurrent_states[0].clone() for layer in (cache.layers[i] for i in (0, 1, 3))]
    mask = torch.tensor([[1] * 6 + [0] * 3])
    model(ids(1, 3, seed=5), attention_mask=mask, past_key_values=cache, use_cache=True)
    for kept, layer in zip(before, (cache.layers[i] for i in (0, 1, 3)), strict=True):
        assert torch.equal(kept, layer.recurrent_states[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_are_separate_documents(kind: str, layout: str, device: str) -> None:
    model, lengths = hybrid(layout, kind).to(device), [7, 1, 12, 4]
    rows = [ids(1, n, seed=n, device=device) for n in lengths]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    pack = lambda: model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits  # noqa: E731
    alone = lambda: torch.cat([model(row).logits for row in rows], 1)  # noqa: E731
    packed = pack().detach()
    check(packed, alone(), *rounding(model, lambda: [alone()]))
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0)).to(device)
    names = [name for name, _ in model.named_parameters()]

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
        return [torch.zeros(()) if gradient is None else gradient for gradient in found]

    explained = rounding(model, lambda: gradients(alone()))
    for name, one, other, bound in zip(names, gradients(pack()), gradients(alone()), explained, strict=True):
        print(name)
        check(one, other, bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_with_and_without_cache(kind: str, layout: str) -> None:
    model, tokens = hybrid(layout, kind), ids(2, 6)
    cached, plain = (model.generate(tokens, max_new_tokens=15, do_sample=False, use_cache=use) for use in (True, False))
    for row, one, other in zip(tokens, cached, plain, strict=True):
        check_greedy(model, row, one[6:].tolist(), other[6:].tolist())
    beams = [model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)]
    for one, other in zip(*beams, strict=True):
        values = [float(sequence_log(model, sequence, 6)) for sequence in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), "equal beams, or two that are as likely"


def test_a_users_own_cache_can_be_continued(kind: str) -> None:
    model, tokens = hybrid("mam", kind), ids(1, 10)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :6], past_key_values=cache)
    found = model(tokens[:, 6:], past_key_values=cache).logits
    check(found, model(tokens).logits[:, 6:], *rounding(model, lambda: [model(tokens).logits]))


def test_assisted_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hybrid("ma").generate(ids(1, 4), assistant_model=hybrid("ma"), max_new_tokens=4)


def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(ids(2, 12), labels=ids(2, 12)).loss, list(model.parameters())))

    plain, again = hybrid("mam", kind).train(), hybrid("mam", kind).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    explained = rounding(plain, lambda: gradients(plain))
    for one, other, bound in zip(gradients(plain), gradients(again), explained, strict=True):
        check(one, other, bound)


def read_types(model: torch.nn.Module, run) -> set[torch.dtype]:
    """The types of A_log, D and dt bias as the forward of each mixer sees them."""
    seen: set[torch.dtype] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, _: seen.update(getattr(m, name).dtype for name in FLOAT32))
        for module in model.modules()
        if hasattr(module, "A_log")
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_float32_parameters_stay_float32_and_exact(kind: str) -> None:
    model = hybrid("mam", kind)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(FLOAT32)}
    assert len(before) == 6
    cast = model.to(torch.bfloat16)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert read_types(cast, lambda: cast(ids(1, 4))) == {torch.float32}
    assert all(torch.equal(p, before[n]) for n, p in cast.named_parameters() if n in before)
    cast.half().float()
    assert all(torch.equal(p, before[n]) for n, p in cast.named_parameters() if n in before)
    with torch.autocast("cpu", torch.bfloat16):
        assert read_types(model, lambda: model(ids(1, 4))) == {torch.float32}


def test_save_and_load_is_bit_identical(kind: str, tmp_path: Path) -> None:
    model, tokens = hybrid("mam", kind), ids(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in small.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
        if name.endswith(FLOAT32):
            assert torch.equal(parameter, model.get_parameter(name))


def test_config_keeps_values_that_equal_another_familys_default(tmp_path: Path) -> None:
    config = hybrid_config("ma", base_model_type="mistral", sliding_window=None, rms_norm_eps=1e-6, use_cache=False)
    config.save_pretrained(tmp_path)
    again = HybridConfig.from_pretrained(tmp_path)
    assert (again.base_model_type, again.sliding_window, again.rms_norm_eps) == ("mistral", None, 1e-6)
    assert again.layer_types == ["linear_attention", "full_attention"]
    assert again.mixer == config.mixer
    assert again.use_cache is False


def test_config_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="mixer"):
        hybrid_config("ma", mixer=None)
    with pytest.raises(ValueError, match="2 layers"):
        hybrid_config("ma", num_hidden_layers=3)
    with pytest.raises(ValueError, match="lacks d_conv"):
        hybrid("ma", mixer={"kind": "mamba", "d_inner": 32, "d_state": 4, "dt_rank": 2, "expand": "head"})


def test_sliding_windows_reach_their_layers() -> None:
    """A windowed attention layer beside a mixer sees as far as its window and no further."""
    kinds = ["sliding_attention", "linear_attention"]
    model = hybrid("aa", base_model_type="mistral", sliding_window=4, layer_types=kinds)
    only = hybrid("a", base_model_type="mistral", sliding_window=4, layer_types=["sliding_attention"])
    tokens = ids(1, 12)
    changed = tokens.clone()
    changed[0, 0] = 3 if tokens[0, 0] != 3 else 4
    assert torch.equal(only(tokens).logits[:, 5:], only(changed).logits[:, 5:])
    assert not torch.equal(only(tokens).logits[:, 3], only(changed).logits[:, 3])
    cache, outs = None, []
    for part in tokens.split(1, 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, outs = out.past_key_values, [*outs, out.logits]
    assert worst(torch.cat(outs, 1), model(tokens, use_cache=False).logits) <= 1e-4


def test_hidden_states_and_logits_to_keep(kind: str) -> None:
    model, tokens = hybrid("mam", kind), ids(2, 6)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])


def test_a_static_cache_gives_the_same_tokens(kind: str) -> None:
    model, tokens = hybrid("ammam", kind), ids(2, 9)
    told = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **told), model.generate(tokens, **told))


@pytest.mark.parametrize("device", DEVICES)
def test_float16_is_right_or_refused(kind: str, device: str) -> None:
    """mamba2 norms what it puts out, and float16 is then three bits better than bfloat16; what
    mamba puts out may overflow."""
    model, tokens = hybrid("amma", kind).to(device), ids(2, 20, device=device)
    off = {}
    for dtype in (torch.float16, torch.bfloat16):
        narrow = copy.deepcopy(model).to(dtype)
        assert all(getattr(narrow.model.layers[1].mixer, name).dtype == torch.float32 for name in FLOAT32)
        if kind == "mamba" and dtype == torch.float16:
            with pytest.raises(ValueError, match="overflows float16"):
                narrow(tokens)
            return
        full = copy.deepcopy(narrow).float()(tokens).logits  # the same rounded weights, so that what is left is the arithmetic
        off[dtype] = worst(narrow(tokens).logits.float(), full)
    assert off[torch.float16] <= 0.5 * off[torch.bfloat16]


def test_device_map_and_narrow_types_keep_what_must_be_float32(kind: str, tmp_path: Path) -> None:
    hybrid("amma", kind).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
        if kind == "mamba" and dtype == torch.float16:
            with pytest.raises(InputError, match="overflows float16"):
                load_model(tmp_path, torch.device("cpu"), dtype)
            continue
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name.endswith(FLOAT32) else dtype), name
        assert torch.isfinite(model(ids(1, 8, device=str(model.device))).logits).all()


@pytest.mark.gpu
def test_compiled_decoding_gives_the_same_tokens(kind: str) -> None:
    model, tokens = hybrid("amma", kind).to("cuda"), ids(2, 9, device="cuda")
    told = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    wanted = model.generate(tokens, **told)
    model.forward = torch.compile(model.forward, dynamic=True)
    assert torch.equal(model.generate(tokens, **told), wanted)
