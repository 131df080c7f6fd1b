"""What a teacher's attention has beside the plain one, and what becomes of each: read from the
family's own module and from the contract that surgery goes by, for reports and for the table in
docs/reference/families.md."""

from __future__ import annotations

from typing import Any

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.modeling import hybrid_config
from hybridize.surgery.teacher import read_teacher

# keys of configs for what lies outside the attention and stays as it is: how to say it, and what it
# is when absent
BACKBONE = {
    "embedding_multiplier": ("scaled embeddings", 1.0),
    "residual_multiplier": ("scaled residual branches", 1.0),
    "logits_scaling": ("divided logits", 1.0),
    "final_logit_softcapping": ("soft-capped logits", None),
    "tie_word_embeddings": ("tied embeddings", False),
}


def features(reader: CheckpointReader) -> dict[str, str]:
    """Feature to fate, in reading order. InputError as `read_teacher`, which refuses whatever has
    no place here."""
    teacher, config = read_teacher(reader), hybrid_config(reader.config)
    has, found = teacher.tensors, dict[str, str]()
    if teacher.inner != teacher.hidden:
        found[f"heads of {teacher.head_dim}"] = f"the mixer is {teacher.inner} wide"
    if teacher.kv_heads != teacher.heads:
        found[f"{teacher.heads} query heads on {teacher.kv_heads} key/value heads"] = "keys and values stand once a query head"
    if "qkv_proj.weight" in has:
        found["fused q, k and v"] = "split by rows"
    biases = [part for part in "qkv" if f"{part}_proj.bias" in has or "qkv_proj.bias" in has]
    if biases:
        found[f"biases of {', '.join(biases)}"] = "rows of in_proj.bias"
    if "o_proj.bias" in has:
        found["bias of o"] = "out_proj.bias"
    if teacher.norm_bc is not None:
        over = "each head" if teacher.norm_bc["over"] == "head" else "all heads together"
        found[f"RMSNorm of queries and keys over {over}"] = "the same norm of C and B"
    if abs(teacher.scale - 1) > 1e-6:
        into = "C_norm" if teacher.norm_bc is not None else "the rows of C"
        found[f"attention scale {teacher.scale * teacher.head_dim**-0.5:.4g}"] = (
            f"factor {teacher.scale:.4g} folded into {into}"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found["soft-capped attention scores"] = "ends with the softmax"
    if "sliding_attention" in teacher.layer_types:
        found[f"window of {config.sliding_window}"] = "ends: a state has no window; layers that stay attention keep it"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(p["rope_type"]) for p in (rope, *(v for v in rope.values() if isinstance(v, dict))) if "rope_type" in p}
    turned = [bool(use) for use in getattr(config, "no_rope_layers", None) or []]
    which = "" if all(turned) else f", in {sum(turned)} of {len(turned)} layers"
    found[f"RoPE ({', '.join(sorted(kinds)) or 'default'}{which})"] = "ends: a state knows order by its decay"
    if teacher.spec.output_norm:
        found["norm behind the attention"] = "stays"
    if teacher.spec.scaled_embeddings:
        found["scaled embeddings"] = "stay"
    for key, (words, absent) in BACKBONE.items():
        value: Any = getattr(config, key, absent)
        if value != absent:
            found[words] = "stay"
    return found
