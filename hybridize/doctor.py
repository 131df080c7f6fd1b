"""Checks this machine: installed versions, their compatibility, and each kernel against a reference
computation.

A kernel package that imports may still fail at its first launch (another ABI, no code for this
GPU), so each kernel is run.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

from hybridize import __version__
from hybridize.compat import TRIED
from hybridize.errors import first_line
from hybridize.modeling import causal_conv, gated_norm, selective_scan, ssd_scan
from hybridize.runtime.device import pick_device

KERNELS = {"causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm.ops.selective_scan_interface"}
# Largest difference from a float64 reference, relative to the reference's largest value: of the
# kernels, by dtype, and of the torch backend in float32.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
EXACT = 1e-5
BUILD = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


@dataclass(frozen=True)
class Finding:
    """One result. state: `ok`; `fault`, with the command that fixes it as `mend`; `absent` if it is
    missing but not required."""

    name: str
    state: str
    detail: str
    mend: str = ""


def examine(device: str = "auto", progress: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """All findings. device: `cuda` requires a GPU, `cpu` none, `auto` one if the machine has an
    NVIDIA driver. progress: called with the name of each computation before it is checked."""
    driver = _driver()
    wants = device.startswith("cuda") or (device == "auto" and driver is not None)
    versions = [Finding("hybridize", "ok", __version__), Finding("python", "ok", platform.python_version())]
    found = [*versions, *_packages(), *_conflicts()]
    index = int(device.partition(":")[2] or 0)
    found.append(_gpu(driver, wants, index))
    seen = torch.cuda.is_available()
    for name, module in KERNELS.items():
        found.append(_kernel_package(name, module, wants))
    if wants and seen:
        found.append(_compiler())
    on = pick_device(f"cuda:{index}" if wants and seen else "cpu")
    able = wants and seen and all(f.state == "ok" for f in found if f.name in KERNELS)
    for name, check in CHECKS.items():
        progress(name)
        found.append(_checked(name, check, on, able))
    return found


def _packages() -> list[Finding]:
    """Findings about the project's own requirements; a missing extra is `absent`, not a fault."""
    found = []
    for text in metadata.requires("hybridize") or []:
        wanted = Requirement(text)
        extra = str(wanted.marker) if wanted.marker is not None else ""
        if wanted.name in KERNELS or 'extra == "dev"' in extra:
            continue
        version = _version(wanted.name)
        if version is None:
            optional = Finding(wanted.name, "absent", "not installed; only for " + extra.replace("extra == ", "").strip('"'))
            lacking = Finding(wanted.name, "fault", "not installed", _install(wanted))
            found.append(optional if extra else lacking)
        elif not wanted.specifier.contains(version, prereleases=True):
            detail = f"{version}, but hybridize needs {wanted.specifier}"
            found.append(Finding(wanted.name, "fault", detail, _install(wanted)))
        else:
            found.append(Finding(wanted.name, "ok", f"{version}{_tried(wanted.name, version)}"))
    return found


def _tried(name: str, version: str) -> str:
    """A remark on a version outside the range that the tests have passed on, else an empty text."""
    if name not in TRIED:
        return ""
    oldest, newest = TRIED[name]
    if Version(oldest) <= Version(version) <= Version(newest):
        return ""
    return f" (tested with {oldest} to {newest})"


def _conflicts() -> list[Finding]:
    """Faults where the installed version of a package does not satisfy one of our requirements'
    own requirements."""
    direct = {Requirement(text).name for text in metadata.requires("hybridize") or []}
    names = direct | {"tokenizers", "numpy", "huggingface-hub"}
    found = []
    for name in sorted(names):
        for text in _requires(name):
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            version = _version(wanted.name)
            if version is not None and not wanted.specifier.contains(version, prereleases=True):
                detail = f"{name} needs {wanted.name}{wanted.specifier}, but {version} is installed"
                found.append(Finding(f"{name} and {wanted.name}", "fault", detail, _install(wanted)))
    return found


