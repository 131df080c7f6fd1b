"""Rows, loss masks and packing."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.data.corpus import open_corpus
from hybridize.data.encode import Document, Encoder
from hybridize.data.packing import batched, epoch_order, mixed, pack_documents, pack_stream
from hybridize.data.rows import Rows, find_data, read_mixture, read_rows
from hybridize.errors import InputError
from tests.conftest import make_tokenizer

CHAT = [
    {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"}, {"role": "assistant", "content": "22"},
]  # fmt: skip


def kept_text(encoder: Encoder, row: dict) -> str:
    document = encoder.encode(row, "row")
    return encoder.tokenizer.decode([t for t, keep in zip(document.ids, document.loss_mask, strict=True) if keep])


def test_rows_are_tokenised_once_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = make_tokenizer(), []
    real = Encoder.read

    def counted(self: Encoder, row: dict, where: str) -> Document:
        calls.append(row)
        return real(self, row, where)

    monkeypatch.setattr(Encoder, "read", counted)
    monkeypatch.setattr("hybridize.data.encode.REMEMBERED", 20)
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, "assistant")
    rows = [{"prompt": "ab", "response": "cde"}, {"text": "a much longer text than there is room for"}, {"text": "ab"}]
    first = [encoder.encode(row, f"file:{n}") for n, row in enumerate(rows)]
    count = len(calls)
    again = [encoder.encode(row, f"file:{n}") for n, row in enumerate(rows)]
    assert again == first
    assert calls[count:] == [{"text": "a much longer text than there is room for"}]


def test_the_mask_keeps_what_the_assistant_says_and_its_end() -> None:
    encoder = Encoder(make_tokenizer(), "assistant")
    assert kept_text(encoder, {"messages": CHAT}) == "1<|end|>22<|end|>"
    assert kept_text(encoder, {"prompt": "one?", "response": "1"}) == "1<|end|>"
    assert kept_text(encoder, {"text": "all"}) == "all<|end|>"
    everything = kept_text(Encoder(make_tokenizer(), "none"), {"messages": CHAT[:2]})
    assert everything == "<|user|>one?<|end|><|assistant|>1<|end|>"


def test_a_template_that_drops_earlier_thoughts() -> None:
    """As Qwen3's: thoughts stay in the last turn only, so a rendered prefix is no prefix of the
    whole."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('#')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "content": "hm#1"}, CHAT[2], {"role": "assistant", "content": "hm#22"}]
    encoder = Encoder(make_tokenizer(), "assistant", template)
    document = encoder.encode({"messages": messages}, "row")
    learnt = [encoder.tokenizer.decode([t for t, k in zip(p.ids, p.loss_mask, strict=True) if k]) for p in document.parts()]
    assert learnt == ["hm#1<|end|>", "hm#22<|end|>"]
    assert encoder.tokenizer.decode(document.parts()[1].ids) == (
        "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>hm#22<|end|>"
    )


def test_without_a_template_a_chat_is_refused_and_a_pair_is_joined() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, "assistant")
    assert kept_text(encoder, {"prompt": "a", "response": "b"}) == "b<|end|>"
    with pytest.raises(InputError, match="x:1 is a chat, but the tokenizer has no chat template"):
        encoder.encode({"messages": CHAT}, "x:1")


def test_a_row_that_keeps_nothing_is_an_error() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="x:3: no token of this row has a loss"):
        Encoder(make_tokenizer(), "assistant", template).encode({"messages": CHAT[:2]}, "x:3")


documents = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=40).map(lambda keep: Document(list(range(1, len(keep) + 1)), keep)),
    min_size=1, max_size=60,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(docs=documents, length=st.integers(2, 30))
def test_packing_keeps_every_prediction_once_and_apart(docs: list[Document], length: int) -> None:
    """Each kept next-token prediction inside a piece appears once, with its own position; nothing
    else is kept."""
    numbered = [Document([1000 * n + i for i in d.ids], d.loss_mask) for n, d in enumerate(docs)]
    want = sorted(
        (d.ids[i], d.ids[i + 1], i % length)
        for d in numbered
        for i in range(len(d.ids) - 1)
        if d.loss_mask[i + 1] and (i + 1) % length
    )
    got = []
    for ids, positions, labels, keep in pack_documents(numbered, length, pad=0):
        assert len(ids) == len(positions) == len(labels) == len(keep) == length
        got += [(i, n, p) for i, p, n, k in zip(ids, positions, labels, keep, strict=True) if k]
        for t in range(1, length):
            same = ids[t] and ids[t - 1] and ids[t] // 1000 == ids[t - 1] // 1000 and ids[t] == ids[t - 1] + 1
            assert (positions[t] == positions[t - 1] + 1) == bool(same) or not ids[t]
    assert sorted(got) == want


