"""Calibration: what is observed against the whole model, each part against its own definition in
float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.data.encode import Encoder
from hybridize.data.rows import read_rows
from hybridize.data.sample import sample_windows
from hybridize.modeling import HybridConfig
from hybridize.runtime.loading import load_tokenizer
from hybridize.surgery import calibrate as constants
from hybridize.surgery.mapping import build
from hybridize.surgery.mixers import kind_of
from hybridize.surgery.observe import Observer
from hybridize.surgery.replace import Calibration, MixerSettings, hybrid_json, plan, replace, starting_values
from hybridize.surgery.teacher import read_teacher
from tests import test_ssd
from tests.conftest import Runner, make_teacher, worst, write_traces
from tests.test_surgery import convert

CPU = torch.device("cpu")
IDS = torch.randint(4, 260, (3, 40), generator=torch.Generator().manual_seed(3))


def fit(*parts: str) -> Calibration:
    return Calibration(IDS, frozenset(parts or kind_of("mamba2").parts), CPU, "test")


@pytest.fixture
def case(teacher: Path, kind: str):
    """(plain parameters, calibrate) of layer 2: `calibrated(parts)` gives the mixer, `seen` what
    the layer does."""
    reader = CheckpointReader(teacher)
    surgery = plan(read_teacher(reader), [2], MixerSettings(kind))
    config = HybridConfig.from_dict(hybrid_json(reader.config, surgery))
    plain = {target.parameter: build(target, reader.tensor, 0) for target in surgery.targets[2]}
    seen = Observer(reader, reader, IDS, CPU).see(2)
    return plain, seen, lambda *parts: surgery.kind.calibrate(config, 2, plain, seen, frozenset(parts))


def attention_inputs(model, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states that layer's attention (or mixer) reads, from the whole model at once."""
    return model.model.layers[layer].input_layernorm(model.model(ids, output_hidden_states=True).hidden_states[layer])


@torch.no_grad()
def test_what_is_seen_is_what_the_whole_model_does(teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").double()
    weights = model(IDS, output_attentions=True).attentions
    reader = CheckpointReader(teacher)
    observer = Observer(reader, reader, IDS, CPU)
    for layer in (0, 1, 3):
        seen = observer.see(layer)
        inputs = attention_inputs(model, layer, IDS)
        attention = model.model.layers[layer].self_attn
        values = F.linear(inputs, attention.v_proj.weight).unflatten(-1, (2, 8)).repeat_interleave(2, 2)
        heads = torch.einsum("whts,wshd->wthd", weights[layer], values).flatten(2)
        assert worst(seen.inputs, inputs) <= 1e-5
        assert worst(seen.heads, heads) <= 1e-5
        assert not seen.drift.any()
        for head in range(4):
            far = total = 0.0
            for w in range(3):
                for t in range(40):
                    for s in range(1, t + 1):
                        far += float(weights[layer][w, head, t, s]) * (t - s)
                        total += float(weights[layer][w, head, t, s])
            assert float(seen.distance[head]) == pytest.approx(far / total, rel=1e-4)


@torch.no_grad()
def test_mixers_below_change_what_is_seen(teacher: Path, tmp_path: Path, kind: str) -> None:
    """Above converted layers, inputs and drift are those of the hybrid that comes out, heads those
    of the teacher."""
    reader = CheckpointReader(teacher)
    surgery = plan(read_teacher(reader), [0, 2], MixerSettings(kind))
    replace(
        reader, "teacher", surgery, tmp_path / "h", donor=reader, init_from="checkpoint", seed=0, overwrite=False,
        settings={}, calibration=fit(),
    )  # fmt: skip
    config = HybridConfig.from_dict(hybrid_json(reader.config, surgery))
    observer = Observer(reader, reader, IDS, CPU)
    plain = {target.parameter: build(target, reader.tensor, 0) for target in surgery.targets[0]}
    observer.convert(surgery.kind.calibrate(config, 0, plain, observer.see(0), frozenset(kind_of("mamba2").parts)))
    seen, alone = observer.see(2), Observer(reader, reader, IDS, CPU).see(2)
    hybrid, model = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "h", teacher))
    assert worst(seen.inputs, attention_inputs(hybrid, 2, IDS)) <= 1e-4
    ours, theirs = (m.model(IDS, output_hidden_states=True).hidden_states[2] for m in (hybrid, model))
    assert worst(seen.drift, ours - theirs) <= 1e-4
    assert torch.equal(seen.heads, alone.heads)


