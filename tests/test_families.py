"""Every supported family: nothing of its attention is lost, and the hybrid's numbers hold
(docs/concepts/architecture.md)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybridize.checkpoint import reader
from hybridize.checkpoint.experts import as_on_disk, read_parameter
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.packing import Batch
from hybridize.distillation.fidelity import fidelity
from hybridize.distillation.losses import Loss
from hybridize.distillation.plan import layer_bytes
from hybridize.distillation.step import Accumulator, Student
from hybridize.errors import WorkError
from hybridize.modeling import HybridForCausalLM
from hybridize.runtime.loading import load_hybrid, load_model
from hybridize.scoring.loo import answers
from hybridize.surgery.mixers import kind_of
from hybridize.surgery.observe import Observer
from hybridize.surgery.replace import Calibration, MixerSettings, plan, replace
from hybridize.surgery.teacher import check_vocabularies, read_teacher
from hybridize.surgery.verify import provenance, verify_conversion
from tests.conftest import Runner, make_tokenizer, rounding, worst
from tests.families import FAMILY, make_family
from tests.test_modeling import DEVICES, check, check_greedy, sequence_log


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name) for name in FAMILY}


def load(path: Path) -> Any:
    return load_model(path, torch.device("cpu"), torch.float32)


def convert(home: Path, output: Path, layers: list[int], kind: str) -> Path:
    source = CheckpointReader(home)
    replace(
        source, str(home), plan(read_teacher(source), layers, MixerSettings(kind)), output, donor=source,
        init_from="checkpoint", seed=0, overwrite=True, settings={},
    )  # fmt: skip
    return output


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILY)
def test_no_layer_converted_is_the_teacher(name: str, homes: dict[str, Path], tmp_path: Path) -> None:
    teacher, student = load(homes[name]), load(convert(homes[name], tmp_path / "h", [], "mamba2"))
    assert isinstance(student, HybridForCausalLM)
    batch = ids(2, 24)
    assert torch.equal(student(batch).logits, teacher(batch).logits)
    grown = [m.generate(batch, max_new_tokens=8, do_sample=False, min_new_tokens=8) for m in (student, teacher)]
    assert torch.equal(*grown)


def heads_of(home: Path, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """q, k, v [B, T, H, P] of the teacher's layer on its normed input, float64, every head its own,
    and the attention scale: each family's own formula, written down here once more."""
    model = load(home).double()
    attention, config = model.model.layers[layer].self_attn, model.config
    size, queries = attention.head_dim, config.num_attention_heads
    if hasattr(attention, "qkv_proj"):
        inner, kv = queries * size, config.num_key_value_heads * size
        q, k, v = torch.nn.functional.linear(hidden, attention.qkv_proj.weight).split([inner, kv, kv], -1)
    else:
        q, k, v = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    over = {"olmo2": None, "qwen3": size, "qwen3_moe": size, "gemma3_text": size}
    if config.model_type in over:
        run, shift = over[config.model_type], 1.0 if "gemma" in config.model_type else 0.0

        def normed(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            runs = t.unflatten(-1, (-1, run or t.shape[-1]))
            return (runs / (runs.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * (shift + weight)).flatten(-2)

        q, k = normed(q, attention.q_norm.weight), normed(k, attention.k_norm.weight)
    scale = {"granite": lambda: config.attention_multiplier, "gemma2": lambda: config.query_pre_attn_scalar**-0.5}
    scale["gemma3_text"] = scale["gemma2"]
    each = queries // config.num_key_value_heads
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    return q, k.repeat_interleave(each, 2), v.repeat_interleave(each, 2), scale.get(config.model_type, lambda: size**-0.5)()


@pytest.mark.parametrize("name", FAMILY)
def test_every_head_is_carried_over(name: str, kind: str, homes: dict[str, Path], tmp_path: Path) -> None:
    """x = v, B = k, C = q times what the attention scale is more than head_dim^-1/2."""
    student = load(convert(homes[name], tmp_path / "h", [0, 3], kind)).double()
    for layer in (0, 3):
        hidden = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
        q, k, v, scale = heads_of(homes[name], layer, hidden)
        parts = student.model.layers[layer].self_attn.project(hidden)[1:-1]
        x, B, C = parts if len(parts) == 3 else parts[0].chunk(3, -1)
        for mine, theirs in ((x, v), (B, k), (C, q * scale * q.shape[-1] ** 0.5)):
            assert worst(mine, theirs.flatten(2)) <= 2e-6
        if scale == q.shape[-1] ** -0.5 and name not in ("phi3", "phi3-window"):
            at = student.model.layers[layer].self_attn.in_proj.weight.float()
            inner = at.shape[0] - len(student.model.layers[layer].self_attn.dt_bias) if kind == "mamba2" else None
            rows = load_file(homes[name] / "model.safetensors")[f"model.layers.{layer}.self_attn.q_proj.weight"]
            begin = inner - len(rows) if inner else at.shape[0] - student.config.mixer["dt_rank"] - len(rows)
            assert torch.equal(at[begin : begin + len(rows)], rows)


@pytest.mark.parametrize("name", FAMILY)
def test_the_proof_holds_and_finds_what_is_wrong(name: str, kind: str, homes: dict[str, Path], tmp_path: Path) -> None:
    source, teacher = CheckpointReader(homes[name]), read_teacher(CheckpointReader(homes[name]))
    surgery = plan(teacher, [1, 2], MixerSettings(kind))
    result = convert(homes[name], tmp_path / "h", [1, 2], kind)
    given = source, source, CheckpointReader(result), surgery, teacher, ids(2, 24), torch.device("cpu")
    proof = verify_conversion(*given)
    assert proof.tokens == 48
    assert max(proof.worst.values()) <= 1e-5
    counted = provenance(source, surgery, source)
    assert set(counted) == set(source.names)
    lost = {n for n, fate in counted.items() if ".self_attn." in n and ".layers.1." in n and ".mixer." not in fate}
    assert not lost
    file = next(result.glob("*.safetensors"))
    whole = load_file(file)
    for broken in (
        "layers.2.mixer.in_proj.weight",
        "layers.1.mixer.out_proj.weight",
        "layers.0.self_attn.o_proj.weight",
        "norm.weight",
    ):
        tensors = {key: value.clone() for key, value in whole.items()}
        tensors[f"model.{broken}"][tensors[f"model.{broken}"].shape[0] // 2] *= 1.01  # of in_proj: a row of B
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(WorkError, match="layer 2" if "layers.2" in broken else broken):
            verify_conversion(source, source, CheckpointReader(result), surgery, teacher, ids(2, 24), torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILY)
def test_numbers(name: str, kind: str, device: str, homes: dict[str, Path], tmp_path: Path) -> None:
    """Cached = full, in two chunks too; left-padded = alone; packed = separate; checkpointed = not,
    all with gradients."""
    model = load(convert(homes[name], tmp_path / "h", [0, 3], kind)).to(device)
    tokens, lengths = ids(2, 20).to(device), [11, 1, 8]
    full = model(tokens, use_cache=False).logits.detach()
    (explained,) = rounding(model, lambda: [model(tokens, use_cache=False).logits])
    for parts in ([13, 7], [17, 1, 1, 1]):
        cache, outs = None, []
        for part in tokens.split(parts, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
        check(torch.cat(outs, 1), full, explained)
    batch, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    batch[0], mask[0] = tokens[0], 1
    batch[1, 9:], mask[1, 9:] = tokens[1, :11], 1
    padded = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    check(padded[0], full[0], explained)
    check(padded[1, 9:], full[1, :11], explained)
    grown = model.generate(batch, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    alone = model.generate(tokens[1:, :11], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    check_greedy(model, tokens[1, :11], grown[1, 20:].tolist(), alone[0, 11:].tolist())
    beams = [model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)]
    for one, other in zip(*beams, strict=True):
        assert float(sequence_log(model, one, 20)) == pytest.approx(float(sequence_log(model, other, 20)), rel=1e-4)

    rows = [ids(1, n, seed=n).to(device) for n in lengths]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    weight = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)).to(device)

    def results(way: str) -> list[torch.Tensor]:
        """Logits, and the gradients that there are."""
        model.train(way == "checkpointed")
        model.gradient_checkpointing_enable() if way == "checkpointed" else model.gradient_checkpointing_disable()
        packed = way != "separate"
        whole = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits if packed else None
        logits = torch.cat([model(row).logits for row in rows], 1) if whole is None else whole
        found = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
        return [logits.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in found)]

    bounds, separate = rounding(model, lambda: results("separate")), results("separate")
    for way in ("packed", "checkpointed"):
        for one, other, bound in zip(results(way), separate, bounds, strict=True):
            check(one, other, bound)


@pytest.mark.parametrize("name", FAMILY)
def test_distillation_sees_the_family_s_own_logits(name: str, homes: dict[str, Path]) -> None:
    """Granite's divisor and Gemma 2's soft cap belong to the output, where the loss does without
    the model's own head."""
    teacher = load(homes[name])
    batch = Batch(ids(2, 16), None, ids(2, 16, seed=1), torch.ones(2, 16, dtype=torch.bool))
    logits = teacher(batch.ids, use_cache=False).logits.double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels.flatten())
    measured = fidelity(teacher, teacher, [batch], torch.float32)
    assert abs(measured.perplexity / float(expected.detach().exp()) - 1) <= 1e-5
    assert measured.reverse_kl <= 1e-9

    other = load(make_family(homes[name].parent / f"{name}-other", name, seed=1))
    found = other(batch.ids, use_cache=False).logits.double().flatten(0, 1)
    found.retain_grad()
    log_q, log_p = found.log_softmax(-1), logits.log_softmax(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    reverse.backward()
    wanted = other.lm_head.weight.grad.clone()
    other.zero_grad()
    value = Accumulator(Student(other, Loss(), torch.float32), teacher, 2)(batch)
    assert abs(float(value) / float(reverse.detach()) - 1) <= 1e-5
    assert worst(other.lm_head.weight.grad, wanted) <= 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_leave_one_out_hears_what_the_model_hears(name: str, homes: dict[str, Path]) -> None:
    """The sweep's log-probabilities of the untouched model, and without each layer, against plain
    forward passes."""
    source = CheckpointReader(homes[name])
    model = load_hybrid(source, torch.device("cpu"), torch.float32)
    read = [ids(1, n, seed=n)[0].tolist() for n in (9, 14)]
    read.append([*read[1][:12], 7, 8, 9])  # shares most of its text
    requests = [(text, text[-3:]) for text in read]
    found = answers(model, requests, "mixer", 2)
    for row, silent in zip(found, [None, 0, 1, 2, 3], strict=True):
        handle = None
        if silent is not None:
            attention = model.model.layers[silent].self_attn
            handle = attention.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
        for (text, wanted), (value, _) in zip(requests, row, strict=True):
            logs = model(torch.tensor([text]), use_cache=False).logits[0, -3:].log_softmax(-1)
            assert abs(float(logs.gather(1, torch.tensor(wanted).unsqueeze(1)).sum().detach()) - value) <= 1e-4, silent
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("name", FAMILY)
def test_tensors_keep_the_names_of_the_disk(name: str, homes: dict[str, Path], tmp_path: Path) -> None:
    """Mixtures of experts have others in memory: read, and written by us and by transformers, they
    are what they were."""
    result = CheckpointReader(convert(homes[name], tmp_path / "h", [0], "mamba2"))
    model = load(result.path)
    state = model.state_dict()
    for parameter, value in model.named_parameters():
        assert torch.equal(read_parameter(result, parameter), value), parameter
    for tensor, value in result.tensors():
        assert torch.equal(as_on_disk(tensor, state, state.__getitem__), value), tensor
    model.save_pretrained(tmp_path / "again")
    again = CheckpointReader(tmp_path / "again")
    assert again.names == result.names
    assert read_teacher(again).mixer_layers == [0]
    assert all(torch.equal(again.tensor(tensor), value) for tensor, value in result.tensors())
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert torch.equal(other(ids(1, 9)).logits, model(ids(1, 9)).logits)


@pytest.mark.parametrize("name", FAMILY)
def test_calibrated_starts_exist_for_every_family(name: str, kind: str, homes: dict[str, Path], tmp_path: Path) -> None:
    """Nearer to the attention's output than without, also on other text, and x, B and C as they
    were."""
    source = CheckpointReader(homes[name])
    surgery = plan(read_teacher(source), [1], MixerSettings(kind))
    fit = Calibration(ids(16, 128), frozenset(kind_of("mamba2").parts), torch.device("cpu"), "random")
    result = tmp_path / "h"
    replace(
        source,
        name,
        surgery,
        result,
        donor=source,
        init_from="checkpoint",
        seed=0,
        overwrite=True,
        settings={},
        calibration=fit,
    )
    given = source, source, CheckpointReader(result), surgery, read_teacher(source), ids(2, 24), torch.device("cpu"), fit.parts
    assert max(verify_conversion(*given).worst.values()) <= 1e-5
    far = {}
    for way, path in (("plain", convert(homes[name], tmp_path / "p", [1], kind)), ("calibrated", result)):
        seen = Observer(source, source, ids(4, 32, seed=9), torch.device("cpu")).see(1)
        with torch.no_grad():
            wanted = seen.attention.o_proj(seen.heads)
            made = load(path).model.layers[1].self_attn(seen.inputs)[0]
        far[way] = float((made - wanted).square().mean() / wanted.square().mean())
    assert far["calibrated"] < far["plain"]
    assert far["calibrated"] < 1


@pytest.mark.parametrize("name", ["gemma2", "granite", "qwen3-moe"])
def test_the_commands_take_the_odd_ones(
    name: str, tmp_path: Path, traces: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft caps, multipliers and experts through scoring, surgery and training."""
    teacher = make_family(tmp_path / "teacher", name, vocab_size=260)
    make_tokenizer().save_pretrained(teacher)
    monkeypatch.setenv("HYBRIDIZE_DATA", str(traces))
    monkeypatch.chdir(tmp_path)
    small = ("--seq-len", 32, "--batch-size", 2)
    for ablate in ("block", "mixer"):
        cli("score-loo", "--metric", "kl", "--ablate", ablate, "--seq-len", 32, "--windows", 2, "--overwrite")
    cli("score-mmr", *small, "--steps", 2, "--no-calibrate")
    cli("score-restore", *small, "--steps", 2, "--windows", 2, "--no-calibrate")
    cli("replace", "--layers", 2, "--calibration-tokens", 256)
    cli("distill", "h2", "--steps", 2, *small, "--eval-every", 0, "-o", "trained", "--train", "all")
    before, after = (CheckpointReader(tmp_path / folder) for folder in ("h2", "trained"))
    same = {n for n in before.names if torch.equal(before.tensor(n), after.tensor(n))}
    trained = {n for n in before.names if "mlp" in n and n.endswith("weight")} - same
    assert trained, "an MLP's weights, or an expert's, are the trained ones"
    assert "2 Mamba" in cli("inspect", "trained")


def test_what_cannot_be_right_is_refused(
    homes: dict[str, Path], tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE that turns old keys anew, a donor with another attention, mixers that contradict it,
    caps left to a default."""
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    made = make_family(tmp_path / "long", "phi3", rope_parameters=long, original_max_position_embeddings=16)
    assert "RoPE of type longrope" in cli.fails("replace", made, "--indices", 1, "--no-calibrate")
    monkeypatch.chdir(tmp_path)
    hybrid = convert(homes["llama"], tmp_path / "h", [0], "mamba2")
    for other in ("qwen2", "olmo2"):
        given = ("--indices", 1, "--no-calibrate", "--init-from", "teacher", "--teacher", homes[other], "-o", "out")
        assert "another attention than" in cli.fails("replace", hybrid, *given)
    raw = json.loads((hybrid / "config.json").read_text())
    for wrong, said in (("head", "norm_bc"), ({"over": "head", "offset": 0}, "mixer.B_norm.weight, which a llama model")):
        (hybrid / "config.json").write_text(json.dumps({**raw, "mixer": {**raw["mixer"], "norm_bc": wrong}}))
        assert said in cli.fails("replace", hybrid, "--indices", 1, "--no-calibrate", "-o", "out")
    capped = json.loads((homes["gemma2"] / "config.json").read_text())
    del capped["final_logit_softcapping"]  # 30 by default
    (tmp_path / "default").mkdir()
    for file in homes["gemma2"].iterdir():
        (tmp_path / "default" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "default/config.json").write_text(json.dumps(capped))
    check_vocabularies(CheckpointReader(homes["gemma2"]), CheckpointReader(tmp_path / "default"))


def test_the_parent_is_hashed_once(homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = reader.fingerprint
    monkeypatch.setattr(reader, "fingerprint", lambda name, *told: (seen.append(name), plain(name, *told))[1])
    for known in (False, True):
        source, seen[:] = CheckpointReader(homes["llama"]), []
        if known:
            _ = source.hash
        replace(
            source, "t", plan(read_teacher(source), [1], MixerSettings("mamba2")), tmp_path / "h", donor=source,
            init_from="checkpoint", seed=0, overwrite=True, settings={},
        )  # fmt: skip
        assert sorted(seen) == source.names


@pytest.mark.parametrize("name", FAMILY)
def test_the_plan_of_an_attention_layer_is_near_what_autograd_keeps(name: str, homes: dict[str, Path]) -> None:
    """Above all where attention is eager, whose T x T maps are most of it, and where a token goes
    through several experts."""
    model, length = load_hybrid(CheckpointReader(homes[name]), torch.device("cpu"), torch.float32).train(), 512
    hidden = torch.randn(1, length, 32, requires_grad=True)
    at = torch.arange(length).unsqueeze(0)
    kind = model.config.layer_types[0]
    told = model.model.layer_inputs(hidden, None, at, packed=False)[kind]
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.t().shape) for p in model.parameters() if p.ndim == 2}
    shared = {t.untyped_storage().data_ptr() for t in (*told["position_embeddings"], told["attention_mask"]) if t is not None}
    kept, alive = {}, []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if tuple(t.shape) not in weights and t.untyped_storage().data_ptr() not in shared:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model.model.layers[0](hidden, position_ids=at, **told)
    planned = layer_bytes(model.config, kind, length) * length
    assert 0.8 <= planned / sum(kept.values()) <= 1.25


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2-window"])
def test_windows_and_mixers_in_every_order(name: str, homes: dict[str, Path], tmp_path: Path) -> None:
    """A cache counts from the first window and the first full attention, wherever mixers stand."""
    tokens = ids(2, 20)
    for count in (1, 2, 3, 4):
        for layers in itertools.combinations(range(4), count):
            model = load(convert(homes[name], tmp_path / "h", list(layers), "mamba2"))
            full, cache, outs = model(tokens, use_cache=False).logits.detach(), None, []
            (explained,) = rounding(model, lambda model=model: [model(tokens, use_cache=False).logits], draws=1)
            for part in tokens.split([13, 6, 1], 1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                outs.append(out.logits)
            check(torch.cat(outs, 1), full, explained)
