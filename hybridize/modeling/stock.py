"""Imports of transformers' internals that the modeling files need.

Tested with transformers 5.17.0 to 5.24.0. This folder is exported as it is and must run without
hybridize, so it does not use `hybridize/compat/`, which has the same role for all other code.
"""

import inspect

from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# The name of the cache argument of layers, masks and outputs: `past_key_values` until 5.23,
# deprecated since.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

__all__ = [
    "CACHE", "BaseModelOutputWithPast", "Cache", "CausalLMOutputWithPast", "DynamicCache", "can_return_tuple",
    "create_causal_mask", "create_sliding_window_causal_mask", "get_checkpoint_conversion_mapping",
    "register_checkpoint_conversion_mapping",
]  # fmt: skip