@torch.no_grad()
def test_a_hybrids_own_mixers_are_run(teacher: Path, tmp_path: Path, kind: str) -> None:
    source = convert(teacher, [0, 1], tmp_path / "h", kind=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    assert worst(Observer(source, source, IDS, CPU).see(3).inputs, attention_inputs(model, 3, IDS)) <= 1e-4


def least_squares(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Ridge regression as an ordinary one with extra rows: argmin |x w - y|^2 + lambda |w|^2,
    float64, [in, out]."""
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    extra = (strength * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(
        torch.cat([x, extra]), torch.cat([y, torch.zeros(x.shape[1], y.shape[1])]), driver="gelsd"
    ).solution


def same(mixer, plain: dict, *changed: str) -> None:
    """All parameters but `changed` are as they were, bit for bit."""
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, plain[name]) is (name not in changed), name


def test_z(case) -> None:
    plain, seen, calibrated = case
    mixer = calibrated("z")
    rows = mixer.in_proj.weight[:32]
    wanted = least_squares(seen.inputs, torch.full((3, 40, 1), constants.GATE), constants.RIDGE_Z)
    assert worst(rows, wanted.t().expand(32, -1)) <= 1e-4
    assert torch.equal(mixer.in_proj.weight[32:], plain["in_proj.weight"][32:])
    same(mixer, plain, "in_proj.weight")
    assert float(F.linear(seen.inputs, rows).detach().mean()) == pytest.approx(constants.GATE, rel=0.2)


def test_conv(case) -> None:
    plain, _, calibrated = case
    mixer = calibrated("conv")
    assert not mixer.conv1d.bias.any()
    assert not mixer.conv1d.weight[:, :, :-1].any()
    assert bool((mixer.conv1d.weight[:, :, -1] == constants.TAP).all())
    same(mixer, plain, "conv1d.bias", "conv1d.weight")


def test_decay(case, kind: str) -> None:
    """One step forgets NEARER / distance nats, never more than one; a step is STEP long where that
    allows it."""
    plain, seen, calibrated = case
    mixer = calibrated("decay")
    forgets = torch.clamp(constants.NEARER / torch.clamp(seen.distance.double(), min=1), max=1)
    step = torch.log1p(torch.exp(mixer.dt_bias.double()))
    decay = torch.exp(mixer.A_log.double())
    if kind == "mamba2":
        assert worst(step * decay, forgets) <= 1e-5
        assert not mixer.in_proj.weight[-4:].any()
        same(mixer, plain, "A_log", "D", "dt_bias", "in_proj.weight")
        assert torch.equal(mixer.in_proj.weight[:-4], plain["in_proj.weight"][:-4])
    else:
        assert worst(step[:, None] * decay, forgets.repeat_interleave(8)[:, None].expand(32, 8)) <= 1e-5
        assert not mixer.dt_proj.weight.any()
        same(mixer, plain, "A_log", "D", "dt_bias", "dt_proj.weight")


def test_the_skip_is_the_least_squares_share_of_x(teacher: Path) -> None:
    """D against a recurrence and a regression of our own, head by head, from the mixer's rows."""
    reader = CheckpointReader(teacher)
    surgery = plan(read_teacher(reader), [2], MixerSettings("mamba2"))
    config = HybridConfig.from_dict(hybrid_json(reader.config, surgery))
    plain = {target.parameter: build(target, reader.tensor, 0) for target in surgery.targets[2]}
    seen = Observer(reader, reader, IDS, CPU).see(2)
    mixer = surgery.kind.calibrate(config, 2, plain, seen, frozenset({"conv", "decay"}))
    rows = F.linear(seen.inputs.double(), mixer.in_proj.weight.double())[..., 32:128] * constants.TAP
    x, B, C = (t.unflatten(-1, (4, 8)) for t in F.silu(rows).split(32, -1))
    dt = torch.zeros(3, 40, 4)
    states, _ = test_ssd.recurrence(x, dt, -torch.exp(mixer.A_log), B, C, torch.zeros(4), mixer.dt_bias)
    shares = []
    for head in range(4):
        both = torch.stack([states[:, :, head].flatten(), x[:, :, head].flatten()], 1)
        target = seen.heads.double().unflatten(-1, (4, 8))[:, :, head].reshape(-1, 1)
        of_state, of_x = torch.linalg.lstsq(both, target, driver="gelsd").solution.flatten().tolist()
        share = of_x / of_state if of_state > 0 else 1.0
        largest = 10 * float(states[:, :, head].detach().norm() / x[:, :, head].detach().norm())
        shares.append(min(max(share, 0.0), largest))
    assert any(0 < s < 1 for s in shares)
    assert worst(mixer.D, torch.tensor(shares)) <= 1e-3


def features(mixer, inputs: torch.Tensor) -> torch.Tensor:
    """What out_proj reads."""
    heard: list[torch.Tensor] = []
    with mixer.out_proj.register_forward_pre_hook(lambda _, given: heard.append(given[0])):
        mixer(inputs)
    return heard[0]


@torch.no_grad()
def test_scale(case, kind: str) -> None:
    plain, seen, calibrated = case
    mixer = calibrated("scale")
    made = features(mixer, seen.inputs).square().mean((0, 1)).sqrt()
    if kind == "mamba":
        made = made * (mixer.out_proj.weight / plain["out_proj.weight"])[0]
    assert worst(made, seen.heads.square().mean((0, 1)).sqrt()) <= 1e-4
    same(mixer, plain, "norm.weight" if kind == "mamba2" else "out_proj.weight")


@torch.no_grad()
def test_out(case) -> None:
    """out_proj: the best multiple of what it was, then the ridge regression of what that leaves."""
    plain, seen, calibrated = case
    drift = torch.randn(seen.drift.shape, generator=torch.Generator().manual_seed(1)) / 10
    for strayed in (torch.zeros_like(drift), drift):
        seen.drift.copy_(strayed)
        mixer = calibrated("out")
        made = features(mixer, seen.inputs).double()
        wanted = seen.heads.double() @ plain["out_proj.weight"].double().t() - constants.DRIFT_SHARE * strayed
        start = made @ plain["out_proj.weight"].double().t()
        factor = float(torch.linalg.lstsq(start.reshape(-1, 1), wanted.reshape(-1, 1)).solution)
        rest = least_squares(made, wanted - factor * start, constants.RIDGE_OUT).t()
        assert worst(mixer.out_proj.weight, factor * plain["out_proj.weight"].double() + rest) <= 1e-3
    same(mixer, plain, "out_proj.weight")
    seen.drift.zero_()


@torch.no_grad()
def test_all_parts_bring_the_layer_closer_on_other_text(teacher: Path, kind: str) -> None:
    reader, g = CheckpointReader(teacher), torch.Generator().manual_seed(9)
    surgery = plan(read_teacher(reader), [2], MixerSettings(kind))
    config = HybridConfig.from_dict(hybrid_json(reader.config, surgery))
    plain = {target.parameter: build(target, reader.tensor, 0) for target in surgery.targets[2]}
    seen = Observer(reader, reader, torch.randint(4, 260, (30, 40), generator=g), CPU).see(2)
    other = Observer(reader, reader, torch.randint(4, 260, (4, 40), generator=g), CPU).see(2)
    wanted, errors = other.heads @ plain["out_proj.weight"].t(), []
    for parts in (frozenset(), frozenset(kind_of("mamba2").parts)):
        made = surgery.kind.calibrate(config, 2, plain, seen, parts)(other.inputs)[0]
        errors.append(float((made - wanted).square().sum() / wanted.square().sum()))
    print(errors)
    assert errors[1] < 0.9
    assert errors[1] < 0.7 * errors[0]


def test_it_is_deterministic_and_written_into_the_manifest(tmp_path: Path, cli: Runner, monkeypatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    write_traces(tmp_path / "traces.jsonl")
    common = ("replace", "--indices", "1,2", "--mixer", kind, "--calibration-tokens", 200)
    cli(*common, "-o", "a", "--json")
    said = json.loads(cli.stdout)["calibration"]
    assert (said["data"], said["tokens"], said["device"], said["parts"]) == (
        "traces.jsonl",
        200,
        "cpu",
        list(kind_of("mamba2").parts[:4]),
    )
    cli(*common, "-o", "b")
    cli(*common, "-o", "c", "--seed", 1)
    cli(*common, "-o", "plain", "--no-calibrate")
    one, two, other, plain = (load_file(next(Path(p).glob("*.safetensors"))) for p in ("a", "b", "c", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.layers.1.mixer.in_proj.weight"], other["model.layers.1.mixer.in_proj.weight"])
    assert all(torch.equal(one[name], plain[name]) for name in one if ".mixer." not in name)
    note = json.loads(Path("a/hybridize.json").read_text())
    assert note["settings"]["calibration"] == said
    assert json.loads(Path("b/hybridize.json").read_text())["settings"]["calibration"]["hash"] == said["hash"]
    assert json.loads(Path("c/hybridize.json").read_text())["settings"]["calibration"]["hash"] != said["hash"]
    assert [layer["origin"] for layer in note["layers"]] == ["teacher", "calibrated", "calibrated", "teacher"]
    assert note["settings"]["calibration"]["tokens"] == 200
    bare = json.loads(Path("plain/hybridize.json").read_text())
    assert [layer["origin"] for layer in bare["layers"]] == ["teacher", "mil", "mil", "teacher"]
    assert bare["settings"]["calibration"] is None


def test_each_layer_alone_is_calibrated_as_replace_would(teacher: Path, kind: str) -> None:
    """What score-mmr starts from: the same as a replacement of that one layer."""
    reader = CheckpointReader(teacher)
    contract = read_teacher(reader)
    starts = lambda layers, together: dict(  # noqa: E731
        starting_values(reader, plan(contract, layers, MixerSettings(kind)), reader, 0, fit(), together=together)
    )
    apart = starts([0, 1, 3], False)
    for layer in (0, 1, 3):
        for name, value in starts([layer], True)[layer].items():
            assert torch.equal(value, apart[layer][name]), (layer, name)
    assert not torch.equal(starts([0, 3], True)[3]["out_proj.weight"], apart[3]["out_proj.weight"])


def test_windows(teacher: Path, tmp_path: Path) -> None:
    encoder, rows = Encoder(load_tokenizer(teacher), "none"), read_rows(str(write_traces(tmp_path / "t.jsonl", 60)))
    documents = {tuple(encoder.encode(row, "row").ids) for row in rows}
    whole = sample_windows(rows, encoder, 1000, seed=0)
    assert whole.shape == (1, 1000)
    assert torch.equal(whole, sample_windows(rows, encoder, 1000, seed=0))
    assert not torch.equal(whole, sample_windows(rows, encoder, 1000, seed=1))
    text = whole.flatten().tolist()
    first = next(d for d in documents if tuple(text[: len(d)]) == d)
    assert any(tuple(text[len(first) : len(first) + len(d)]) == d for d in documents)
    assert torch.equal(sample_windows(rows, encoder, 1000, 0, longest=300), whole[:, :900].view(3, 300))
    assert sample_windows(rows, encoder, 10**9, 0).numel() <= sum(map(len, documents))
    few = read_rows(str(write_traces(tmp_path / "few.jsonl", 1)))
    with pytest.raises(ValueError, match=r"few\.jsonl has \d+ tokens, too few to calibrate on"):
        sample_windows(few, encoder, 1000, 0)


def test_data_is_found_and_its_absence_is_said(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRIDIZE_DATA", raising=False)
    make_teacher(tmp_path / "teacher")
    cli("replace", "--indices", "1", "-o", "bare")
    assert "warning: no text to calibrate on" in cli.stderr
    cli("replace", "--indices", "1", "-o", "quiet", "--no-calibrate")
    assert "warning" not in cli.stderr
    write_traces(tmp_path / "teacher/traces.jsonl")
    cli("replace", "--indices", "1", "-o", "own", "--json")
    assert json.loads(cli.stdout)["calibration"]["data"] == "traces.jsonl"
    cli("replace", "own", "--indices", "2", "-o", "staged", "--json")
    assert json.loads(cli.stdout)["calibration"]["data"] == "traces.jsonl"
    monkeypatch.setenv("HYBRIDIZE_DATA", str(write_traces(tmp_path / "other.jsonl")))
    cli("replace", "--indices", "1", "-o", "env", "--json")
    assert json.loads(cli.stdout)["calibration"]["data"] == "other.jsonl"
    (tmp_path / "broken.jsonl").write_text('{"x": 1}\n')
    monkeypatch.setenv("HYBRIDIZE_DATA", str(tmp_path / "broken.jsonl"))
    assert "--no-calibrate skips the calibration" in cli.fails("replace", "--indices", "1", "-o", "no")


def test_looking_for_data_never_opens_the_hub(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    convert(tmp_path / "teacher", [1], tmp_path / "h1")
    note = json.loads(Path("h1/hybridize.json").read_text())
    Path("h1/hybridize.json").write_text(json.dumps(note | {"root": {"path": "org/teacher-15b", "hash": "0"}}))
    cli("replace", "h1", "--indices", "2", "-o", "bare")
    assert "no text to calibrate on" in cli.stderr
    write_traces(tmp_path / "traces.jsonl")
    cli("replace", "h1", "--indices", "2", "-o", "fitted", "--calibration-tokens", 100)
    assert "warning: 100 calibration tokens are few and may be worse than none; use at least 256" in cli.stderr


def test_damaged_weights_end_in_a_sentence(tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "teacher")
    write_traces(tmp_path / "traces.jsonl")
    tensors = load_file("teacher/model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, "teacher/model.safetensors", metadata={"format": "pt"})
    said = cli.fails("replace", "--indices", "1")
    assert "teacher/model.safetensors: tensor model.layers.1.self_attn.v_proj.weight holds values that are not finite" in said
    assert not Path("h1").exists()
