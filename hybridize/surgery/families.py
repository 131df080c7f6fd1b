"""The supported families of teachers, with the properties that neither tensors nor configs reveal."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.extensions import register

FAMILIES: dict[str, FamilySpec] = {}


@dataclass(frozen=True)
class FamilySpec:
    """A family, named by its `model_type` in transformers. Its backbone must be embedding, layers
    and norm; its norms RMSNorm; its attention layers must have `self_attn` with q_proj, k_proj and
    v_proj (or qkv_proj) and o_proj.

    qk_norm: queries and keys are normalised. output_norm: the output of attention is normalised.
    sandwich: norms before and after attention and MLP. norm_offset: added to the weight of norms.
    scaled_embeddings: multiplied by hidden_size^1/2, in code. stock_block: attention layers and
    norms are those of GraniteMoeHybridForCausalLM (see export/formats/granite.py).
    """

    family: str
    qk_norm: bool = False
    output_norm: bool = False
    sandwich: bool = False
    norm_offset: int = 0
    scaled_embeddings: bool = False
    stock_block: bool = False


def register_family(spec: FamilySpec) -> FamilySpec:
    """Registers a family, so that its teachers are accepted, and returns it. Its classes must be
    registered with transformers' Auto classes."""
    return register(FAMILIES, spec.family, spec)


for _spec in (
    FamilySpec("llama", stock_block=True),
    FamilySpec("mistral", stock_block=True),
    FamilySpec("qwen2"),
    FamilySpec("qwen3", qk_norm=True),
    FamilySpec("gemma2", output_norm=True, sandwich=True, norm_offset=1, scaled_embeddings=True),
    FamilySpec("gemma3_text", qk_norm=True, output_norm=True, sandwich=True, norm_offset=1, scaled_embeddings=True),
    FamilySpec("phi3"),
    FamilySpec("olmo2", qk_norm=True, output_norm=True),
    FamilySpec("granite", stock_block=True),
    FamilySpec("smollm3"),
    FamilySpec("mixtral"),
    FamilySpec("qwen3_moe", qk_norm=True),
):
    register_family(_spec)