def _install(wanted: Requirement) -> str:
    return f"pip install '{wanted.name}{wanted.specifier}'"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _driver() -> str | None:
    """The NVIDIA driver's version, or None without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _gpu(driver: str | None, wants: bool, index: int = 0) -> Finding:
    built = torch.version.cuda
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            detail = f"cuda:{index} does not exist; the number of visible GPUs is {torch.cuda.device_count()}"
            return Finding("gpu", "fault", detail, "unset CUDA_VISIBLE_DEVICES")
        major, minor = torch.cuda.get_device_capability(index)
        name, room = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory / 2**30
        detail = f"{torch.cuda.device_count()} x {name}, {room:.0f} GiB, driver {driver}, CUDA {built}"
        if not has_code(torch.cuda.get_arch_list(), major, minor):
            return Finding(
                "gpu", "fault", f"{detail}; this torch has no code for sm_{major}{minor}", "pip install --upgrade torch"
            )
        return Finding("gpu", "ok", detail)
    if not wants:
        return Finding("gpu", "absent", "none; everything runs on the CPU")
    if driver is None:
        return Finding("gpu", "fault", "nvidia-smi finds no NVIDIA driver", "sudo apt-get install nvidia-driver-580-server")
    if built is None:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return Finding("gpu", "fault", f"driver {driver}, but torch {torch.__version__} is built without CUDA", fix)
    fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
    return Finding("gpu", "fault", f"driver {driver} is too old for torch {torch.__version__} (CUDA {built})", fix)


def has_code(built: list[str], major: int, minor: int) -> bool:
    """Whether code built for `built` (sm_90, compute_90, ...) runs on a GPU of compute capability
    `major`.`minor`: machine code (sm) runs on its own and later minor versions of the same major
    version, PTX (compute) on its own and any later version."""
    for name in built:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        if not digits.isdecimal():
            continue
        its = int(digits[:-1]), int(digits[-1])
        if its <= (major, minor) and (kind == "compute" or its[0] == major):
            return True
    return False


def _kernel_package(name: str, module: str, wants: bool) -> Finding:
    version = _version(name)
    if not wants:
        return Finding(name, "absent", f"{version or 'not installed'}; used on a GPU only")
    if version is None:
        return Finding(
            name, "fault", "not installed: mixers run on the slow torch backend", f"pip install --no-build-isolation {name}"
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension raises whatever its loader raises
        text = first_line(error)
        mismatch = "undefined symbol" in text or "cannot open shared object" in text
        why = f"was built for a torch other than {torch.__version__}" if mismatch else "cannot be imported"
        return Finding(name, "fault", f"{version} {why}: {text}", f"{BUILD} {name}=={version}")
    return Finding(name, "ok", version)


def _compiler() -> Finding:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return Finding("C compiler", "fault", "not found; Triton needs one at its first launch", "sudo apt-get install gcc")
    return Finding("C compiler", "ok", found)


def _checked(
    name: str, check: Callable[[torch.device, torch.dtype, str], float], device: torch.device, kernels: bool
) -> Finding:
    """Compares the torch backend, and with `kernels` also the kernels, with a float64 reference."""
    errors = []
    runs = [("torch", torch.float32)] + [("kernel", dtype) for dtype in CLOSE if kernels]
    for backend, dtype in runs:
        bound = EXACT if backend == "torch" else CLOSE[dtype]
        try:
            measured = check(device, dtype, backend)
        except Exception as error:
            return Finding(name, "fault", _launch(backend, error), _rebuild())
        kind = str(dtype).removeprefix("torch.")
        if not measured <= bound:
            detail = f"{backend} backend, {kind}: relative error {measured:.1e}, at most {bound:.0e} is allowed"
            return Finding(name, "fault", detail, _rebuild())
        errors.append(f"{backend} {kind} {measured:.0e}")
    return Finding(name, "ok", ", ".join(errors))


def _launch(backend: str, error: Exception) -> str:
    text = first_line(error)
    if "no kernel image" in text:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return f"{backend} backend: imports, but has no code for this GPU (sm_{major}{minor}): {text}"
    return f"{backend} backend fails: {type(error).__name__}: {text}"


def _rebuild() -> str:
    if not torch.cuda.is_available():
        return "pip install --force-reinstall torch"
    arch = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"TORCH_CUDA_ARCH_LIST={arch} MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE {BUILD} causal-conv1d mamba-ssm"


def _drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())


def _conv(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    x, weight, bias = (t.to(device, dtype) for t in _drawn((2, 40, 64), (64, 4), (64,)))
    given = [t.double().cpu() for t in (x, weight, bias)]
    padded = torch.nn.functional.pad(given[0], (0, 0, 3, 0))
    plain = given[2] + sum(padded[:, tap : tap + 40] * given[1][:, tap] for tap in range(4))
    return _relative_error(causal_conv(x, weight, bias, backend=backend), plain * torch.sigmoid(plain))


def _recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y_t = C h_t + D x_t, as [B, T, H, P], of the recurrence h_t = exp(delta A) h_{t-1} +
    delta x B^T. x [B, T, H, P]; delta and A broadcast to [B, T, H, P, N]."""
    state, out = torch.zeros(()), []
    for t in range(x.shape[1]):
        state = torch.exp(delta[:, t] * A) * state + delta[:, t] * x[:, t].unsqueeze(-1) * B[:, t].unsqueeze(-2)
        out.append((state * C[:, t].unsqueeze(-2)).sum(-1) + D * x[:, t])
    return torch.stack(out, 1)


