"""Loading models and tokenizers, with weights or without. Never touches the network."""

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
    """A causal LM, teacher or hybrid, in eval mode with its weights as `dtype`. Never touches the
    network."""
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    told = _how(config, path, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True, **told
    )
    return model.to(device).eval()


def _how(config: Any, path: Path, dtype: torch.dtype) -> dict[str, str]:
    """What loading must be told of a model with this config; InputError where it cannot be had in
    `dtype`."""
    shape = getattr(config, "mixer", None)
    if dtype == torch.float16 and shape is not None and not mixer_class(shape).fits_float16:
        raise InputError(
            f"{path} has {shape['kind']} mixers, whose output overflows float16; use {setting('dtype')} bfloat16 or float32"
        )
    # which transformers before 5.23 drops under sdpa
    return {} if getattr(config, "attn_logit_softcapping", None) is None else {"attn_implementation": "eager"}


def load_hybrid(source: CheckpointReader, device: torch.device, dtype: torch.dtype) -> HybridForCausalLM:
    """A teacher or hybrid as our own class, whose layers can be run one by one; in eval mode,
    weights as `dtype`."""
    config = hybrid_config(source.config)
    told = _how(config, source.path, dtype)
    model = HybridForCausalLM.from_pretrained(source.path, config=config, dtype=dtype, **told)
    return model.to(device).eval()


def load_empty(path: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The same model without its weights, for a caller that puts them in piece by piece; buffers
    are real."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    told, make = _how(config, path, dtype), transformers.AutoModelForCausalLM.from_config
    return without_storage(lambda: make(config, dtype=dtype, trust_remote_code=trust_remote_code, **told)).eval()


def without_storage(make: Callable[[], M]) -> M:
    """The model that `make` makes, its weights tied and on the meta device, none of them drawn;
    buffers are real."""
    from accelerate import init_empty_weights

    from hybridize.compat.transformers import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = make()
    model.tie_weights()  # type: ignore[operator]  # which goes with the drawing of weights that is left out
    return model


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, or InputError where it has none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise InputError(f"{path} has no usable tokenizer: {first_line(error)}") from error


def quiet_transformers() -> None:
    """No warnings and progress bars of transformers' own: one program, one voice."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
