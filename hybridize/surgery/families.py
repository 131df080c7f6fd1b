"""The families of teachers that can be converted. One row each: what no tensor and no key of a
config says about them."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES: dict[str, FamilySpec] = {}


@dataclass(frozen=True)
class FamilySpec:
    """A family by its `model_type` in transformers. Its backbone is embedding, layers and norm; its
    attention layers have `self_attn` with q_proj, k_proj and v_proj (or qkv_proj) and o_proj, and
    RMSNorms.

    qk_norm: RMSNorm of queries and keys. output_norm: a norm on the output of attention. sandwich:
    norms before and after attention and MLP. norm_offset: norms multiply by this plus their weight.
    scaled_embeddings: by hidden_size^1/2, in code. stock_block: attention layers and norms are
    those that GraniteMoeHybridForCausalLM has (see export/formats/granite.py).
    """

    family: str
    qk_norm: bool = False
    output_norm: bool = False
    sandwich: bool = False
    norm_offset: int = 0
    scaled_embeddings: bool = False
    stock_block: bool = False


def register_family(spec: FamilySpec) -> FamilySpec:
    """From here on teachers of this family are accepted. Its classes must be known to transformers'
    Auto classes."""
    FAMILIES[spec.family] = spec
    return spec


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
