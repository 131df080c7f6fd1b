"""Calibrated initialisation: a new mixer's free parameters, set from what the attention layer does on a few thousand tokens.

Every part is a closed form on one layer's inputs and outputs; the teacher's q, k and v rows are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.modeling import MIXERS, HybridConfig, Mixer, inverse_softplus
from hybridize.surgery.observe import Seen

PARTS = ("z", "conv", "decay", "scale", "out")
GATE = 2.0  # what z is on every token at the start: silu(2) = 1.76, well on the open side
TAP = 0.1  # the convolution's last tap: small enough for SiLU to be nearly linear, so that q k and v keep their signs
STEP = 0.1  # delta at the start
NEARER = 10.0  # a state forgets this many times faster than the attention looks back: see docs/method.md
MEND = 1.0  # the share of the drift that out_proj is asked to take back
RIDGE_Z, RIDGE_OUT = 1e-3, 1e-2  # of the mean diagonal


@torch.no_grad()
def calibrate(config: HybridConfig, layer: int, plain: Mapping[str, Tensor], seen: Seen, parts: frozenset[str]) -> Mixer:
    """The mixer that starts from the parameters `plain`, float32, on the device of `seen`. config: the result's.

    z: rows by ridge regression of a constant on the layer's input. conv: identity times TAP, no bias. decay: step sizes and
    decays by each head's attention distance, and the skip D by regression. scale: norm weight (mamba2) or out_proj columns
    (mamba) so that channels have the RMS of the teacher's heads. out: out_proj by ridge regression of the attention's
    output, less the drift from the mixers below.
    """
    device = seen.inputs.device
    mixer: Any = MIXERS[config.mixer["kind"]](config, layer)  # type: ignore[index]
    mixer.load_state_dict({name: value.float() for name, value in plain.items()})
    mixer = mixer.to(device).float().eval()
    heads = len(seen.distance)
    inner = seen.heads.shape[-1]
    if "z" in parts:
        mixer.in_proj.weight[:inner] = ridge(seen.inputs, torch.full_like(seen.inputs[..., :1], GATE), RIDGE_Z)
    if "conv" in parts:
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, :, -1] = TAP
        mixer.conv1d.bias.zero_()
    if "decay" in parts:
        forget = (NEARER / seen.distance.clamp(min=1.0)).clamp(max=1.0)  # [H], a step
        if config.mixer["kind"] == "mamba2":  # type: ignore[index]
            mixer.in_proj.weight[-heads:] = 0
            mixer.dt_bias.fill_(float(inverse_softplus(torch.tensor(STEP))))
            mixer.A_log.copy_((forget / STEP).log())
        else:
            mixer.dt_proj.weight.zero_()
            mixer.dt_bias.copy_(inverse_softplus(forget.clamp(max=STEP)).repeat_interleave(inner // heads))
            mixer.A_log.zero_()
            mixer.A_log += (forget / forget.clamp(max=STEP)).log().repeat_interleave(inner // heads).unsqueeze(1)
        _set_skip(mixer, seen, heads)
    if "scale" in parts:
        made, wanted = _features(mixer, seen.inputs), seen.heads
        ratio = (wanted.square().mean((0, 1)) / made.square().mean((0, 1)).clamp(min=1e-20)).sqrt()
        if hasattr(mixer, "norm"):
            mixer.norm.weight *= ratio
        else:
            mixer.out_proj.weight *= ratio
    if "out" in parts:
        made = _features(mixer, seen.inputs)
        wanted = seen.heads @ plain["out_proj.weight"].to(device, torch.float32).t() - MEND * seen.drift
        start = made @ mixer.out_proj.weight.t()
        mixer.out_proj.weight *= (start * wanted).sum() / start.square().sum()
        rest = wanted - made @ mixer.out_proj.weight.t()
        mixer.out_proj.weight += ridge(made, rest, RIDGE_OUT)
    return mixer


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """W [out, in] that minimises |inputs W^T - targets|^2 + strength * mean diagonal of the Gram matrix * |W|^2.

    inputs [W, T, in], targets [W, T, out]; solved in float64.
    """
    wide = (inputs.shape[-1], inputs.shape[-1]), (inputs.shape[-1], targets.shape[-1])
    gram, cross = (torch.zeros(shape, dtype=torch.float64, device=inputs.device) for shape in wide)
    for window, wanted in zip(inputs, targets, strict=True):  # a float64 copy of them all would be the largest thing here
        x = window.double()
        gram += x.t() @ x
        cross += x.t() @ wanted.double()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(gram, cross).t().to(inputs.dtype)


def _features(mixer: Mixer, inputs: Tensor) -> Tensor:
    """What goes into out_proj, [W, T, I]."""
    return _listen(mixer, mixer.out_proj, inputs)  # type: ignore[arg-type]


def _listen(mixer: nn.Module, part: nn.Module, inputs: Tensor) -> Tensor:
    """The first argument that `part` of the mixer gets, window by window."""
    heard: list[Tensor] = []
    handle = part.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    for window in inputs:
        mixer(window.unsqueeze(0))
    handle.remove()
    return torch.cat(heard)


def _set_skip(mixer: Any, seen: Seen, heads: int) -> None:
    """D of each head: the share of x itself in the least-squares fit of the head's output by state and x, if positive."""
    probe = mixer.norm if hasattr(mixer, "norm") else mixer.out_proj
    mixer.D.zero_()
    state = _listen(mixer, probe, seen.inputs)
    mixer.D.fill_(1.0)
    x = _listen(mixer, probe, seen.inputs) - state
    split = lambda t: t.unflatten(-1, (heads, -1))  # noqa: E731
    s, x, y = split(state), split(x), split(seen.heads)
    dot = lambda a, b: (a.double() * b.double()).sum((0, 1, 3))  # noqa: E731
    ss, sx, xx, sy, xy = dot(s, s), dot(s, x), dot(x, x), dot(s, y), dot(x, y)
    determinant = (ss * xx - sx * sx).clamp(min=1e-30)
    of_state, of_x = (sy * xx - xy * sx) / determinant, (xy * ss - sy * sx) / determinant
    share = torch.where(of_state > 0, of_x / of_state.clamp(min=1e-30), torch.ones_like(of_x))
    limit = 10 * (ss / xx.clamp(min=1e-30)).sqrt()  # x never drowns the state
    share = torch.minimum(share.clamp(min=0), limit)
    mixer.D.copy_(share.float().repeat_interleave(len(mixer.D) // heads))
