"""Runs all variants of a model that differ in one layer in a single pass. Layers below the change,
and prefixes that texts share, are computed once.

At each layer, all variants so far go through together: the unmodified model, and one variant per
changed layer below. With N layers this takes N (N + 1) / 2 layer passes, against N (N + 1) for
separate runs. Texts form a tree in which a node is a shared prefix of its descendants: its keys,
values and states are computed once. Does not depend on tasks or scores.

Shapes: V variants, the unmodified model first; R rows of a node, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridize.compat.transformers import DynamicLayer
from hybridize.modeling import CACHE, MIXER_LAYER, new_cache

# called with the layer's index, the layer, its input [R, T, D] and the kwargs of each kind of
# layer; returns the output to use instead of the layer's
Instead = Callable[[int, Any, Tensor, dict[str, dict[str, Any]]], Tensor]
# a node must save its descendants at least this many tokens in total, about as many as a GPU
# processes in the time of the node's extra launches
SHARED = {"cpu": 32, "cuda": 4096}
PADDED = 0.06  # largest share of padding in a row; small, since variants fill batches too
AT_ONCE = {"cpu": 4096, "cuda": 65536}  # most tokens per call of a layer, unless a node is larger


@dataclass(eq=False)
class Node:
    """Token ids [R, T] that follow the single row of `parent`, which ends at position `offset`.
    Shorter rows are padded on the right.

    positions: [R, T], only for rows of packed documents. texts: index of the text that ends in each
    row.
    """

    ids: Tensor
    parent: Node | None = None
    offset: int = 0
    positions: Tensor | None = None
    texts: list[int] = field(default_factory=list)

    @property
    def path(self) -> list[Node]:
        return [self] if self.parent is None else [*self.parent.path, self]


def tree(texts: Sequence[tuple[Sequence[int], int]], rows: int, device: torch.device) -> list[Node]:
    """Returns the leaves of a tree over `texts`.

    texts: (token ids, number of last tokens that must be in the text's leaf), all different; rows:
    largest number of rows in a leaf.
    """
    ids = [tuple(text) for text, _ in texts]
    least = SHARED.get(device.type, SHARED["cpu"])
    leaves: list[Node] = []

    def finish(loose: list[int], offset: int, parent: Node | None) -> None:
        loose.sort(key=lambda text: -len(ids[text]))
        while loose:
            longest, count = len(ids[loose[0]]) - offset, 1
            while count < min(rows, len(loose)) and longest - (len(ids[loose[count]]) - offset) <= PADDED * longest:
                count += 1
            group, loose = loose[:count], loose[count:]
            made = torch.zeros(len(group), len(ids[group[0]]) - offset, dtype=torch.long)
            for row, text in enumerate(group):
                made[row, : len(ids[text]) - offset] = torch.tensor(ids[text][offset:])
            leaves.append(Node(made.to(device), parent, offset, texts=group))

    def grow(group: list[int], offset: int, parent: Node | None, loose: list[int]) -> None:
        """Adds nodes for `group`, texts sorted by ids and equal up to `offset`. Texts for which a
        node does not pay are added to `loose`."""
        first, last = ids[group[0]], ids[group[-1]]
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        end = min([same, *(len(ids[text]) - texts[text][1] for text in group)])
        if len(group) == 1 or (end < same and (len(group) - 1) * (end - offset) < least):
            loose += group
            return
        mine, saved = loose, (len(group) - 1) * (end - offset)
        if saved >= least:
            parent, mine = Node(torch.tensor([first[offset:end]], device=device), parent, offset), []
            offset = end
        if end < same:
            mine += group
        else:
            for _, part in itertools.groupby(group, key=lambda text: ids[text][end : end + 1]):
                grow(list(part), offset, parent, mine)
        if saved >= least:
            finish(mine, offset, parent)

    rest: list[int] = []
    if ids:
        grow(sorted(range(len(ids)), key=ids.__getitem__), 0, None, rest)
    finish(rest, 0, None)
    return leaves


def portions(leaves: Sequence[Node], tokens: int) -> Iterator[list[Node]]:
    """Yields groups of leaves with their ancestors, ancestors first, of at most `tokens` tokens
    each unless a single leaf has more."""
    portion: dict[Node, None] = {}
    for leaf in leaves:
        more = [node for node in leaf.path if node not in portion]
        if portion and sum(node.ids.numel() for node in [*portion, *more]) > tokens:
            yield list(portion)
            portion, more = {}, leaf.path
        portion.update(dict.fromkeys(more))
    if portion:
        yield list(portion)


def layer_passes(model: Any, layers: Sequence[int]) -> tuple[int, int]:
    """Returns the layer passes per token of one sweep, and of separate runs; most of the lower
    bound of the cost."""
    count = len(model.model.layers)
    return count + sum(count - 1 - layer for layer in layers), count * (len(layers) + 1)


@torch.no_grad()
def sweep(
    model: Any, nodes: Sequence[Node], layers: Sequence[int], instead: Instead, kinds: Sequence[str] = ()
) -> dict[Node, Tensor]:
    """Returns the hidden states [V, R, T, D] of each leaf after the last norm: of the unmodified
    model, then with each of `layers` changed, in order.

    model: a HybridForCausalLM, with or without mixers. nodes: ancestors before descendants.
    instead: replaces a layer; if nodes have parents it must act on each position separately. kinds:
    kinds of layers that `instead` runs and the model does not have.
    """
    backbone = model.model
    parents = {node.parent for node in nodes}
    hidden: dict[Node, Tensor] = {}
    inputs: dict[Node, tuple[Tensor, dict[str, dict[str, Any]]]] = {}
    for node in nodes:
        first = backbone.embed(node.ids)
        hidden[node] = first.new_empty(len(layers) + 1, *first.shape)
        hidden[node][0] = first
        inputs[node] = _layer_kwargs(backbone, node, first, kinds)
    largest = max(node.ids.numel() for node in nodes)
    device = nodes[0].ids.device.type
    together, variants = max(1, AT_ONCE.get(device, AT_ONCE["cpu"]) // largest), 1
    for index, layer in enumerate(backbone.layers):
        if index in layers:
            for node in nodes:
                positions, extra = inputs[node]
                extra = {kind: {**given, "position_ids": positions} for kind, given in extra.items()}
                hidden[node][variants] = instead(index, layer, hidden[node][0], extra)
        for begin in range(0, variants, together):
            _through(layer, index, backbone.config, hidden, inputs, slice(begin, min(begin + together, variants)), parents)
        variants += index in layers
    return {node: backbone.norm(states) for node, states in hidden.items() if node not in parents}


def _through(
    layer: Any,
    index: int,
    config: Any,
    hidden: dict[Node, Tensor],
    inputs: dict[Node, tuple[Tensor, dict[str, dict[str, Any]]]],
    which: slice,
    parents: set[Node | None],
) -> None:
    """Runs the variants `which` of all nodes through one layer, in place."""
    seen: dict[Node, Any] = {}
    for node, states in hidden.items():
        rows, cache = states[which], None
        positions, extra = inputs[node]
        if node in parents or node.parent is not None:
            cache = new_cache(config)
            if config.layer_types[index] != MIXER_LAYER:
                cache.layers[index] = DynamicLayer()  # keeps all positions: the mask implements the window
            if node.parent is not None:
                cache.layers[index] = copy.deepcopy(seen[node.parent].layers[index])
                variant = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
                cache.layers[index].reorder_cache(variant)
            if node in parents:
                seen[node] = cache
        given = {name: _repeated(value, len(rows), rows.shape[1]) for name, value in extra[config.layer_types[index]].items()}
        out = layer(
            rows.flatten(0, 1), position_ids=_repeated(positions, len(rows), rows.shape[1]),
            use_cache=cache is not None, **{CACHE: cache}, **given,
        )  # fmt: skip
        states[which] = out.unflatten(0, rows.shape[:2])


def _repeated(value: Any, times: int, rows: int) -> Any:
    """Repeats a kwarg with one entry per row for each variant; others are returned as they are."""
    if isinstance(value, tuple):
        return tuple(_repeated(part, times, rows) for part in value)
    each = isinstance(value, Tensor) and value.shape[0] == rows  # otherwise one entry that broadcasts over rows
    return value.repeat(times, *[1] * (value.ndim - 1)) if each else value


def _layer_kwargs(backbone: Any, node: Node, hidden: Tensor, kinds: Sequence[str]) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Returns the positions, and the kwargs of each kind of layer."""
    if node.positions is not None:
        return node.positions, backbone.layer_inputs(hidden, None, node.positions, kinds=kinds)
    length, before = node.ids.shape[1], node.offset
    positions = torch.arange(before, before + length, device=hidden.device).unsqueeze(0)
    window, masks = getattr(backbone.config, "sliding_window", None), dict[str, Tensor | None]()
    past = positions[0].unsqueeze(1) - torch.arange(before + length, device=hidden.device)
    for kind in {*backbone.config.layer_types, *kinds} - {MIXER_LAYER}:
        mask = past >= 0
        if kind == "sliding_attention" and window is not None:
            mask = mask & (past < window)
        if backbone.config._attn_implementation == "eager":  # it needs an additive mask, and without one it is not causal
            lowest = torch.finfo(hidden.dtype).min
            masks[kind] = hidden.new_zeros(mask.shape).masked_fill(~mask, lowest).view(1, 1, length, -1)
            continue
        masks[kind] = None if before == 0 and mask.equal(past >= 0) else mask.view(1, 1, length, -1)
    return positions, backbone.layer_inputs(hidden, masks or {MIXER_LAYER: None}, positions, packed=False, kinds=kinds)
