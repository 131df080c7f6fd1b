"""transformers' own ModelTesterMixin on our class. It is in no wheel: SDIST names the unpacked
source distribution of the installed version (pip download --no-deps --no-binary :all:
transformers==...). What it needs of directories that are not in there either (exporters/,
generation/) is left out: export tests and GenerationTesterMixin. Run it by itself, with -c
/dev/null, since its markers are not ours."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.modeling import HybridConfig, HybridForCausalLM, HybridModel

SDIST = os.environ.get("SDIST")
if SDIST is None:
    pytest.skip("needs SDIST, transformers' unpacked source distribution", allow_module_level=True)


def mixin() -> Any:
    """ModelTesterMixin, with empty classes for what the distribution lacks."""
    for name, attribute in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
        parts = name.split(".")
        for depth in range(len(parts)):
            sys.modules.setdefault("hf_tests." + ".".join(parts[: depth + 1]), types.ModuleType(parts[depth]))
        setattr(sys.modules[f"hf_tests.{name}"], attribute, type(attribute, (), {}))
    package = types.ModuleType("hf_tests")
    package.__path__ = [str(Path(SDIST) / "tests")]  # type: ignore[arg-type]
    sys.modules["hf_tests"] = package
    return importlib.import_module("hf_tests.test_modeling_common").ModelTesterMixin


class Tester:
    batch_size, seq_length, is_training = 3, 9, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, parent: Any, kind: str) -> None:
        self.parent, self.kind = parent, kind

    def get_config(self) -> HybridConfig:
        shape = {"kind": "mamba2", "d_inner": 32, "d_state": 8, "d_conv": 4}
        if self.kind == "mamba":
            shape = {"kind": "mamba", "d_inner": 32, "d_state": 4, "d_conv": 4, "dt_rank": 2, "expand": "head"}
        return HybridConfig(
            base_model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
            layer_types=["full_attention", "linear_attention"], mixer=shape,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[HybridConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, 64, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Common(mixin()):  # type: ignore[misc]
    all_model_classes = (HybridModel, HybridForCausalLM)
    kind = "mamba2"
    has_attentions = False  # a hybrid gives no attention maps: half of its layers have none

    @unittest.skip("GenerationTesterMixin is not in the distribution")
    def test_generation_tester_mixin_inheritance(self) -> None: ...

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: Any, return_labels: bool = False) -> dict[str, Any]:
        found = copy.deepcopy(inputs)  # the mixin's own goes by a list of transformers' classes
        if return_labels and model_class is HybridForCausalLM:
            found["labels"] = found["input_ids"]
        return found

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.kind)


def _with_loss(name: str) -> Any:
    """A test that trains: the backbone alone has no loss, which the mixin knows of transformers'
    own classes only."""

    def test(self: Any) -> None:
        self.all_model_classes = (HybridForCausalLM,)
        getattr(super(_Common, self), name)()

    return test


for _name in ("", "_gradient_checkpointing", *(f"_gradient_checkpointing_use_reentrant_{way}" for way in ("true", "false"))):
    setattr(_Common, f"test_training{_name}", _with_loss(f"test_training{_name}"))


class Mamba2Test(_Common, unittest.TestCase):
    pass


class MambaTest(_Common, unittest.TestCase):
    kind = "mamba"
