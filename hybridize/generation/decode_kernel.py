"""The Triton kernel behind `decode_attention`: flash decoding, with the keys and values of a
sequence split over several programs.

Its time is bound by the bandwidth for keys and values, each read once (2 B K n d elements for n
filled slots). The split sizes follow `counts` on the device, so that one captured launch serves
every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4  # at least, per multiprocessor
MOST_SPLITS = 64


@triton.jit
def _partial(  # type: ignore[no-untyped-def]
    q, k, v, counts, out, lse, scale, cap,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
    heads, group, width, slots, splits,
    CAPPED: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    count = tl.minimum(tl.load(counts + row).to(tl.int32), slots)
    share = tl.cdiv(tl.cdiv(count, splits), N) * N
    begin = split * share
    end = tl.minimum(begin + share, count)
    g, d, n = tl.arange(0, G), tl.arange(0, W), tl.arange(0, N)
    rows = head * group + g
    inside, whole = g < group, d < width
    queries = tl.load(q + row * q_b + rows[:, None] * q_h + d[None, :], mask=inside[:, None] & whole[None, :], other=0.0)
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    peak = tl.full((G,), -float("inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    sums = tl.zeros((G, W), tl.float32)
    for start in range(begin, end, N):
        at = start + n
        valid = at < end
        keys = tl.load(k + at[None, :].to(tl.int64) * k_s + d[:, None], mask=valid[None, :] & whole[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        rescale = tl.exp(peak - new_peak)
        total = total * rescale + tl.sum(weights, 1)
        values = tl.load(v + at[:, None].to(tl.int64) * v_s + d[None, :], mask=valid[:, None] & whole[None, :], other=0.0)
        sums = sums * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        peak = new_peak
    nonempty = total > 0  # false for a split beyond the count
    total = tl.where(nonempty, total, 1.0)
    place = (row * splits + split) * heads * group + rows
    tl.store(out + place[:, None] * width + d[None, :], sums / total[:, None], mask=inside[:, None] & whole[None, :])
    tl.store(lse + place, tl.where(nonempty, peak + tl.log(total), -float("inf")), mask=inside)


@triton.jit
def _combined(parts, lse, out, all_heads, width, splits, SPLITS: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, W)
    valid, whole = s < splits, d < width
    place = (row * splits + s) * all_heads + head
    logs = tl.load(lse + place, mask=valid, other=-float("inf"))
    weights = tl.exp(logs - tl.max(logs, 0))
    found = tl.load(parts + place[:, None] * width + d[None, :], mask=valid[:, None] & whole[None, :], other=0.0)
    total = tl.sum(found * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (row * all_heads + head) * width + d, total.to(out.dtype.element_ty), mask=whole)


def attend(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, scale: float, cap: float | None) -> Tensor:
    """Computes `decode_attention`; the last dimension of query, keys and values must be contiguous."""
    batch, all_heads, width = query.shape
    heads, slots = keys.shape[1], keys.shape[2]
    group, block = all_heads // heads, triton.next_power_of_2(width)
    size = 64 if block <= 128 else 32
    card = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
    processors = 2 if card is None else card.multi_processor_count
    tiles = 2 * size * block * values.element_size()  # bytes of keys and values per stage in shared memory
    stages = 1 if card is None else max(1, min(3, (getattr(card, "shared_memory_per_block_optin", 99 << 10) - 16384) // tiles))
    splits = min(-(-PROGRAMS * processors // (batch * heads)), -(-slots // (2 * size)), MOST_SPLITS)
    out = torch.empty(batch, all_heads, width, dtype=values.dtype, device=query.device)
    parts = out if splits == 1 else torch.empty(batch, splits, all_heads, width, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, splits, all_heads, dtype=torch.float32, device=query.device)
    exact = "ieee" if values.dtype == torch.float32 else "tf32"
    _partial[(batch * heads, splits)](
        query.to(keys.dtype), keys, values, counts, parts, lse, scale, 0.0 if cap is None else cap,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1),
        values.stride(2), heads, group, width, slots, splits,
        CAPPED=cap is not None, G=max(16, triton.next_power_of_2(group)), N=size, W=max(16, block), PRECISION=exact,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _combined[(batch, all_heads)](
            parts, lse, out, all_heads, width, splits, SPLITS=triton.next_power_of_2(splits), W=max(16, block), num_warps=4
        )
    return out
