"""Verifies a conversion: compares the output of the new mixers, as stored on disk, with that of the
teacher's own attention code on real inputs; and lists the provenance of every tensor.

The teacher's side runs the family's own module with a custom attention function and without
rotation. Queries, keys and values therefore include whatever biases, norms and scales the family
applies; nothing of the mapping is used.
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

CLOSE = 1e-5  # bound, relative to the teacher's largest value
ROUNDED = 2**-7  # bound if an attention scale was folded into C and rounded to bfloat16
NAME = "hybridize_linear"
SAMPLE = (2, 128)  # rows and tokens


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    worst: the largest deviation over all layers, relative to the teacher's largest value, of x, B
    and C from v, k and q, head by head, and of the mixer without decay, convolution and gate
    (`linear`) from causal linear attention.
    """

    layers: list[int]
    tokens: int
    worst: dict[str, float]


def verify_conversion(
    source: CheckpointReader, donor: CheckpointReader, result: CheckpointReader, surgery: Surgery, teacher: Teacher,
    ids: Tensor, device: torch.device, calibrated: frozenset[str] = frozenset(),
) -> Verification:  # fmt: skip
    """Verifies a conversion and returns the largest deviations. Raises WorkError, naming the layer
    or the tensor, if one is too large.

    ids [W, T]: tokens, of text if available. calibrated: parts of mixers that calibration set;
    out_proj must equal o_proj bit for bit unless one of them changes it.
    """
    gone = tuple(f"model.layers.{layer}." for layer in surgery.layers)
    for name in source.names:
        if not (name.startswith(gone) and ".self_attn." in name) and not (name in result and source.same_bits(name, result)):
            raise WorkError(f"{name} differs from the source")
    config = HybridConfig.from_dict(hybrid_json(source.config, surgery))
    observer, worst = Observer(source, donor, ids, device), dict.fromkeys(("x", "B", "C", "linear"), 0.0)
    for layer in surgery.layers:
        _check_output(layer, donor, result, teacher, surgery.kind.changes_output(calibrated))
        deviations = _deviations(layer, observer, config, result, surgery, teacher)
        worst = {name: max(worst[name], value) for name, value in deviations.items()}
    return Verification(surgery.layers, ids.numel(), worst)


def _check_output(layer: int, donor: CheckpointReader, result: CheckpointReader, teacher: Teacher, fitted: bool) -> None:
    """Raises WorkError unless out_proj equals o_proj bit for bit; a `fitted` weight is not checked."""
    for what in ("weight", *(["bias"] if "o_proj.bias" in teacher.tensors else [])):
        ours, theirs = (f"model.layers.{layer}.{part}.{what}" for part in ("mixer.out_proj", "self_attn.o_proj"))
        if (what == "bias" or not fitted) and not torch.equal(result.tensor(ours), donor.tensor(theirs)):
            raise WorkError(f"layer {layer}: {ours} differs from {theirs}")


def _deviations(
    layer: int, observer: Observer, config: HybridConfig, result: CheckpointReader, surgery: Surgery, teacher: Teacher
) -> dict[str, float]:
    """Returns the deviations of a layer's mixer, as stored in `result`, from its attention. Raises
    WorkError if one is too large."""
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
    """Returns ids [W, T] to verify on and the name of their text: those of the calibration, or else
    random tokens and None."""
    if calibration is not None:
        return calibration.ids[: SAMPLE[0], : SAMPLE[1]], calibration.data
    high, draw = min(hybrid_config(config).vocab_size, 1 << 15), torch.Generator().manual_seed(seed)
    return torch.randint(0, high, SAMPLE, generator=draw), None


def compare(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], states: int, scale: float) -> dict[str, float]:
    """Returns the relative deviations of x, B, C and the linear form.

    ours: these four, all [W, T, I]; theirs: q, k, v [W, T, H, P], q without its scale. states: N,
    the state size.
    """
    q, k, v = (t.double() for t in theirs)
    runs = lambda t: t.unflatten(-1, (-1, states))  # noqa: E731
    meets = torch.einsum("wthcn,wshcn->whcts", runs(q), runs(k)).tril() * scale
    linear = torch.einsum("whcts,wshcn->wthcn", meets, runs(v)).flatten(2)
    wanted = {"x": v.flatten(2), "B": k.flatten(2), "C": q.flatten(2) * scale, "linear": linear}
    far = lambda a, b: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))  # noqa: E731
    return {name: far(mine, wanted[name]) for name, mine in zip(wanted, ours, strict=True)}


def _captured_vectors(attention: Any, inputs: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns q, k, v [W, T, H, P] as the family's own code passes them to its attention function,
    without rotation."""
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
    """Returns {tensor of the source: what became of it}. Raises WorkError if one would be lost."""
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
            found[name] = "dropped: a mixer has no rotary table"
        elif donor is not source:
            found[name] = f"replaced: the mixer starts from {donor.path}"
        elif name in into:
            found[name] = "; ".join(into[name])
        else:
            raise WorkError(f"{name} would be lost by the conversion")
    return found


def _place(name: str, begin: int, part: Rows) -> str:
    assert part.source is not None
    scaled = "" if part.source.scale == 1 else f", times {part.source.scale:g}"
    return f"{name} {part.label}[{begin}:{begin + part.count}]{scaled}"
