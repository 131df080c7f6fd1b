"""All variants of a model with one layer changed, in one pass: what lies below it, and what texts
share, is computed once.

Layer by layer, every variant that there is so far goes through the same layer side by side: the
untouched model, and one more for each layer that something else has stood in for. Of N layers that
makes N (N + 1) / 2 layer passes, where N + 1 runs take N (N + 1). Texts form a tree in which a node
is what all its descendants begin with: its keys, values and states are computed once. Knows nothing
of tasks or scores.

Shapes: V variants, the untouched model first; R rows of a node, T tokens, D hidden size.
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

# layer number, the layer, what it hears [R, T, D], and what each kind of layer is told -> what
# comes out in its place
Instead = Callable[[int, Any, Tensor, dict[str, dict[str, Any]]], Tensor]
# tokens that a node must spare its descendants, all of them together: a GPU reads these many while
# it waits for one more launch
SHARED = {"cpu": 32, "cuda": 4096}
PADDED = 0.06  # share of a row that may be padding: variants fill a batch as well as rows do
AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens that go through a layer in one call, if a node is no larger


@dataclass(eq=False)
class Node:
    """ids [R, T] go on after the one row of `parent`, which ends at position `offset`; shorter rows
    are filled up on the right.

    positions [R, T] only for rows of packed documents. texts: which text each row ends.
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
    """The leaves of a tree over `texts`, each its token ids and how many of its last tokens must
    lie in its leaf.

    rows: at most so many in a leaf. No text may stand there twice.
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
        """group: texts in order of their ids, the same up to `offset`; those that no node is worth
        while for go to `loose`."""
        first, last = ids[group[0]], ids[group[-1]]
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        end = min([same, *(len(ids[text]) - texts[text][1] for text in group)])
        if len(group) == 1 or (end < same and (len(group) - 1) * (end - offset) < least):
            loose += group
            return
        mine, spared = loose, (len(group) - 1) * (end - offset)
        if spared >= least:
            parent, mine = Node(torch.tensor([first[offset:end]], device=device), parent, offset), []
            offset = end
        if end < same:
            mine += group
        else:
            for _, part in itertools.groupby(group, key=lambda text: ids[text][end : end + 1]):
                grow(list(part), offset, parent, mine)
        if spared >= least:
            finish(mine, offset, parent)

    rest: list[int] = []
    if ids:
        grow(sorted(range(len(ids)), key=ids.__getitem__), 0, None, rest)
    finish(rest, 0, None)
    return leaves


def portions(leaves: Sequence[Node], tokens: int) -> Iterator[list[Node]]:
    """Leaves with their ancestors, ancestors first, of at most `tokens` tokens together where one
    leaf alone is no more."""
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
    """How many layers a token goes through in one sweep, and in as many separate runs; the larger
    part of the floor."""
    count = len(model.model.layers)
    return count + sum(count - 1 - layer for layer in layers), count * (len(layers) + 1)


@torch.no_grad()
def sweep(
    model: Any, nodes: Sequence[Node], layers: Sequence[int], instead: Instead, kinds: Sequence[str] = ()
) -> dict[Node, Tensor]:
    """The hidden states [V, R, T, D] after the last norm of each leaf: untouched, then with each of
    `layers` changed, in order.

    model: a HybridForCausalLM, with or without mixers. nodes: ancestors before descendants.
    instead: what is done in place of a layer; where nodes have parents it must not look at other
    positions. kinds: of layers that `instead` runs and the model lacks.
    """
    backbone = model.model
    parents = {node.parent for node in nodes}
    hidden: dict[Node, Tensor] = {}
    told: dict[Node, tuple[Tensor, dict[str, dict[str, Any]]]] = {}
    for node in nodes:
        first = backbone.embed(node.ids)
        hidden[node] = first.new_empty(len(layers) + 1, *first.shape)
        hidden[node][0] = first
        told[node] = _told(backbone, node, first, kinds)
    largest = max(node.ids.numel() for node in nodes)
    device = nodes[0].ids.device.type
    together, variants = max(1, AT_ONCE.get(device, AT_ONCE["cpu"]) // largest), 1
    for index, layer in enumerate(backbone.layers):
        if index in layers:
            for node in nodes:
                positions, extra = told[node]
                extra = {kind: {**given, "position_ids": positions} for kind, given in extra.items()}
                hidden[node][variants] = instead(index, layer, hidden[node][0], extra)
        for begin in range(0, variants, together):
            _through(layer, index, backbone.config, hidden, told, slice(begin, min(begin + together, variants)), parents)
        variants += index in layers
    return {node: backbone.norm(states) for node, states in hidden.items() if node not in parents}


def _through(
    layer: Any,
    index: int,
    config: Any,
    hidden: dict[Node, Tensor],
    told: dict[Node, tuple[Tensor, dict[str, dict[str, Any]]]],
    which: slice,
    parents: set[Node | None],
) -> None:
    """Takes some variants of all nodes through one layer, in place."""
    seen: dict[Node, Any] = {}
    for node, states in hidden.items():
        rows, cache = states[which], None
        positions, extra = told[node]
        if node in parents or node.parent is not None:
            cache = new_cache(config)
            if config.layer_types[index] != MIXER_LAYER:
                cache.layers[index] = DynamicLayer()  # a window is the mask's affair: nothing is dropped
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
    """What is told of each of several rows, once more for each variant."""
    if isinstance(value, tuple):
        return tuple(_repeated(part, times, rows) for part in value)
    each = isinstance(value, Tensor) and value.shape[0] == rows  # else one for all rows, which broadcasts
    return value.repeat(times, *[1] * (value.ndim - 1)) if each else value


def _told(backbone: Any, node: Node, hidden: Tensor, kinds: Sequence[str]) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Positions, and what each kind of layer is told beside the hidden states."""
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
        if backbone.config._attn_implementation == "eager":  # which adds whatever it is given, and attends to all without
            lowest = torch.finfo(hidden.dtype).min
            masks[kind] = hidden.new_zeros(mask.shape).masked_fill(~mask, lowest).view(1, 1, length, -1)
            continue
        masks[kind] = None if before == 0 and mask.equal(past >= 0) else mask.view(1, 1, length, -1)
    return positions, backbone.layer_inputs(hidden, masks or {MIXER_LAYER: None}, positions, packed=False, kinds=kinds)