@settings(max_examples=40, deadline=None)
@given(docs=documents, length=st.integers(2, 30))
def test_a_stream_is_the_joined_text(docs: list[Document], length: int) -> None:
    joined = [token for d in docs for token in d.ids]
    flags = [keep for d in docs for keep in d.loss_mask]
    lines = list(pack_stream(docs, length))
    assert len(lines) == (len(joined) - 1) // length
    for n, (ids, positions, labels, keep) in enumerate(lines):
        begin = n * length
        assert ids == joined[begin : begin + length]
        assert labels == joined[begin + 1 : begin + length + 1]
        assert keep == flags[begin + 1 : begin + length + 1]
        assert positions is None


def test_epochs_are_permutations_of_the_seed() -> None:
    assert sorted(epoch_order(50, 1, 0)) == list(range(50))
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_batches_split_into_micro_batches() -> None:
    lines = list(pack_stream([Document(list(range(50)), [True] * 50)], 7))
    (batch,) = batched(lines[:6], 6)
    parts = batch.split(4)
    assert [len(p.ids) for p in parts] == [4, 2]
    assert sum(p.kept for p in parts) == batch.kept == 42
    assert [b.ids.shape[0] for b in batched(lines, 4, last=True)] == [4, 3]


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_sources_keep_their_shares_of_the_tokens(weights: list[float], seed: int) -> None:
    """At any time no source is further than its longest document from its share; each keeps its own
    order."""
    chance, longest = random.Random(seed), 30

    def source(number: int):
        for n in itertools.count():
            yield Document([number, n] + [0] * chance.randint(0, longest - 2), [True])

    given, order = [0] * len(weights), [0] * len(weights)
    for document in itertools.islice(mixed([source(i) for i in range(len(weights))], weights), 300):
        number, n = document.ids[:2]
        assert n == order[number]
        order[number] += 1
        given[number] += len(document.ids)
    shares = [tokens / weight for tokens, weight in zip(given, weights, strict=True)]
    assert max(shares) - min(shares) <= longest / min(weights) + 1e-6


