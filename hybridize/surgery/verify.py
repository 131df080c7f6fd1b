"""The proof that surgery lost nothing: what new mixers, as they lie on disk, make of real inputs,
against what the teacher's own attention code makes of them, and the fate of every tensor.

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
from hybridize.modeling import HybridConfig
from hybridize.surgery.mapping import Rows
from hybridize.surgery.observe import Observer
from hybridize.surgery.replace import Surgery, hybrid_json
from hybridize.surgery.teacher import Teacher

CLOSE = 1e-5  # relative to the largest value of the teacher's
ROUNDED = 2**-7  # where an attention scale was folded into C and stored in bfloat16 again
NAME = "hybridize_linear"


@dataclass(frozen=True)
class Proof:
    """The worst deviation over all layers, relative to the teacher's largest value: of x, B and C
    from v, k and q, head by head, and of the mixer without decay, convolution and gate (`linear`)
    from causal linear attention."""

    layers: list[int]
    tokens: int
    worst: dict[str, float]


def prove(
    source: CheckpointReader, donor: CheckpointReader, result: CheckpointReader, surgery: Surgery, teacher: Teacher,
    ids: Tensor, device: torch.device, calibrated: frozenset[str] = frozenset(),
) -> Proof:  # fmt: skip
    """Raises WorkError naming the layer, or the tensor, and what deviates. ids [W, T]: tokens, text
    where there is some.

    calibrated: parts of mixers that were set anew; out_proj is held against o_proj bit for bit
    unless one of them is its.
    """
    assert surgery.mixer is not None
    config = HybridConfig.from_dict(hybrid_json(source.config, surgery))
    observer, worst = Observer(source, donor, ids, device), dict.fromkeys(("x", "B", "C", "linear"), 0.0)
    folded = (
        teacher.scale != 1 and result.tensor(f"model.layers.{surgery.layers[0]}.mixer.in_proj.weight").dtype != torch.float32
    )
    gone = tuple(f"model.layers.{layer}." for layer in surgery.layers)
    for name in source.names:
        if not (name.startswith(gone) and ".self_attn." in name) and not (name in result and source.same_bits(name, result)):
            raise WorkError(f"{name} is not what it was")
    fitted = surgery.kind.changes_output(calibrated)
    for layer in surgery.layers:
        for what in ("weight", *(["bias"] if "o_proj.bias" in teacher.tensors else [])):
            made, theirs_ = (f"model.layers.{layer}.{part}.{what}" for part in ("mixer.out_proj", "self_attn.o_proj"))
            if (what == "bias" or not fitted) and not torch.equal(result.tensor(made), donor.tensor(theirs_)):
                raise WorkError(f"layer {layer}: {made} is not {theirs_}")
        seen = observer.see(layer)
        theirs = _listen(seen.attention, seen.inputs, observer.rotary(layer))
        mixer: Any = surgery.kind.mixer(config, layer).to(device).eval()  # type: ignore[call-arg, arg-type]
        prefix = f"model.layers.{layer}.mixer."
        mixer.load_state_dict({name: result.tensor(prefix + name).float() for name in mixer.state_dict()})
        with torch.no_grad():
            ours = surgery.kind.vectors(mixer, seen.inputs)
        for name, value in compare(ours, theirs, surgery.mixer["d_state"], teacher.scale).items():
            bound = ROUNDED if folded and name in ("C", "linear") else CLOSE
            if not value <= bound:
                raise WorkError(
                    f"layer {layer}: {name} deviates from the teacher's attention by {value:.1e} (at most {bound:.0e})"
                )
            worst[name] = max(worst[name], value)
    return Proof(surgery.layers, ids.numel(), worst)


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


def _listen(attention: Any, inputs: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """q, k, v [W, T, H, P] as the family's own code hands them to its attention function, without
    rotation."""
    heard: list[tuple[Tensor, ...]] = []

    def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        each = query.shape[1] // key.shape[1]
        heard.append((query, key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)))
        return query.transpose(1, 2), None

    register_attention(NAME, listen)
    before, still = attention.config._attn_implementation, (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
    attention.config._attn_implementation = NAME
    with torch.no_grad():
        for window in inputs:
            attention(window.unsqueeze(0), position_embeddings=still, attention_mask=None)
    attention.config._attn_implementation = before
    return tuple(torch.cat(part).transpose(1, 2) for part in zip(*heard, strict=True))


def fates(source: CheckpointReader, surgery: Surgery, donor: CheckpointReader) -> dict[str, str]:
    """What became of every tensor of the source, and where mixers take the donor's from. WorkError
    if one has no fate."""
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
