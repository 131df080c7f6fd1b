"""A/B of the torch scan against a per-step loop under autograd: `python tests/benchmarks/scan.py`.

Both sides compute the same forward and backward at SmolLM2-135M's shape (I 576, N 16, L 512, batch
1, float32) in one run, interleaved. The loop computes its exponentials inside the step, as a plain
implementation would. The floor: the state is L x I x N = 4.7 M elements; forward and backward need
each at least one exp and about ten multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from hybridize.modeling import scan


def loop(x, dt, A, B, C, D, dt_bias):
    delta = F.softplus(dt + dt_bias)
    width = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(width, 2), C.repeat_interleave(width, 2)
    h = x.new_zeros(x.shape[0], *A.shape)
    ys = []
    # unbind, not x[:, t]: the gradient of an index would fill a whole [B, L, I] tensor at every
    # step
    for delta_t, x_t, B_t, C_t in zip(*(t.unbind(1) for t in (delta, x, B, C)), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * x_t)[..., None] * B_t
        ys.append((h * C_t).sum(-1))
    return torch.stack(ys, 1) + D * x


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inner", type=int, default=576)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = (args.batch, args.length, args.inner)
    inputs = [torch.randn(shape), torch.randn(shape) - 4, -torch.arange(1.0, args.state + 1).repeat(args.inner, 1)]
    inputs += [torch.randn(*shape[:2], args.inner // args.state, args.state) for _ in "BC"]
    inputs += [torch.ones(args.inner), torch.zeros(args.inner)]
    leaves = [t.requires_grad_() for t in inputs]
    sides = {"loop": loop, "torch engine": lambda *a: scan.selective_scan(*a, backend="torch")[0]}
    times: dict[str, list[float]] = {name: [] for name in sides}
    weight = torch.randn(shape)
    for _ in range(args.repeats + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            torch.autograd.grad((side(*leaves) * weight).sum(), leaves)
            times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(series[1:]) for name, series in times.items()}
    ratio = medians["loop"] / medians["torch engine"]
    print(json.dumps({"threads": torch.get_num_threads(), "ms": medians, "times faster": round(ratio, 2)}))


if __name__ == "__main__":
    main()