def test_several_sources_their_weights_and_what_is_held_out(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 60)):
        rows = [{"text": f"{name} number {n} " * (n % 3 + 1)} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"{tmp_path}/a.jsonl=3,{tmp_path}/b.jsonl"
    corpus = open_corpus(spec, None, Encoder(make_tokenizer(), "none"))
    assert [(len(rows), weight) for rows, weight in corpus.sources] == [(38, 3.0), (57, 1.0)]
    assert [corpus.heldout.where(i).rsplit("/", 1)[1] for i in range(5)] == [
        "a.jsonl:39", "a.jsonl:40", "b.jsonl:58", "b.jsonl:59", "b.jsonl:60",
    ]  # fmt: skip
    other = open_corpus(spec.replace("=3", "=2"), None, Encoder(make_tokenizer(), "none"))
    assert other.hash != corpus.hash
    for wrong in ("a=0", "a=x", "=1", "a=1,b=-1"):
        with pytest.raises(InputError, match="must have the form NAME=NUMBER, with a positive number"):
            read_mixture(wrong)
    with pytest.raises(InputError, match=r"b\.jsonl does not exist"):
        read_mixture("./b.jsonl=1,./c.jsonl=1")
    odd = tmp_path / "a,b=c.jsonl"
    odd.write_text('{"text": "x"}\n')
    assert [(len(rows), weight) for rows, weight in read_mixture(str(odd))] == [(1, 1.0)]


def test_density_and_the_example_show_what_is_learnt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ab", "response": "cde"}) + "\n" for _ in range(64)))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, "assistant")
    corpus = open_corpus(str(path), str(path), encoder)
    document = encoder.encode({"prompt": "ab", "response": "cde"}, "")
    each = 16 // len(document.ids)  # whole documents fit into a row
    found = corpus.packing(0, 16, sample=each * 10)
    assert found.held == pytest.approx(each * len(document.ids) / 16)
    assert found.learnt == pytest.approx(each * sum(document.loss_mask) / 16)
    assert (found.documents, found.cut, found.longest) == (each * 10, 0, len(document.ids))
    short = corpus.packing(0, len(document.ids) - 1, sample=20)
    assert (short.documents, short.cut, short.longest) == (20, 20, len(document.ids))
    decode = encoder.tokenizer.decode
    begin = document.loss_mask.index(True)
    assert corpus.example(0) == f"{decode(document.ids[:begin])}\u27e6{decode(document.ids[begin:])}\u27e7"


def test_every_format(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("some text\nof two lines")
    assert list(read_rows(str(tmp_path / "a.jsonl"))) == rows
    assert [r["messages"][0]["content"] for r in read_rows(str(tmp_path / "a.parquet"))] == ["one?", "one?"]
    assert list(read_rows(str(tmp_path / "a.txt"))) == [{"text": "some text\nof two lines"}]
    assert len(read_rows(str(tmp_path / "a.jsonl"), limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no rows"),
        ('{"text": "a"}\nnot json\n', "a.jsonl:2 is not JSON"),
        ('{"text": "a"}\n\n{"text": 3}\n', "a.jsonl:3 has neither"),
        ('{"text": "a"}\n{"x": 1}\n', "a.jsonl:2 has neither"),
        ('{"text": 3}\n', "a.jsonl:1 has neither"),
        ("[1]\n", "a.jsonl:1 is not a JSON object"),
        ('{"prompt": "a"}\n', "a.jsonl:1: `prompt` and `response`"),
        ('{"messages": []}\n', "a.jsonl:1: `messages`"),
        ('{"messages": [{"role": "user"}]}\n', "a.jsonl:1: each message"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "a.jsonl:1: there is no assistant"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        read_rows(str(tmp_path / "a.jsonl"))


def test_where_data_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRIDIZE_DATA", raising=False)
    (tmp_path / "teacher").mkdir()
    with pytest.raises(InputError, match="no data"):
        find_data(None, tmp_path / "teacher")
    (tmp_path / "teacher/traces.jsonl").write_text("x")
    assert find_data(None, tmp_path / "teacher") == str(tmp_path / "teacher/traces.jsonl")
    (tmp_path / "traces.jsonl").write_text("x")
    assert find_data(None, tmp_path / "teacher") == "traces.jsonl"
    monkeypatch.setenv("HYBRIDIZE_DATA", "env.jsonl")
    assert find_data(None, None) == "env.jsonl"
    assert find_data("flag.jsonl", None) == "flag.jsonl"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=5), st.data())
def test_parts_of_joined_rows_keep_their_rows_and_names(sizes: list[int], data: st.DataObject) -> None:
    parts = [Rows(f"f{n}", [{"text": f"{n}-{i}"} for i in range(size)], "") for n, size in enumerate(sizes)]
    named = [(row["text"], part.where(i)) for part in parts for i, row in enumerate(part)]
    whole = Rows.joined(parts)
    begin = data.draw(st.integers(0, len(named)))
    end = data.draw(st.integers(begin, len(named)))
    piece = whole.part(begin, end)
    assert [(row["text"], piece.where(i)) for i, row in enumerate(piece)] == named[begin:end]
    assert len(whole) == len(named)


def test_a_file_that_changes_while_it_is_used_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = read_rows(str(path))
    assert rows[1] == {"text": "two"}
    path.write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="has changed while it was in use"):
        rows[1]


def test_a_file_larger_than_memory_would_hold_is_read_row_by_row(tmp_path: Path) -> None:
    path, count = tmp_path / "a.jsonl", 4000
    path.write_text("".join(json.dumps({"text": f"{i} " + "long " * 1000}) + "\n" for i in range(count)))
    tracemalloc.start()
    rows = read_rows(str(path))
    first, last = rows[0]["text"][:6], rows[count - 1]["text"][:9]
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first, last) == ("0 long", "3999 long")
    assert path.stat().st_size > 20e6
    assert held < 1e6
    assert most < 2e6
