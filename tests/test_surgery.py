"""Surgery: what the new tensors are made of, against an attention computed here; selection; the
published Apriel facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hybridize.modeling  # noqa: F401
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import LayerScore, Scores
from hybridize.parsing import parse_indices
from hybridize.surgery.replace import MixerSettings, plan, replace
from hybridize.surgery.teacher import read_teacher
from tests.conftest import Runner, make_teacher, worst

H25 = [47, 39, 24, 36, 31, 43, 32, 20, 38, 37, 30, 33, 22, 23, 40, 42, 44, 35, 41, 27, 21, 46, 45, 49, 25]
LATER = [34, 29, 28, 19, 26, 18, 17, 16, 13, 15, 14, 8, 9, 12, 6, 11, 5, 48, 7, 10, 3, 4, 1, 0]


def convert(
    source: Path, layers: list[int], output: Path, seed: int = 0, kind: str | None = None, **settings: object
) -> CheckpointReader:
    reader = CheckpointReader(source)
    surgery = plan(read_teacher(reader), layers, MixerSettings(kind, **settings))
    replace(reader, str(source), surgery, output, donor=reader, init_from="checkpoint", seed=seed, overwrite=False, settings={})
    return CheckpointReader(output)


def test_no_layers_is_bit_identical(teacher: Path, tmp_path: Path) -> None:
    result = convert(teacher, [], tmp_path / "h0")
    source = CheckpointReader(teacher)
    assert result.names == source.names
    assert all(torch.equal(result.tensor(name), source.tensor(name)) for name in source.names)
    tokens = torch.randint(4, 260, (2, 17))
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (teacher, tmp_path / "h0"))
    assert type(after).__name__ == "HybridForCausalLM"
    assert torch.equal(after(tokens).logits, before(tokens).logits)
    assert {f.name for f in teacher.iterdir()} - {"model.safetensors"} <= {f.name for f in (tmp_path / "h0").iterdir()}


def linear_attention(source: CheckpointReader, layer: int, hidden: torch.Tensor, chunk: int) -> torch.Tensor:
    """What a fresh mixer must compute with decay 1, step 1, no gate and no convolution: per query
    head, per chunk of `chunk` channels, sum over the past of (q . k) v, float64, from the teacher's
    projections."""
    config = source.config
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    name = f"model.layers.{layer}.self_attn."
    q, k, v = (hidden @ source.tensor(f"{name}{p}_proj.weight").double().t() for p in "qkv")
    out = torch.zeros(len(hidden), heads * size, dtype=torch.float64)
    for head in range(heads):
        key = head // (heads // kv_heads)
        for begin in range(0, size, chunk):
            ours = slice(head * size + begin, head * size + begin + chunk)
            theirs = slice(key * size + begin, key * size + begin + chunk)
            for t in range(len(hidden)):
                for s in range(t + 1):
                    out[t, ours] += (q[t, ours] @ k[s, theirs]) * v[s, theirs]
    return out @ source.tensor(f"{name}o_proj.weight").double().t()


def test_a_fresh_mixer_is_the_teachers_linear_attention(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(teacher, [1], tmp_path / "h1", kind="mamba", d_state=4)
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path / "h1").model.layers[1].mixer.double()
    hidden = torch.randn(6, 32, dtype=torch.float64)
    from hybridize.modeling import mamba
    from hybridize.modeling import mixer as shared

    def bare_scan(x, dt, A, B, C, D, bias, **_):
        """No decay, no step size, no skip: the plain sum, in float64."""
        width = x.shape[2] // B.shape[2]
        state, rows = torch.zeros(x.shape[2], B.shape[3], dtype=torch.float64), []
        for t in range(x.shape[1]):
            state = state + x[0, t, :, None] * B[0, t].repeat_interleave(width, 0)
            rows.append((state * C[0, t].repeat_interleave(width, 0)).sum(1))
        return torch.stack(rows)[None], state

    monkeypatch.setattr(mamba, "selective_scan", bare_scan)
    monkeypatch.setattr(shared, "causal_conv", lambda x, *_, **__: x)
    monkeypatch.setattr(shared.nn.functional, "silu", torch.ones_like)
    got = mixer(hidden.unsqueeze(0))[0][0]
    assert worst(got, linear_attention(CheckpointReader(teacher), 1, hidden, chunk=4)) <= 1e-5


def test_a_fresh_mamba2_mixer_is_it_with_whole_heads(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(teacher, [1], tmp_path / "h1", kind="mamba2")
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path / "h1").model.layers[1].mixer.double()
    hidden = torch.randn(6, 32, dtype=torch.float64)
    from hybridize.modeling import mamba2
    from hybridize.modeling import mixer as shared

    def bare_scan(x, dt, A, B, C, D, bias, **_):
        """No decay, no step size, no skip: the plain sum, in float64."""
        past = torch.einsum("bthn,bshn,bshp->btshp", C, B, x)
        return torch.stack([past[:, t, : t + 1].sum(1) for t in range(x.shape[1])], 1), None

    monkeypatch.setattr(mamba2, "ssd_scan", bare_scan)
    monkeypatch.setattr(mamba2, "gated_norm", lambda y, *_: y)
    monkeypatch.setattr(shared, "causal_conv", lambda x, *_, **__: x)
    got = mixer(hidden.unsqueeze(0))[0][0]
    assert worst(got, linear_attention(CheckpointReader(teacher), 1, hidden, chunk=8)) <= 1e-5


@pytest.mark.parametrize(("expand", "order"), [("head", [0, 1, 0, 1, 2, 3, 2, 3]), ("chunk", [0, 0, 1, 1, 2, 2, 3, 3])])
def test_heads_and_chunks_are_repeated_whole(teacher: Path, tmp_path: Path, expand: str, order: list[int]) -> None:
    convert(teacher, [0], tmp_path / "h", kind="mamba", d_state=4, expand=expand)
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path / "h").model.layers[0].mixer
    chunks = torch.arange(16.0)  # 2 key/value heads of 8 = 4 chunks of 4
    assert mixer._expand(chunks.view(1, 1, 16)).view(8, 4)[:, 0].div(4).tolist() == order


def test_initial_values_of_mamba2(teacher: Path, tmp_path: Path) -> None:
    result, source = convert(teacher, [2], tmp_path / "h"), CheckpointReader(teacher)
    get = lambda name: result.tensor(f"model.layers.2.mixer.{name}")  # noqa: E731
    old = lambda name: source.tensor(f"model.layers.2.self_attn.{name}.weight")  # noqa: E731
    rows = get("in_proj.weight")
    assert rows.shape == (4 * 32 + 4, 32)
    for begin, name in ((32, "v_proj"), (64, "k_proj")):
        heads = old(name).view(2, 8, 32)
        assert torch.equal(rows[begin : begin + 32].view(4, 8, 32), heads[[0, 0, 1, 1]])
    assert torch.equal(rows[96:128], old("q_proj"))
    assert torch.equal(get("out_proj.weight"), old("o_proj"))
    decay, step = torch.exp(get("A_log")), torch.nn.functional.softplus(get("dt_bias"))
    assert decay.shape == step.shape == get("D").shape == (4,)
    assert 1 <= decay.min() <= decay.max() <= 16
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 0.1001
    assert torch.equal(get("norm.weight"), torch.ones(32))
    assert result.config["mixer"] == {"kind": "mamba2", "d_inner": 32, "d_state": 8, "d_conv": 4}


def test_initial_values(teacher: Path, tmp_path: Path) -> None:
    result, source = convert(teacher, [2], tmp_path / "h", kind="mamba"), CheckpointReader(teacher)
    get = lambda name: result.tensor(f"model.layers.2.mixer.{name}")  # noqa: E731
    old = lambda name: source.tensor(f"model.layers.2.self_attn.{name}.weight")  # noqa: E731
    rows = get("in_proj.weight")
    assert rows.shape == (32 + 16 + 16 + 32 + 2, 32)
    assert torch.equal(rows[32:48], old("v_proj"))
    assert torch.equal(rows[48:64], old("k_proj"))
    assert torch.equal(rows[64:96], old("q_proj"))
    assert torch.equal(get("out_proj.weight"), old("o_proj"))
    assert worst(-torch.exp(get("A_log")), -torch.arange(1.0, 9).expand(32, 8)) <= 1e-6
    assert torch.equal(get("D"), torch.ones(32))
    step = torch.nn.functional.softplus(get("dt_bias"))
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 0.1001
    assert result.config["mixer"] == {
        "kind": "mamba", "d_inner": 32, "d_state": 8, "d_conv": 4, "dt_rank": 2, "expand": "head",
    }  # fmt: skip
    assert result.config["layer_types"] == ["full_attention"] * 2 + ["linear_attention", "full_attention"]


def test_draws_depend_on_the_tensors_name_and_the_seed_alone(teacher: Path, tmp_path: Path, kind: str) -> None:
    one, two = convert(teacher, [2], tmp_path / "a", kind=kind), convert(teacher, [0, 1, 2], tmp_path / "b", kind=kind)
    other = convert(teacher, [2], tmp_path / "c", seed=1, kind=kind)
    names = [name for name in one.names if ".mixer." in name]
    assert len(names) == 8
    assert all(torch.equal(one.tensor(n), two.tensor(n)) for n in names)
    drawn = "model.layers.2.mixer.in_proj.weight"
    assert not torch.equal(one.tensor(drawn), other.tensor(drawn))
    assert not torch.equal(two.tensor(drawn)[:32], two.tensor(drawn.replace("2", "1"))[:32])


def test_storage_types_follow_the_input(tmp_path: Path, kind: str) -> None:
    source = make_teacher(tmp_path / "t")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = convert(source, [1], tmp_path / "h", kind=kind)
    kinds = {name.split("mixer.")[1]: result.tensor(name).dtype for name in result.names if "mixer" in name}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"A_log", "D", "dt_bias"}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


def test_untied_and_tied_heads(tmp_path: Path) -> None:
    for tied in (True, False):
        source = make_teacher(tmp_path / f"t{tied}", tie_word_embeddings=tied)
        result = convert(source, [1], tmp_path / f"h{tied}")
        assert ("lm_head.weight" in result) is not tied
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"h{tied}")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_indices() -> None:
    assert parse_indices("3,5-8") == [3, 5, 6, 7, 8]
    for bad in ("", "3-", "a", "3,,4", "8-5", "3,3", "-1", "3-5,4"):
        with pytest.raises(ValueError, match="indices"):
            parse_indices(bad)


def write_scores(checkpoint: Path, kind: str, order: list[int]) -> None:
    """A score file in which `order` goes from least to most important."""
    reader = CheckpointReader(checkpoint)
    layers = [LayerScore(layer, float(rank)) for rank, layer in enumerate(order)]
    Scores(kind, reader.hash, None, None, "test", {}, 0.0, layers).write(checkpoint / "scores" / f"{kind}.json")


def mamba_layers(checkpoint: Path) -> list[int]:
    kinds = json.loads((checkpoint / "config.json").read_text())["layer_types"]
    return [i for i, kind in enumerate(kinds) if kind == "linear_attention"]


def test_apriels_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Runner) -> None:
    """The published LOO order gives H-25; H-25 with MMR scores that favour 3, 5, 6, 7, 8 gives H-27
    and H-30."""
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher", layers=50)
    write_scores(tmp_path / "teacher", "loo", [*H25, *LATER, 2])
    cli("replace", "--layers", 25)
    assert mamba_layers(tmp_path / "h25") == sorted(H25)
    left = [layer for layer in range(50) if layer not in H25]
    favoured = [3, 5, 6, 7, 8]
    write_scores(tmp_path / "h25", "mmr", [*favoured, *(layer for layer in left if layer not in favoured)])
    cli("replace", "h25", "--layers", 27)
    cli("replace", "h25", "--layers", 30)
    assert mamba_layers(tmp_path / "h27") == sorted([*H25, 3, 5])
    assert mamba_layers(tmp_path / "h30") == sorted([*H25, *favoured])
    before, after = CheckpointReader(tmp_path / "h25"), CheckpointReader(tmp_path / "h30")
    kept = [name for name in before.names if name in after]
    assert len([name for name in kept if ".mixer." in name]) == 25 * 8
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in kept)


def test_staged_conversion_starts_from_the_checkpoint_or_the_teacher(tmp_path: Path, cli: Runner, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    cli("replace", "--indices", "3")
    trained = load_file(next(Path("h1").glob("*.safetensors")))
    name = "model.layers.0.self_attn.q_proj.weight"
    trained[name] = trained[name] + 1
    save_file(trained, next(Path("h1").glob("*.safetensors")), metadata={"format": "pt"})
    cli("replace", "h1", "--indices", "0", "-o", "a")
    cli("replace", "h1", "--indices", "0", "-o", "b", "--init-from", "teacher")
    rows = [CheckpointReader(Path(p)).tensor("model.layers.0.mixer.in_proj.weight")[96:128] for p in "ab"]
    assert torch.equal(rows[0], trained[name])
    assert torch.equal(rows[1], CheckpointReader(Path("teacher")).tensor(name))
    origins = json.loads(Path("b/hybridize.json").read_text())["layers"]
    assert [o["origin"] for o in origins] == ["mil", "teacher", "teacher", "mil"]
    assert origins[0]["from"] == "teacher"
