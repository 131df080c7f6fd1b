"""Special features of a teacher's attention and what a conversion does with each, for reports and
for the table in docs/reference/families.md. They are read from the family's own module and from the
teacher description that surgery uses."""

from __future__ import annotations

from typing import Any

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.modeling import hybrid_config
from hybridize.surgery.teacher import read_teacher

# config keys of features outside the attention, which are kept: (description, value if absent)
BACKBONE = {
    "embedding_multiplier": ("scaled embeddings", 1.0),
    "residual_multiplier": ("scaled residual branches", 1.0),
    "logits_scaling": ("scaled logits", 1.0),
    "final_logit_softcapping": ("soft-capped logits", None),
    "tie_word_embeddings": ("tied embeddings", False),
}


def features(reader: CheckpointReader) -> dict[str, str]:
    """Returns {feature: what a conversion does with it}. Raises InputError as `read_teacher` does,
    for anything that cannot be converted."""
    teacher, config = read_teacher(reader), hybrid_config(reader.config)
    has, found = teacher.tensors, dict[str, str]()
    if teacher.inner != teacher.hidden:
        found[f"heads of {teacher.head_dim}"] = f"the mixer's inner width is {teacher.inner}"
    if teacher.kv_heads != teacher.heads:
        found[f"{teacher.heads} query heads on {teacher.kv_heads} KV heads"] = "KV heads are repeated per query head"
    if "qkv_proj.weight" in has:
        found["fused q, k and v"] = "split by rows"
    biases = [part for part in "qkv" if f"{part}_proj.bias" in has or "qkv_proj.bias" in has]
    if biases:
        found[f"biases of {', '.join(biases)}"] = "rows of in_proj.bias"
    if "o_proj.bias" in has:
        found["bias of o"] = "out_proj.bias"
    if teacher.norm_bc is not None:
        over = "each head" if teacher.norm_bc["over"] == "head" else "all heads together"
        found[f"RMSNorm of queries and keys over {over}"] = "kept, as the norm of C and B"
    if abs(teacher.scale - 1) > 1e-6:
        into = "C_norm" if teacher.norm_bc is not None else "the rows of C"
        found[f"attention scale {teacher.scale * teacher.head_dim**-0.5:.4g}"] = (
            f"factor {teacher.scale:.4g} folded into {into}"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found["soft-capped attention scores"] = "dropped with the softmax"
    if "sliding_attention" in teacher.layer_types:
        found[f"window of {config.sliding_window}"] = "dropped: a state has no window; layers that stay attention keep it"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(p["rope_type"]) for p in (rope, *(v for v in rope.values() if isinstance(v, dict))) if "rope_type" in p}
    rotated = [bool(use) for use in getattr(config, "no_rope_layers", None) or []]
    which = "" if all(rotated) else f", in {sum(rotated)} of {len(rotated)} layers"
    found[f"RoPE ({', '.join(sorted(kinds)) or 'default'}{which})"] = "dropped; the decay encodes order"
    if teacher.spec.output_norm:
        found["norm on the attention's output"] = "kept"
    if teacher.spec.scaled_embeddings:
        found["scaled embeddings"] = "kept"
    for key, (words, absent) in BACKBONE.items():
        value: Any = getattr(config, key, absent)
        if value != absent:
            found[words] = "kept"
    return found