def _mamba(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    x, dt, A, B, C, D, bias = _drawn((2, 40, 64), (2, 40, 64), (64, 16), (2, 40, 4, 16), (2, 40, 4, 16), (64,), (64,))
    x, dt, B, C = (t.to(device, dtype) for t in (x, dt, B, C))
    A, D, bias = (t.to(device, torch.float32) for t in (-A.exp(), D, bias))
    y, _ = selective_scan(x, dt, A, B, C, D, bias, backend=backend)
    x, dt, B, C, A, D, bias = (t.double().cpu() for t in (x, dt, B, C, A, D, bias))
    groups = lambda t: t.unflatten(-1, (4, 16))  # noqa: E731
    delta = groups(torch.nn.functional.softplus(dt + bias)).unsqueeze(-1)
    return _relative_error(y, _recurrence(groups(x), delta, A.unflatten(0, (4, 16)), B, C, groups(D)).flatten(2))


def _mamba2(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    x, dt, A, B, C, D, bias = _drawn((2, 40, 4, 64), (2, 40, 4), (4,), (2, 40, 4, 64), (2, 40, 4, 64), (4,), (4,))
    x, dt, B, C = (t.to(device, dtype) for t in (x, dt, B / 8, C))
    A, D, bias = (t.to(device, torch.float32) for t in (-A.exp(), D, bias))
    y, _ = ssd_scan(x, dt, A, B, C, D, bias, backend=backend)
    x, dt, B, C, A, D, bias = (t.double().cpu() for t in (x, dt, B, C, A, D, bias))
    delta = torch.nn.functional.softplus(dt + bias)[..., None, None]
    return _relative_error(y, _recurrence(x, delta, A[:, None, None], B, C, D[:, None]))


def _norm(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    y, z, weight = (t.to(device, dtype) for t in _drawn((2, 40, 64), (2, 40, 64), (64,)))
    found = gated_norm(y, z, weight, 1e-5, 16, backend=backend)
    y, z, weight = (t.double().cpu() for t in (y, z, weight))
    gated = (y * z * torch.sigmoid(z)).unflatten(-1, (4, 16))
    return _relative_error(found, (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * weight)


CHECKS = {"convolution": _conv, "mamba scan": _mamba, "mamba2 scan": _mamba2, "gated norm": _norm}
