"""The sweep over all ablations: against a model that really lacks the layer, run on each text by
itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.modeling import HybridForCausalLM, mixer
from hybridize.scoring import sweep as under_test
from hybridize.scoring.loo import ABLATIONS, answers
from hybridize.scoring.scorer import attention_layers
from hybridize.scoring.sweep import Node, portions, sweep, tree
from tests.conftest import hybrid, worst
from tests.test_scoring import silence

CPU = torch.device("cpu")


def alone(model: HybridForCausalLM, read: list[int], wanted: list[int]) -> tuple[float, bool]:
    """float64 answer from one plain forward pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([read]), use_cache=False).logits[0, -len(wanted) :]
    logs = logits.double().log_softmax(-1)
    target = torch.tensor(wanted)
    return float(logs.gather(1, target.unsqueeze(1)).sum()), bool((logs.argmax(-1) == target).all())


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Two subjects with a long common beginning each, questions, choices of one and of several
    tokens; one text alone."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(2, 64, (count,), generator=g).tolist()  # noqa: E731
    made = []
    for _ in range(2):
        shots = draw(20)
        for _ in range(3):
            context = shots + draw(int(torch.randint(3, 9, (1,), generator=g)))
            made += [(context, [letter]) for letter in (5, 6, 7)]
            for choice in (draw(1), draw(3), draw(4)):
                made.append(((context + choice)[:-1], choice))
    return [*made, (draw(7), draw(2))]


@pytest.mark.parametrize("what", ["block", "mixer"])
@pytest.mark.parametrize("layout", ["aaaa", "amaa"])
@pytest.mark.parametrize(("shared", "at_once", "room"), [(4, 4096, 10**6), (1, 8, 10**6), (1000, 64, 30)])
def test_every_answer_is_that_of_a_model_without_the_layer(
    kind: str, layout: str, what: str, shared: int, at_once: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(under_test.SHARED, "cpu", shared)
    monkeypatch.setattr(under_test, "PADDED", 1.0)  # leaves of several rows
    monkeypatch.setitem(under_test.AT_ONCE, "cpu", at_once)
    monkeypatch.setattr("hybridize.scoring.loo._room", lambda *_: room)
    model, asked, told = hybrid(layout, kind, seed=3), requests(), []
    found = answers(model, asked, what, 4, lambda *done: told.append(done))
    layers = attention_layers(model)
    assert told[-1] == (len({tuple(read) for read, _ in asked}),) * 2
    for variant, table in zip([model, *(silence(model, layer, what) for layer in layers)], found, strict=True):
        for (read, wanted), (value, greedy) in zip(asked, table, strict=True):
            expected, likely = alone(variant, read, wanted)
            assert value == pytest.approx(expected, abs=1e-4)
            assert greedy == likely


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])[:rows]
    ids = torch.randint(2, 64, (rows, 12), generator=torch.Generator().manual_seed(1))
    model = hybrid("ama", "mamba2", seed=2)
    real = mixer.causal_conv

    def checked(x: torch.Tensor, *rest: Any, seq_idx: torch.Tensor) -> torch.Tensor:
        assert seq_idx.shape == x.shape[:2]  # what the CUDA kernels ask for, while the torch backend broadcasts
        return real(x, *rest, seq_idx=seq_idx)

    monkeypatch.setattr(mixer, "causal_conv", checked)
    states = sweep(model, [node := Node(ids, positions=positions)], [0, 2], ABLATIONS["block"])[node]
    for got, variant in zip(states, [model, silence(model, 0, "block"), silence(model, 2, "block")], strict=True):
        assert worst(got, variant.model(ids, position_ids=positions, use_cache=False).last_hidden_state) <= 1e-5


def test_a_window_holds_across_what_texts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(under_test.SHARED, "cpu", 4)
    model = hybrid(
        "aa", seed=4, sliding_window=6, layer_types=["sliding_attention", "full_attention"], base_model_type="mistral"
    )
    asked = requests(1)
    for (read, wanted), (value, _) in zip(asked, answers(model, asked, "mixer", 4)[0], strict=True):
        assert value == pytest.approx(alone(model, read, wanted)[0], abs=1e-4)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=14).map(tuple), min_size=1, max_size=12, unique=True),
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 30), st.data(),
)  # fmt: skip
def test_a_tree_holds_every_text_once_and_its_end_in_the_leaf(
    texts: list[tuple[int, ...]], rows: int, shared: int, tokens: int, data: st.DataObject
) -> None:
    needed = [data.draw(st.integers(1, len(text) - 1)) for text in texts]
    before, under_test.SHARED["cpu"] = under_test.SHARED["cpu"], shared
    try:
        leaves = tree(list(zip(texts, needed, strict=True)), rows, CPU)
    finally:
        under_test.SHARED["cpu"] = before
    assert sorted(text for leaf in leaves for text in leaf.texts) == list(range(len(texts)))
    for leaf in leaves:
        before_it = [token for node in leaf.path[:-1] for token in node.ids[0].tolist()]
        assert len(before_it) == leaf.offset
        assert len(leaf.ids) <= rows
        for row, text in zip(leaf.ids.tolist(), leaf.texts, strict=True):
            own = texts[text][leaf.offset :]
            assert (*before_it, *row[: len(own)]) == texts[text]
            assert len(own) >= needed[text]
    made = list(portions(leaves, tokens))
    assert [node for portion in made for node in portion if node.texts] == leaves
    for portion in made:
        assert all(node.parent is None or node.parent in portion[: portion.index(node)] for node in portion)
        (first,) = [node.path for node in portion if node.texts][:1]
        assert sum(n.ids.numel() for n in portion) <= max(tokens, sum(n.ids.numel() for n in first))
