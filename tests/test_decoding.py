"""The decoding step: every sequence as if it were alone, in every layout, at its own place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError
from hybridize.generation.attention import decode_attention, triton_missing
from hybridize.generation.cache import sequence_bytes
from hybridize.generation.decoder import Decoder
from hybridize.generation.sampling import Sampler, SamplingSettings
from hybridize.modeling import HybridForCausalLM, causal_conv, conv_step, selective_scan, ssd_scan
from hybridize.runtime.loading import load_hybrid
from tests import fakes
from tests.conftest import hybrid, worst
from tests.families import FAMILY, make_family
from tests.test_modeling import DEVICES

ENGINES = ["torch", pytest.param("kernel", marks=pytest.mark.gpu)]


def reference(query, keys, values, counts, scale, cap):  # type: ignore[no-untyped-def]
    """In float64, a sequence and a head at a time."""
    out = torch.empty(*query.shape, dtype=torch.float64)
    shared = query.shape[1] // keys.shape[1]
    for b in range(query.shape[0]):
        n = min(int(counts[b]), keys.shape[2])
        for h in range(query.shape[1]):
            scores = keys[b, h // shared, :n].double() @ query[b, h].double() * scale
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            out[b, h] = torch.softmax(scores, 0) @ values[b, h // shared, :n].double()
    return out


@pytest.mark.parametrize("backend", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5), heads=st.sampled_from([1, 2, 3]), group=st.sampled_from([1, 3, 4]), places=st.integers(1, 300),
    width=st.sampled_from([16, 24, 64, 80, 128]), cap=st.sampled_from([None, 5.0]), seed=st.integers(0, 99),
    accuracy=st.sampled_from([(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]),
)  # fmt: skip
def test_decode_attention(
    backend: str, rows: int, heads: int, group: int, places: int, width: int, cap: float | None, seed: int,
    accuracy: tuple[torch.dtype, float],
) -> None:  # fmt: skip
    dtype, most = accuracy
    torch.manual_seed(seed)
    query = torch.randn(rows, heads * group, width).to(dtype)
    keys, values = (torch.randn(rows, heads, places, width).to(dtype) for _ in range(2))
    counts = torch.randint(1, places + 5, (rows,))
    on = "cuda" if backend == "kernel" else "cpu"
    found = decode_attention(*(t.to(on) for t in (query, keys, values, counts)), width**-0.5, cap, backend).cpu()
    assert found.dtype == dtype
    assert (found.double() - reference(query, keys, values, counts, width**-0.5, cap)).abs().max() < most


def test_the_kernel_is_missing_where_there_is_no_gpu() -> None:
    assert (triton_missing() is None) == torch.cuda.is_available()


def check_greedy(model: HybridForCausalLM, prompt: torch.Tensor, made: list[int], count: int) -> None:
    """Every token is the likeliest by the logits of a plain forward pass over all of it, or as
    likely up to rounding."""
    assert len(made) == count
    ids = torch.cat([prompt, torch.tensor(made, device=prompt.device)]).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    said = logits.gather(1, torch.tensor(made, device=prompt.device).unsqueeze(1))[:, 0]
    assert bool((said >= logits.amax(1) - 1e-3 * logits.abs().amax()).all())


def decode(model: HybridForCausalLM, prompts: list[torch.Tensor], count: int, rows: int = 2) -> list[list[int]]:
    """Through a Decoder of few rows, each taken up again when its sequence is done."""
    decoder = Decoder(model, rows, max(map(len, prompts)) + count)
    found: dict[int, list[int]] = {}
    running: dict[int, int] = {}
    waiting = list(range(len(prompts)))
    while waiting or running:
        for row in range(rows):
            if row not in running and waiting:
                running[row] = waiting.pop(0)
                decoder.prefill([row], prompts[running[row]].unsqueeze(0))
        decoder.step()
        for row, which in list(running.items()):
            if int(decoder.cache.lengths[row]) == len(prompts[which]) + count - 1:
                found[which] = decoder.history[row, len(prompts[which]) :][:count].tolist()
                del running[row]
    return [found[which] for which in range(len(prompts))]


def prompts_of(device: str, sizes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 64, (size,), generator=generator).to(device) for size in sizes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kinds", ["ammam", "mmmm", "aaaa"])
def test_rows_at_places_of_their_own(kinds: str, kind: str, device: str) -> None:
    model = hybrid(kinds, kind).eval().to(device)
    prompts = prompts_of(device, (5, 1, 17, 9))
    for prompt, made in zip(prompts, decode(model, prompts, 12), strict=True):
        check_greedy(model, prompt, made, 12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILY)
def test_every_family(name: str, device: str, tmp_path: Path) -> None:
    """Windows of 8 are passed by a prompt and by what follows it."""
    source = CheckpointReader(make_family(tmp_path / name, name))
    model = load_hybrid(source, torch.device(device), torch.float32)
    prompts = prompts_of(device, (12, 3))
    for prompt, made in zip(prompts, decode(model, prompts, 10), strict=True):
        check_greedy(model, prompt, made, 10)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_read_together_and_rows_that_are_full(kind: str, device: str) -> None:
    model = hybrid("amma", kind).eval().to(device)
    prompts = torch.stack(prompts_of(device, (6, 6, 6)))
    decoder = Decoder(model, 3, 10)
    logits = decoder.prefill([2, 0, 1], prompts)
    with torch.no_grad():
        assert torch.allclose(logits, model(prompts).logits[:, -1], atol=1e-4)
    for _ in range(9):  # six more than there is room for
        decoder.step()
    for row, prompt in zip((2, 0, 1), prompts, strict=True):
        assert decoder.history[row, :6].tolist() == prompt.tolist()
        check_greedy(model, prompt, decoder.history[row, 6:10].tolist(), 4)
    with pytest.raises(ValueError, match="leaves no room"):
        decoder.prefill([0], torch.ones(1, 10, dtype=torch.long, device=device))


def test_tables_that_look_at_the_longest_sequence_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(InputError, match="dynamic or longrope"):
        Decoder(hybrid("amma", "mamba2", rope_parameters=rope), 2, 8)


@pytest.mark.gpu
def test_a_captured_sampler_draws_what_an_eager_one_draws() -> None:
    model = hybrid("amma", "mamba2").eval().to("cuda")
    prompt = torch.tensor([[3, 4, 5]], device="cuda")
    said = []
    for capture in (False, True):
        sampler = Sampler(SamplingSettings(1.5, top_k=20, top_p=0.9), 2, 12, torch.device("cuda"))
        decoder = Decoder(model, 2, 15, sampler, capture)
        sampler.begin(1, 3, seed=4)
        decoder.prefill([1], prompt)
        for _ in range(11):
            decoder.step()
        said.append(decoder.history[1, :15].tolist())
    assert said[0] == said[1]


def test_what_is_held_is_what_was_said(kind: str) -> None:
    model = hybrid("amma", kind)
    decoder = Decoder(model, 3, 10)
    kv, state = sequence_bytes(model, 10, torch.float32)
    assert decoder.cache.bytes() == {"kv": 3 * kv, "state": 3 * state}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_kernels_are_told_what_the_scans_are_told(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in place, by stand-ins for the kernels, against one by the scan over a sequence of
    one."""
    fakes.install(monkeypatch)
    torch.manual_seed(0)
    batch, inner, n, groups, taps = 3, 24, 4, 6, 4
    x, dt, D, bias = (torch.randn(*shape) for shape in ((batch, 1, inner), (batch, 1, inner), (inner,), (inner,)))
    B, C = (torch.randn(batch, 1, groups, n).to(dtype) for _ in range(2))
    state, A = torch.randn(batch, inner, n), -torch.rand(inner, n)
    x, dt = x.to(dtype), dt.to(dtype)
    wanted, last = selective_scan(x, dt, A, B, C, D, bias, state=state, backend="torch")
    kept = state.clone()
    found, same = selective_scan(x, dt, A, B, C, D, bias, state=kept, backend="kernel", inplace=True)
    assert same is kept
    assert worst(kept, last) < 1e-5
    assert worst(found.float(), wanted.float()) < (1e-5 if dtype == torch.float32 else 3e-2)

    heads, p = 6, 4
    x, B, C = (torch.randn(batch, 1, heads, p).to(dtype) for _ in range(3))
    dt, A, D, bias = (torch.randn(batch, 1, heads).to(dtype), -torch.rand(heads), torch.randn(heads), torch.randn(heads))
    state = torch.randn(batch, heads, p, p)
    wanted, last = ssd_scan(x, dt, A, B, C, D, bias, state=state, backend="torch")
    kept = state.clone()
    found, same = ssd_scan(x, dt, A, B, C, D, bias, state=kept, backend="kernel", inplace=True)
    assert same is kept
    assert worst(kept, last) < 1e-5
    assert worst(found.float(), wanted.float()) < (1e-5 if dtype == torch.float32 else 3e-2)

    window, weight, bias = torch.randn(batch, inner, taps).to(dtype), torch.randn(inner, taps), torch.randn(inner)
    new = torch.randn(batch, inner).to(dtype)
    whole = torch.cat([window[..., 1:], new.unsqueeze(-1)], -1)
    wanted = causal_conv(whole.transpose(1, 2), weight, bias, backend="torch")[:, -1]
    for backend in ("torch", "kernel"):
        moved = window.clone()
        found = conv_step(new, moved, weight, bias, backend)
        assert torch.equal(moved, whole)
        assert worst(found.float(), wanted.float()) < (1e-5 if dtype == torch.float32 else 5e-2)
