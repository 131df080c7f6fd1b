"""Every supported family: nothing of its attention is lost, and the hybrid's numbers hold (DESIGN sections 5 and 8)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybridize.modeling  # noqa: F401
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.surgery.replace import MixerSettings, plan, replace
from hybridize.surgery.teacher import read_teacher
from tests.conftest import worst
from tests.families import FAMILY, make_family


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / name, name) for name in FAMILY}


def load(path: Path, **kwargs: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


def convert(home: Path, output: Path, layers: list[int], kind: str) -> Path:
    source = CheckpointReader(home)
    replace(
        source, str(home), plan(read_teacher(source), layers, MixerSettings(kind)), output, donor=source,
        init_from="checkpoint", seed=0, overwrite=True, settings={},
    )  # fmt: skip
    return output


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILY)
def test_no_layer_converted_is_the_teacher(name: str, homes: dict[str, Path], tmp_path: Path) -> None:
    teacher, student = load(homes[name]), load(convert(homes[name], tmp_path / "h", [], "mamba2"))
    assert type(student).__name__ == "HybridForCausalLM"
    batch = ids(2, 24)
    assert torch.equal(student(batch).logits, teacher(batch).logits)
    grown = [m.generate(batch, max_new_tokens=8, do_sample=False, min_new_tokens=8) for m in (student, teacher)]
    assert torch.equal(*grown)
