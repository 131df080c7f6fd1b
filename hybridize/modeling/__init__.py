"""The hybrid causal LM. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_hybridize import CARRIED_KEYS, MIXER_LAYER, HybridConfig, hybrid_config
from .mamba import MambaMixer
from .mamba2 import Mamba2Mixer
from .mixer import FLOAT32, MIXERS, Mixer, initial, inverse_softplus, mixer_class, register_mixer
from .modeling_hybridize import HybridForCausalLM, HybridModel, converted_layer, new_cache, soft_capped
from .scan import backend_for, causal_conv, conv_step, kernels_missing, missing_on_cuda, selective_scan
from .ssd import gated_norm, ssd_scan
from .stock import CACHE

__all__ = [
    "CACHE",
    "CARRIED_KEYS",
    "FLOAT32",
    "MIXERS",
    "MIXER_LAYER",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "Mamba2Mixer",
    "MambaMixer",
    "Mixer",
    "backend_for",
    "causal_conv",
    "conv_step",
    "converted_layer",
    "gated_norm",
    "hybrid_config",
    "initial",
    "inverse_softplus",
    "kernels_missing",
    "missing_on_cuda",
    "mixer_class",
    "new_cache",
    "register_mixer",
    "selective_scan",
    "soft_capped",
    "ssd_scan",
]  # fmt: skip

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
