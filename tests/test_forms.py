"""What people keep their rows in: the forms of rows, and the files that hold them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import types
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from hybridize.data.forms import Conversation, Pair, Plain, read_form, read_question
from hybridize.data.rows import read_rows
from hybridize.errors import InputError

ASK, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"what": "keys"}}}
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    form, _ = read_form(row, "x:1")
    assert isinstance(form, Conversation)
    return form.messages


def test_sharegpt_rows() -> None:
    row = {
        "system": "Be brief.", "id": "a1", "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "How many?"},
            {"from": "function_call", "value": json.dumps({"name": "count", "arguments": {"what": "keys"}})},
            {"from": "observation", "value": "7"}, {"from": "gpt", "value": "Seven."},
        ],
    }  # fmt: skip
    form, unread = read_form(row, "x:1")
    assert form.messages == [
        {"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"}, ANSWER,
    ]  # fmt: skip
    assert form.kwargs == {"tools": [TOOL]}
    assert unread == {"id"}
    assert messages_of({"conversations": [ASK, ANSWER]}) == [ASK, ANSWER]
    with pytest.raises(InputError, match="x:1: unknown speaker 'narrator' in"):
        read_form({"conversations": [{"from": "narrator", "value": "It is late."}]}, "x:1")
    with pytest.raises(InputError, match="there is no assistant message to train on"):
        read_form({"conversations": [{"from": "human", "value": "Hello?"}]}, "x:1")


def test_alpaca_and_other_pairs() -> None:
    row = {"instruction": "Count.", "input": "1 2 3", "output": "Three.", "source": "here"}
    assert read_form(row, "x") == (Pair("Count.\n1 2 3", "Three."), {"source"})
    assert read_form(row | {"input": ""}, "x")[0] == Pair("Count.", "Three.")
    assert read_form(row | {"system": "Be brief."}, "x")[0] == Pair("Count.\n1 2 3", "Three.", "Be brief.")
    assert read_question(row, "x") == "Count.\n1 2 3"
    assert read_form({"prompt": "a", "completion": "b"}, "x")[0] == Pair("a", "b")
    assert messages_of({"prompt": [ASK], "completion": [ANSWER]}) == [ASK, ANSWER]
    assert messages_of({"prompt": [ASK], "completion": "Seven."}) == [ASK, ANSWER]
    for wrong in ({"instruction": "Count."}, {"output": "Three."}, {"prompt": "a"}, row | {"output": 3}):
        with pytest.raises(InputError, match="must both be given, as text"):
            read_form(wrong, "x")
    with pytest.raises(InputError, match="the response is empty"):
        read_form(row | {"output": ""}, "x")


def test_keys_without_a_value_count_as_missing() -> None:
    assert read_form({"messages": None, "prompt": None, "text": "all"}, "x") == (Plain("all"), set())
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    assert messages_of({"messages": [ASK, calling]})[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert messages_of({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]})[1].get("content") is None
    assert messages_of({"messages": [ASK, ANSWER | {"tool_calls": []}]})[1] == ANSWER


def test_messages_of_every_kind() -> None:
    text = {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": " many?"}]}
    assert messages_of({"messages": [text, ANSWER]})[0] == text
    as_text = {"id": "c1", "function": {"name": "count", "arguments": '{"what": "keys"}'}}
    found = messages_of({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [as_text]}]})
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"what": "keys"}
    for name in ("reasoning_content", "reasoning", "thinking"):
        thought = messages_of({"messages": [ASK, ANSWER | {name: "3 and 4"}]})[1]
        assert thought["reasoning_content"] == thought["reasoning"] == thought["thinking"] == "3 and 4"
    assert messages_of({"messages": [ASK, {"role": "assistant", "content": "", "reasoning_content": "It is late."}]})
    form, unread = read_form(
        {"messages": [ASK, ANSWER | {"weight": 0}], "documents": [{"text": "d"}], "chat_template_kwargs": {"a": 1}, "id": 3},
        "x",
    )
    assert form.kwargs == {"documents": [{"text": "d"}], "a": 1}
    assert unread == {"id", "messages[].weight"}
    turns = [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b", "weight": 0}]
    assert read_form({"conversations": turns}, "x")[1] == {"conversations[].id", "conversations[].weight"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASK, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [ASK, {"role": "assistant", "content": 3}]}, "must be text or a list of text parts"),
        ({"messages": [ASK, {"role": "assistant"}]}, "each message needs"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "all assistant messages are empty"),
        ({"messages": [ASK, ANSWER | {"tool_calls": "none"}]}, "`tool_calls` must be a list"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "`tools` must be a list of objects"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": 3}, "`chat_template_kwargs` must be an object"),
        ({"messages": [ASK, ANSWER], "token_ids": ["a"]}, "`token_ids` must be a list of token ids"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "needs a `from` and a `value`"),
        ({"conversations": [{"from": "function_call", "value": "count()"}]}, "must be JSON with `name`"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "unknown speaker"),
        ({"messages": [ASK, ANSWER | {"reasoning": "a", "thinking": "b"}]}, "must be a single text"),
        ({"messages": [ASK, ANSWER], "tools": "[" * 100_000}, "`tools` must be a list of objects"),
        ({"x": 1}, "has neither `messages`"),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match="x:7") as caught:
        read_form(row, "x:7")
    assert says in str(caught.value)


ROWS = [{"text": "one"}, {"text": "two ünd 你"}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", TEXT), ("blank.jsonl", b"\n" + TEXT.replace(b"\n", b"\n \n\n")), ("bom.jsonl", BOM + TEXT),
        ("bom-blank.jsonl", BOM + b"\n" + TEXT),
        ("late.json", b" " * 40 + json.dumps(ROWS, indent=2).encode()),
        ("gz.jsonl.gz", gzip.compress(TEXT, mtime=0)), ("named.jsonl", gzip.compress(BOM + TEXT, mtime=0)),
        ("bz.jsonl.bz2", bz2.compress(TEXT)),
        ("xz.jsonl.xz", lzma.compress(TEXT)), ("list.json", json.dumps(ROWS).encode()),
        ("pretty.json", BOM + json.dumps(ROWS, indent=2).encode()), ("list.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("list.json.gz", gzip.compress(json.dumps(ROWS, indent=2).encode(), mtime=0)),
    ],
)  # fmt: skip
def test_files_of_every_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(str(tmp_path / name))) == ROWS


def test_a_text_with_a_mark_and_a_table_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"some text")
    assert list(read_rows(str(tmp_path / "a.txt"))) == [{"text": "some text"}]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"more text"))
    assert list(read_rows(str(tmp_path / "b.txt.gz"))) == [{"text": "more text"}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table")
    assert list(read_rows(str(tmp_path / "table"))) == ROWS


def test_zstd_is_read_with_the_package_and_named_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + TEXT)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="compressed with zstd: unpack it first"):
        read_rows(str(path))
    reader = types.SimpleNamespace(
        ZstdDecompressor=lambda: types.SimpleNamespace(
            stream_reader=lambda file, **_: BytesIO(file.read().removeprefix(b"\x28\xb5\x2f\xfd"))
        )
    )
    monkeypatch.setitem(sys.modules, "zstandard", reader)
    assert list(read_rows(str(path))) == ROWS


def test_a_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n" + TEXT + b"\n{}\n")
    with pytest.raises(InputError, match=r"a\.jsonl:6 has neither"):
        read_rows(str(path))
    assert read_rows(str(path), limit=2).where(1) == f"{path}:4"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("ä".encode("utf-16"), "is UTF-16 text; save it as UTF-8"), (b"PK\x03\x04rest", "is a zip archive"),
        (gzip.compress(TEXT, mtime=0)[:-9], "cannot be unpacked"),
        (json.dumps({"rows": ROWS}, indent=2).encode(), "is one JSON object"),
        (b"[\n", "is not JSON"), (b"[\n{},\n{]\n", "is not JSON: Expecting"), ("ä".encode("utf-32"), "is UTF-32 text"),
        (b"[]", "has no rows"), (b"", "has no rows"),
    ],
)  # fmt: skip
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rows(str(tmp_path / "a.jsonl"))
    assert says in str(caught.value)


def test_typed_columns_fill_nothing_in(tmp_path: Path) -> None:
    """In a table every tool has all keys that any has: those without a value are no part of its
    schema."""
    tools = [{"name": "a", "parameters": {"x": {"type": "int"}}}, {"name": "b", "parameters": {"y": {"type": "str"}}}]
    rows = [{"messages": [ASK, ANSWER | {"note": "n"}], "tools": tools}, {"messages": [ASK, ANSWER], "tools": tools[:1]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(str(tmp_path / "a.parquet"))) == rows
