"""Loads models and tokenizers, with or without weights. Never uses the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, first_line, setting
from hybridize.modeling import HybridForCausalLM, hybrid_config, mixer_class

M = TypeVar("M", bound=nn.Module)


def load_model(path: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """Returns a causal LM, teacher or hybrid, in eval mode with weights in `dtype`."""
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    kwargs = _loading_settings(config, path, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True, **kwargs
    )
    return model.to(device).eval()


def _loading_settings(config: Any, path: Path, dtype: torch.dtype) -> dict[str, str]:
    """Returns additional loading arguments that a model with this config needs. Raises InputError
    if it cannot run in `dtype`."""
    shape = getattr(config, "mixer", None)
    if dtype == torch.float16 and shape is not None and not mixer_class(shape).fits_float16:
        raise InputError(
            f"{path} has {shape['kind']} mixers, whose output overflows float16; use {setting('dtype')} bfloat16 or float32"
        )
    # transformers before 5.23 ignores the soft cap under sdpa
    return {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}


def load_hybrid(source: CheckpointReader, device: torch.device, dtype: torch.dtype) -> HybridForCausalLM:
    """Returns a teacher or hybrid as HybridForCausalLM, whose layers can be run one by one, in eval
    mode with weights in `dtype`."""
    config = hybrid_config(source.config)
    kwargs = _loading_settings(config, source.path, dtype)
    model = HybridForCausalLM.from_pretrained(source.path, config=config, dtype=dtype, **kwargs)
    return model.to(device).eval()


def load_empty(path: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """Returns the model of `load_model` with its weights on the meta device, for callers that load
    them piece by piece; buffers are allocated."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    kwargs, make = _loading_settings(config, path, dtype), transformers.AutoModelForCausalLM.from_config
    return without_storage(lambda: make(config, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)).eval()


def without_storage(make: Callable[[], M]) -> M:
    """Returns the model that `make` builds, with tied, uninitialised weights on the meta device;
    buffers are allocated."""
    from accelerate import init_empty_weights

    from hybridize.compat.transformers import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = make()
    model.tie_weights()  # type: ignore[operator]  # otherwise part of the skipped initialisation
    return model


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """Returns the checkpoint's tokenizer. Raises InputError if it has none that works."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise InputError(f"{path} has no usable tokenizer: {first_line(error)}") from error


def quiet_transformers() -> None:
    """Turns off transformers' own warnings and progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
