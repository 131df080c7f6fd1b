"""What runs: the hybrid causal LM. Importing this registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_hybridize import MIXER_KEYS, MIXER_LAYER, HybridConfig
from .mamba import FLOAT32, MambaMixer, initial
from .modeling_hybridize import LLAMA_SHAPED, MIXERS, HybridForCausalLM, HybridModel, converted_layer
from .scan import engine_for, kernels_missing

__all__ = [
    "FLOAT32", "LLAMA_SHAPED", "MIXERS", "MIXER_KEYS", "MIXER_LAYER", "HybridConfig", "HybridForCausalLM", "HybridModel",
    "MambaMixer", "converted_layer", "engine_for", "initial", "kernels_missing",
]  # fmt: skip

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
