"""Verifies that a conversion lost nothing: what new mixers, as they lie on disk, make of real
inputs, against what the teacher's own attention code makes of them; and the provenance of every
tensor.

The teacher's side runs the family's own module with an attention function of ours and without
rotation, so that queries, keys and values arrive here with whatever biases, norms and scales the
family applies; nothing of the mapping is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.compat.transformers import register_attention
from hybridize.errors import WorkError
from hybridize.modeling import HybridConfig, hybrid_config
from hybridize.surgery.mapping import Rows
from hybridize.surgery.observe import Observer
from hybridize.surgery.replace import Calibration, Surgery, hybrid_json
from hybridize.surgery.teacher import Teacher

CLOSE = 1e-5  # relative to the largest value of the teacher's
ROUNDED = 2**-7  # where an attention scale was folded into C and stored in bfloat16 again
NAME = "hybridize_linear"
SAMPLE = (2, 128)  # rows and tokens


@dataclass(frozen=True)
class Verification:
    """The worst deviation over all layers, relative to the teacher's largest value: of x, B and C
    from v, k and q, head by head, and of the mixer without decay, convolution and gate (`linear`)
    from causal linear attention."""

    layers: list[int]
    tokens: int
    worst: dict[str, float]


def verify_conversion(
    source: CheckpointReader, donor: CheckpointReader, result: CheckpointReader, surgery: Surgery, teacher: Teacher,
    ids: Tensor, device: torch.device, calibrated: frozenset[str] = frozenset(),
) -> Verification:  # fmt: skip
    """Raises WorkError naming the layer, or the tensor, and what deviates. ids [W, T]: tokens, text
    where there is some.

    calibrated: parts of mixers that were set anew; out_proj is held against o_proj bit for bit
    unless one of them is its.
    """
    gone = tuple(f"model.layers.{layer}." for layer in surgery.layers)
    for name in source.names:
        if not (name.startswith(gone) and ".self_attn." in name) and not (name in result and source.same_bits(name, result)):
            raise WorkError(f"{name} is not what it was")
    config = HybridConfig.from_dict(hybrid_json(source.config, surgery))
    observer, worst = Observer(source, donor, ids, device), dict.fromkeys(("x", "B", "C", "linear"), 0.0)
    for layer in surgery.layers:
        _check_output(layer, donor, result, teacher, surgery.kind.changes_output(calibrated))
        deviations = _deviations(layer, observer, config, result, surgery, teacher)
        worst = {name: max(worst[name], value) for name, value in deviations.items()}
    return Verification(surgery.layers, ids.numel(), worst)


def _check_output(layer: int, donor: CheckpointReader, result: CheckpointReader, teacher: Teacher, fitted: bool) -> None:
    """WorkError unless out_proj is o_proj bit for bit; its weight only if it was not `fitted`."""
    for what in ("weight", *(["bias"] if "o_proj.bias" in teacher.tensors else [])):
        ours, theirs = (f"model.layers.{layer}.{part}.{what}" for part in ("mixer.out_proj", "self_attn.o_proj"))
        if (what == "bias" or not fitted) and not torch.equal(result.tensor(ours), donor.tensor(theirs)):
            raise WorkError(f"layer {layer}: {ours} is not {theirs}")


def _deviations(
    layer: int, observer: Observer, config: HybridConfig, result: CheckpointReader, surgery: Surgery, teacher: Teacher
) -> dict[str, float]:
    """How far a layer's mixer, as it lies in `result`, is from its attention. WorkError where it is
    too far."""
    assert surgery.mixer is not None
    seen, prefix = observer.see(layer), f"model.layers.{layer}.mixer."
    theirs = _captured_vectors(seen.attention, seen.inputs, observer.rotary(layer))
    mixer: Any = surgery.kind.mixer(config, layer).to(observer.device).eval()  # type: ignore[call-arg, arg-type]
    mixer.load_state_dict({name: result.tensor(prefix + name).float() for name in mixer.state_dict()})
    with torch.no_grad():
        ours = surgery.kind.vectors(mixer, seen.inputs)
    folded = teacher.scale != 1 and result.tensor(f"{prefix}in_proj.weight").dtype != torch.float32
    found = compare(ours, theirs, surgery.mixer["d_state"], teacher.scale)
    for name, value in found.items():
        bound = ROUNDED if folded and name in ("C", "linear") else CLOSE
        if not value <= bound:
            raise WorkError(f"layer {layer}: {name} deviates from the teacher's attention by {value:.1e} (at most {bound:.0e})")
    return found


def verification_ids(calibration: Calibration | None, config: dict[str, Any], seed: int) -> tuple[Tensor, str | None]:
    """ids [W, T] to verify on, and what text they are of: that of the calibration, or random tokens
    and None."""
    if calibration is not None:
        return calibration.ids[: SAMPLE[0], : SAMPLE[1]], calibration.data
    high, draw = min(hybrid_config(config).vocab_size, 1 << 15), torch.Generator().manual_seed(seed)
    return torch.randint(0, high, SAMPLE, generator=draw), None


def compare(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], states: int, scale: float) -> dict[str, float]:
    """ours: x, B, C and the linear form, all [W, T, I]; theirs: q, k, v [W, T, H, P], q without its
    scale. states: N."""
    q, k, v = (t.double() for t in theirs)
    runs = lambda t: t.unflatten(-1, (-1, states))  # noqa: E731
    meets = torch.einsum("wthcn,wshcn->whcts", runs(q), runs(k)).tril() * scale
    linear = torch.einsum("whcts,wshcn->wthcn", meets, runs(v)).flatten(2)
    wanted = {"x": v.flatten(2), "B": k.flatten(2), "C": q.flatten(2) * scale, "linear": linear}
    far = lambda a, b: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))  # noqa: E731
    return {name: far(mine, wanted[name]) for name, mine in zip(wanted, ours, strict=True)}


def _captured_vectors(attention: Any, inputs: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """q, k, v [W, T, H, P] as the family's own code hands them to its attention function, without
    rotation."""
    captured: list[tuple[Tensor, ...]] = []

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        each = query.shape[1] // key.shape[1]
        captured.append((query, key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)))
        return query.transpose(1, 2), None

    register_attention(NAME, capture)
    before, still = attention.config._attn_implementation, (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
    attention.config._attn_implementation = NAME
    with torch.no_grad():
        for window in inputs:
            attention(window.unsqueeze(0), position_embeddings=still, attention_mask=None)
    attention.config._attn_implementation = before
    return tuple(torch.cat(part).transpose(1, 2) for part in zip(*captured, strict=True))


def provenance(source: CheckpointReader, surgery: Surgery, donor: CheckpointReader) -> dict[str, str]:
    """What became of every tensor of the source, and where mixers take the donor's from. WorkError
    if one would be lost."""
    into: dict[str, list[str]] = {}
    for targets in surgery.targets.values():
        for target in targets:
            begin = 0
            for part in target.parts:
                if part.source is not None:
                    into.setdefault(part.source.name, []).append(_place(target.name, begin, part))
                begin += part.count
    gone = tuple(f"model.layers.{layer}.self_attn." for layer in surgery.layers)
    found = {}
    for name in source.names:
        if not name.startswith(gone):
            found[name] = "copied"
        elif name.endswith("rotary_emb.inv_freq"):
            found[name] = "ends: a mixer has no rotary table"
        elif donor is not source:
            found[name] = f"replaced: the mixer starts from {donor.path}"
        elif name in into:
            found[name] = "; ".join(into[name])
        else:
            raise WorkError(f"{name} would be lost")
    return found


def _place(name: str, begin: int, part: Rows) -> str:
    assert part.source is not None
    scaled = "" if part.source.scale == 1 else f", times {part.source.scale:g}"
    return f"{name} {part.label}[{begin}:{begin + part.count}]{scaled}"
