"""Closed-form estimates of a new mixer's free parameters, from what the attention layer does on a
few thousand tokens.

Each is fitted on one layer's inputs and outputs; the teacher's q, k and v rows are never changed.
`surgery/mixers/` says which kind of mixer uses which. Shapes: W windows, T tokens, D hidden size, I
inner width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridize.modeling import Mixer
from hybridize.surgery.observe import LayerObservation

GATE = 2.0  # initial z of every token: silu(2) = 1.76, a gate that is clearly open
TAP = 0.1  # the convolution's last tap, small so that SiLU is nearly linear and q, k and v keep their signs
STEP = 0.1  # initial delta
NEARER = 10.0  # a state forgets this many times faster than the attention distance implies: docs/concepts/method.md
DRIFT_SHARE = 1.0  # share of the drift that out_proj is fitted to undo
RIDGE_Z, RIDGE_OUT = 1e-3, 1e-2  # relative to the mean diagonal of the Gram matrix


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Returns W [out, in] that minimises |inputs W^T - targets|^2 + strength * mean diagonal of the
    Gram matrix * |W|^2.

    inputs [W, T, in], targets [W, T, out]; solved in float64.
    """
    wide = (inputs.shape[-1], inputs.shape[-1]), (inputs.shape[-1], targets.shape[-1])
    gram, cross = (torch.zeros(shape, dtype=torch.float64, device=inputs.device) for shape in wide)
    for window, wanted in zip(inputs, targets, strict=True):  # window by window: a float64 copy of all would dominate memory
        x = window.double()
        gram += x.t() @ x
        cross += x.t() @ wanted.double()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve(gram, cross).t().to(inputs.dtype)


def features(mixer: Mixer, inputs: Tensor) -> Tensor:
    """Returns the input of out_proj [W, T, I] for the mixer's inputs [W, T, D]."""
    return _captured(mixer, mixer.out_proj, inputs)  # type: ignore[arg-type]


def _captured(mixer: nn.Module, part: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the first argument of `part`, a module of the mixer, for all windows."""
    captured: list[Tensor] = []
    handle = part.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    for window in inputs:
        mixer(window.unsqueeze(0))
    handle.remove()
    return torch.cat(captured)


def open_gate(rows: Tensor, inputs: Tensor) -> None:
    """Sets in_proj's rows of z [I, D] in place, so that z is near GATE on every token (ridge
    regression of a constant)."""
    rows.copy_(ridge(inputs, torch.full_like(inputs[..., :1], GATE), RIDGE_Z).expand_as(rows))


def pass_through(conv: Any) -> None:
    """Sets the convolution to pass the newest token times TAP and nothing else."""
    conv.weight.zero_()
    conv.weight[:, :, -1] = TAP
    conv.bias.zero_()


def decays(distance: Tensor) -> Tensor:
    """Returns the decay per step of each head [H], in nats and at most 1, for attention distances
    [H] in tokens."""
    return (NEARER / distance.clamp(min=1.0)).clamp(max=1.0)


def channel_ratio(mixer: Mixer, observed: LayerObservation) -> Tensor:
    """Returns [I], the factor that gives each channel before out_proj the RMS of the attention
    heads' output."""
    made, wanted = features(mixer, observed.inputs), observed.heads
    return (wanted.square().mean((0, 1)) / made.square().mean((0, 1)).clamp(min=1e-20)).sqrt()


def fit_output(out_proj: nn.Linear, made: Tensor, observed: LayerObservation, o_proj: Tensor) -> None:
    """Fits out_proj in place by ridge regression of the attention's output, less the drift of the
    mixers below, on its input `made` [W, T, I].

    First finds the best multiple of the current weight, then regresses the residual. o_proj [D, I]:
    the attention's weight.
    """
    wanted = observed.heads @ o_proj.to(made.device, torch.float32).t() - DRIFT_SHARE * observed.drift
    start = made @ out_proj.weight.t()
    out_proj.weight *= (start * wanted).sum() / start.square().sum()
    rest = wanted - made @ out_proj.weight.t()
    out_proj.weight += ridge(made, rest, RIDGE_OUT)


def set_skip(mixer: Any, probe: nn.Module, seen: LayerObservation) -> None:
    """Sets D of each head to the ratio of the coefficients of x and of the state in the
    least-squares fit of the attention head's output by both, if it is positive.

    probe: the module of the mixer whose input is the state's output plus D x.
    """
    heads = len(seen.distance)
    mixer.D.zero_()
    state = _captured(mixer, probe, seen.inputs)
    mixer.D.fill_(1.0)
    x = _captured(mixer, probe, seen.inputs) - state
    split = lambda t: t.unflatten(-1, (heads, -1))  # noqa: E731
    s, x, y = split(state), split(x), split(seen.heads)
    dot = lambda a, b: (a.double() * b.double()).sum((0, 1, 3))  # noqa: E731
    ss, sx, xx, sy, xy = dot(s, s), dot(s, x), dot(x, x), dot(s, y), dot(x, y)
    determinant = (ss * xx - sx * sx).clamp(min=1e-30)
    of_state, of_x = (sy * xx - xy * sx) / determinant, (xy * ss - sy * sx) / determinant
    share = torch.where(of_state > 0, of_x / of_state.clamp(min=1e-30), torch.ones_like(of_x))
    limit = 10 * (ss / xx.clamp(min=1e-30)).sqrt()  # so that x does not outweigh the state
    share = torch.minimum(share.clamp(min=0), limit)
    mixer.D.copy_(share.float().repeat_interleave(len(mixer.D) // heads))
