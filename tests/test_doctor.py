"""doctor: faults that a machine can have, faked one by one, are named with the command that mends
them."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize import doctor
from tests.conftest import Runner


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    for part in {name, *(n for n in sys.modules if n.split(".")[0] == name)}:
        monkeypatch.setitem(sys.modules, part, None)  # so that it is gone again, or as it was, after the test
        del sys.modules[part]
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)


def test_this_machine_is_well_on_its_cpu(cli: Runner) -> None:
    found = json.loads(cli("doctor", "--device", "cpu", "--json"))
    assert found["ok"]
    states = {f["name"]: f["state"] for f in found["findings"]}
    assert states["torch"] == states["transformers"] == "ok"
    assert all(states[name] == "ok" for name in doctor.CHECKS)
    assert states["mamba-ssm"] == "absent"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_asked_for_and_not_there(cli: Runner) -> None:
    cli("doctor", "--device", "cuda", code=1)
    assert "fault  gpu" in cli.stdout
    assert "fix: " in cli.stdout
    assert "not a device" in cli.fails("doctor", "--device", "tpu")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError('x.so: undefined symbol: _ZN3c104cuda')", "built for a torch other than"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "built for a torch other than"),
        ("raise RuntimeError('boom')", "cannot be imported: boom"),
    ],
)
def test_a_kernel_package_that_does_not_load(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "causal_conv1d", body)
    monkeypatch.setattr(doctor, "_version", lambda name: "1.7.0")
    found = doctor._kernel_package("causal-conv1d", "causal_conv1d", True)
    assert found.state == "fault"
    assert said in found.detail
    assert "causal-conv1d==1.7.0" in found.mend


def test_a_kernel_that_loads_and_has_no_code_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "CUDA error: no kernel image is available for execution on the device"
    fake(tmp_path, monkeypatch, "causal_conv1d", f"def causal_conv1d_fn(*a, **k): raise RuntimeError('{message}')")
    found = doctor._checked("convolution", doctor._conv, torch.device("cpu"), kernels=True)
    assert found.state == "fault"
    assert "no code for this GPU" in found.detail
    assert found.mend


@pytest.mark.parametrize("name", ["causal_conv", "selective_scan", "ssd_scan", "gated_norm"])
def test_a_kernel_that_computes_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(doctor, name)

    def wrong(*given: object, **told: object) -> object:
        out = right(*given, **told)
        return (out[0] * 1.001, out[1]) if isinstance(out, tuple) else out * 1.001

    monkeypatch.setattr(doctor, name, wrong)
    faults = [f.name for f in doctor.examine("cpu") if f.state == "fault"]
    assert len(faults) == 1


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "4.40.0" if name == "transformers" else real(name))
    found = by_name(doctor.examine("cpu"))["transformers"]
    assert found.state == "fault"
    assert "4.40.0" in found.detail
    assert found.mend.startswith("pip install 'transformers>=")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else real(name))
    assert by_name(doctor.examine("cpu"))["safetensors"].detail == "not installed"
    monkeypatch.setattr(doctor, "_version", lambda name: "0.0.1" if name == "tokenizers" else real(name))
    assert by_name(doctor.examine("cpu"))["transformers and tokenizers"].state == "fault"


def test_a_driver_too_old_and_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "too old" in doctor._gpu("470.1", True).detail
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in doctor._gpu("580.1", True).detail
    assert doctor._gpu(None, False).state == "absent"


def test_the_project_s_own_requirements_are_what_is_checked() -> None:
    assert {"torch", "transformers", "lm-eval", "safetensors"} <= set(by_name(doctor._packages()))
    assert metadata.requires("hybridize")


@pytest.mark.gpu
def test_kernels_are_right_on_this_gpu() -> None:
    found = by_name(doctor.examine("cuda"))
    for name in (*doctor.CHECKS, "gpu", *doctor.KERNELS):
        assert found[name].state == "ok", found[name]
    assert all("kernel bfloat16" in found[name].detail for name in doctor.CHECKS)


@pytest.mark.parametrize(
    ("built", "able", "unable"),
    [
        (
            ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
            [(8, 9), (8, 7), (10, 3), (12, 1), (9, 0)],
            [(7, 0), (11, 0)],
        ),
        (["sm_90", "compute_90"], [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        (["sm_90a"], [(9, 0)], [(8, 0)]),
    ],
)
def test_code_for_one_gpu_runs_on_later_ones_of_its_major(built: list[str], able: list[Any], unable: list[Any]) -> None:
    assert all(doctor.has_code(built, *capability) for capability in able)
    assert not any(doctor.has_code(built, *capability) for capability in unable)
