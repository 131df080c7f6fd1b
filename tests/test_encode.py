"""What a row becomes in tokens: the tokenizer's own marks, answers in their contexts, answers that
were cut, ids as written."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from hybridize.data.corpus import Corpus, open_corpus
from hybridize.data.encode import Document, Encoder, decoded
from hybridize.data.packing import pack_stream
from hybridize.errors import InputError
from tests.conftest import Runner, make_teacher, make_tokenizer

ASK, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}
CHAT = {"messages": [ASK, ANSWER, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "22"}]}
# reasoning up to # is dropped from every finished answer, as DeepSeek's template does
CUTS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('#')[-1] if m.role == 'assistant' else m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def marked_tokenizer(template: str = "$A", **names: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a <bos>, which it adds by `template`, as Llama's and Gemma's do."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<bos>", special=True)})
    ids = [("<bos>", tokenizer.convert_tokens_to_ids("<bos>")), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = None
    return tokenizer


def shown(tokenizer: Any, document: Document) -> list[str]:
    """Each sequence of the row, what is learnt between brackets."""
    found = []
    for part in document.parts():
        text, open_ = "", False
        for token, kept in zip(part.ids, part.loss_mask, strict=True):
            text += ("[" if kept and not open_ else "]" if open_ and not kept else "") + tokenizer.decode([token])
            open_ = kept
        found.append(text + ("]" if open_ else ""))
    return found


def test_plain_text_gets_what_the_tokenizer_adds_by_itself() -> None:
    tokenizer = marked_tokenizer("<bos> $A")
    encoder = Encoder(tokenizer, "none")
    for text in ("all", "<bos>all"):  # a text that has it already, as a rendered chat, gets no second one
        document = encoder.encode({"text": text}, text)
        assert tokenizer.decode(document.ids) == "<bos>all<|end|>"
        assert all(document.loss_mask)
    assert tokenizer.decode(encoder.encode({"text": "all<|end|>"}, "e").ids) == "<bos>all<|end|>"
    both = marked_tokenizer("<bos> $A <|end|>")
    assert both.decode(Encoder(both, "none").encode({"text": "all"}, "b").ids) == "<bos>all<|end|>"
    bare = make_tokenizer()
    assert bare.decode(Encoder(bare, "none").encode({"text": "all"}, "x").ids) == "all<|end|>"


def test_pairs_and_prompts_without_a_template_begin_as_texts_do() -> None:
    tokenizer = without_template(marked_tokenizer("<bos> $A <|end|>"))
    encoder = Encoder(tokenizer, "assistant")
    assert shown(tokenizer, encoder.encode({"prompt": "ab", "response": "cde"}, "x")) == ["<bos>ab[cde<|end|>]"]
    assert encoder.prompt({"prompt": "ab"}, "x") == tokenizer("ab")["input_ids"][:-1]  # an answer is to follow
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "<bos>ab<|end|>"


def test_a_rendered_template_gets_nothing_added() -> None:
    tokenizer = marked_tokenizer("<bos> $A")
    assert shown(tokenizer, Encoder(tokenizer, "assistant").encode({"messages": [ASK, ANSWER]}, "x")) == [
        "<|user|>one?<|end|><|assistant|>[1<|end|>]"
    ]
    template = "{{ bos_token }}" + tokenizer.chat_template
    document = Encoder(tokenizer, "assistant", template).encode(CHAT, "x")
    assert shown(tokenizer, document) == [
        "<bos><|user|>one?<|end|><|assistant|>[1<|end|>]<|user|>two?<|end|><|assistant|>[22<|end|>]"
    ]


def test_joined_streams_have_the_mark_before_each_document(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"n{i}"}) + "\n" for i in range(40)))
    tokenizer = marked_tokenizer("<bos> $A")
    corpus = open_corpus(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl"), Encoder(tokenizer, "none"))
    (batch,) = corpus.held_out(1, 20, 1)
    assert tokenizer.decode(batch.ids[0]) == "<bos>n0<|end|><bos>n1<|end|><bos>n2<|end|><bos>n3<|end|><bos>n4<|end|>"


def test_an_answer_that_was_cut_teaches_no_ending() -> None:
    """Not its own end token, and in a joined stream not the beginning of what follows either."""
    tokenizer = make_tokenizer()
    cut = {"messages": [ASK, ANSWER], "finish": "length"}
    assert shown(tokenizer, Encoder(tokenizer, "assistant").encode(cut, "x")) == ["<|user|>one?<|end|><|assistant|>[1]"]
    plain = Encoder(without_template(make_tokenizer()), "assistant")
    assert shown(tokenizer, plain.encode({"prompt": "a", "response": "b", "finish": "length"}, "x")) == ["a[b]"]
    encoder = Encoder(tokenizer, "none")
    documents = [encoder.encode(row, str(n)) for n, row in enumerate((cut, {"text": "xyz"}, {"text": "uvw"}))]
    (line,) = pack_stream(documents, sum(len(d.ids) for d in documents) - 1)
    predicted = dict(zip(line[2], line[3], strict=True))
    assert predicted[tokenizer.convert_tokens_to_ids("x")] is False
    assert predicted[tokenizer.convert_tokens_to_ids("u")] is True


def test_ids_as_written_are_taken_where_the_text_does_not_say_them() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["ab"])
    apart = [tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    row = {"messages": [ASK, {"role": "assistant", "content": "ab"}], "finish": "stop"}
    encoder = Encoder(tokenizer, "assistant")
    together = encoder.encode(row, "x")
    assert [t for t, k in zip(together.ids, together.loss_mask, strict=True) if k] == [tokenizer.convert_tokens_to_ids("ab"), 1]
    found = encoder.encode(row | {"token_ids": apart}, "x")
    assert [t for t, k in zip(found.ids, found.loss_mask, strict=True) if k] == [*apart, 1]
    assert not encoder.remarks()
    stale = encoder.encode(row | {"token_ids": apart[::-1]}, "x")
    assert stale == together
    assert "1 answers were generated with another tokenizer" in encoder.remarks()[0]


def test_what_is_not_learnt_is_counted_and_said() -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, "assistant")
    encoder.encode({"messages": [ASK, ANSWER | {"reasoning_content": "hmm"}], "id": 3}, "x")
    assert encoder.remarks() == ["1 answers have text that the chat template does not render: 3 tokens have no loss"]
    assert list(encoder.unread) == ["id"]
    opens = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|><think>")
    encoder = Encoder(tokenizer, "assistant", opens)
    for content in ("1", "so</think>1", "<think>so</think>1"):
        encoder.encode({"messages": [ASK, {"role": "assistant", "content": content}]}, content)
    assert encoder.remarks() == [
        "1 answers do not close the reasoning block that the chat template's prompt opens: the model learns them as reasoning"
    ]
    endless = tokenizer.chat_template.replace("<|end|>", "")
    encoder = Encoder(tokenizer, "assistant", endless)
    encoder.encode({"messages": [ASK, ANSWER]}, "x")
    assert encoder.remarks() == ["the chat template adds no end token to 1 answers: the model does not learn to end them"]


def test_tokens_that_the_model_does_not_know_and_half_characters_are_named() -> None:
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    encoder = Encoder(tokenizer, "assistant", vocabulary=known)
    chat = {"messages": [ASK, {"role": "assistant", "content": "a <|new|> b"}]}
    with pytest.raises(
        InputError, match=rf"rows:3 has the token '<\|new\|>' \({known}\), but the model has only {known} embeddings"
    ):
        encoder.encode(chat, "rows:3")
    with pytest.raises(InputError, match="rows:4 has the token"):
        encoder.prompt({"prompt": "<|new|>"}, "rows:4")
    half = {"messages": [{"role": "user", "content": "Half \ud83d of it"}, ANSWER]}
    for read in (encoder.encode, encoder.prompt):
        with pytest.raises(InputError, match=r"rows:5 has a lone surrogate \('\\ud83d', half a character\) after '<\|user"):
            read(half, "rows:5")


def test_named_templates_are_chosen_as_transformers_does() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    encoder, tools = Encoder(tokenizer, "assistant"), [{"name": "count"}]
    assert shown(tokenizer, encoder.encode({"messages": [ASK, ANSWER]}, "x"))[0].startswith("<|user|>one?")
    assert shown(tokenizer, encoder.encode({"messages": [ASK, ANSWER], "tools": tools}, "y"))[0].startswith(
        "[{'name': 'count'}]<|user|>"
    )
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(InputError, match="has templates rag but none is called 'default'"):
        Encoder(tokenizer, "assistant").encode({"messages": [ASK, ANSWER]}, "x")


def test_a_row_of_several_sequences_is_packed_as_several_documents(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chat = {"messages": [ASK, {"role": "assistant", "content": "hm#1"}, *CHAT["messages"][2:]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat) + "\n")
    corpus = open_corpus(str(tmp_path / "rows.jsonl"), None, Encoder(tokenizer, "assistant", CUTS), hold_out=False)
    assert isinstance(corpus, Corpus)
    documents = corpus.documents(0)
    first, second = next(documents), next(documents)
    assert shown(tokenizer, first) == ["<|user|>one?<|end|><|assistant|>[hm#1<|end|>]"]
    assert shown(tokenizer, second) == ["<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?<|end|><|assistant|>[22<|end|>]"]
    batch = next(corpus.training(0, 64, 1))
    assert int((batch.positions[0][: len(first.ids) + len(second.ids)] == 0).sum()) == 2


def test_without_a_mask_the_finished_chat_is_the_stream() -> None:
    """Line breaks after the end token, and a user's last words, too."""
    tokenizer = make_tokenizer()
    template = tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    chat = {"messages": [*CHAT["messages"], ASK]}
    document = Encoder(tokenizer, "none", template).encode(chat, "x")
    assert decoded(tokenizer, document.ids) == tokenizer.apply_chat_template(
        chat["messages"], chat_template=template, tokenize=False
    )
    assert all(document.loss_mask)
    assert shown(tokenizer, Encoder(tokenizer, "assistant", template).encode(chat, "x")) == [
        "<|user|>one?<|end|>\n<|assistant|>[1<|end|>]\n<|user|>two?<|end|>\n<|assistant|>[22<|end|>]"
    ]


def test_what_a_model_wrote_comes_back_exactly(
    cli: Runner, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate, then encode: prompt and written tokens, whatever template and sampling do to them."""
    from hybridize.generation import traces

    seen: dict[str, tuple[list[int], list[int], bool]] = {}
    real = traces.trace_of

    def spied(encoder: Encoder, row: Any, where: str, answer: Any) -> dict[str, Any]:
        line = real(encoder, row, where, answer)
        seen[json.dumps(line["messages"])] = encoder.prompt(row, where), answer.ids, answer.ended
        return line

    monkeypatch.setattr(traces, "trace_of", spied)
    home = shutil.copytree(teacher, tmp_path / "home")
    (home / "chat_template.jinja").write_text(CUTS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(24)))
    cli(
        "generate",
        home,
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--temperature",
        3,
        "--max-new-tokens",
        24,
        "-o",
        tmp_path / "t",
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home)
    encoder, rows = Encoder(tokenizer, "assistant"), [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert len(rows) >= 20
    for row in rows:
        prompt, written, ended = seen[json.dumps(row["messages"])]
        (part,) = encoder.encode(row, "row").parts()
        assert part.ids == [*prompt, *written, *([tokenizer.eos_token_id] if ended else [])]
        assert part.loss_mask == [False] * len(prompt) + [True] * (len(part.ids) - len(prompt))
    assert any("token_ids" in row for row in rows), "bytes that are no character do not come back from a text"
    assert not encoder.remarks()


def test_commands_say_what_they_do_not_read(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_teacher(tmp_path / "teacher", max_position_embeddings=32)
    rows = [{"messages": [ASK, ANSWER | {"reasoning_content": "hmm"}], "id": n} for n in range(40)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    sized = ("--seq-len", 48, "--device", "cpu")
    cli("replace", "--indices", "1", "--device", "cpu", "--calibration-tokens", 64)
    assert "ignored keys of the rows: id" in cli.stderr
    for command in (
        ("score-loo", "--metric", "kl", "--windows", 1), ("score-mmr", "--steps", 1, "--batch-size", 1, "--no-calibrate"),
        ("score-restore", "--steps", 1, "--batch-size", 1, "--windows", 1, "--no-calibrate"),
        ("distill", "h1", "--steps", 1, "--batch-size", 1),
        ("eval", "--fidelity", "traces.jsonl", "--windows", 1, "--mask", "assistant"),
    ):  # fmt: skip
        cli(*command, *sized)
        assert "--seq-len 48 exceeds the model's context of 32 positions" in cli.stderr
        assert cli.stderr.count("ignored keys of the rows: id") == 1
        assert "answers have text that the chat template does not render" in cli.stderr
    cli("distill", "h1", "--steps", 1, "--dry-run", "--seq-len", 48)
    assert "--seq-len 48 exceeds the model's context of 32 positions" in cli.stderr


THINKS = (  # writes reasoning that stands apart, and shows what else precedes an answer only while it is asked for
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ 'Be brief. ' if loop.last }}{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|assistant|><think>{{ m.reasoning_content or '' }}</think>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "count", "arguments": '{"keys": true, "of": null}'}}


def learnt(template: str | None, *messages: dict[str, Any], **more: Any) -> tuple[str, list[str]]:
    """What is learnt of a chat's last answer, and what is said about it."""
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, "assistant", template)
    part = encoder.encode({"messages": list(messages), **more}, "x").parts()[-1]
    return tokenizer.decode([t for t, k in zip(part.ids, part.loss_mask, strict=True) if k]), encoder.remarks()


def test_reasoning_under_a_template_that_rewrites_what_precedes() -> None:
    thought = ANSWER | {"reasoning_content": "abc"}
    assert learnt(THINKS, ASK, thought) == ("<think>abc</think>1<|end|>", [])
    assert learnt(THINKS, ASK, ANSWER) == ("1<|end|>", [])
    cut = {"role": "assistant", "content": None, "reasoning_content": "still thin"}
    assert learnt(THINKS, ASK, cut, finish_reason="length")[0] == "<think>still thin"
    assert learnt(THINKS, ASK, thought | {"content": "then 1"}, finish="max_tokens")[0] == "<think>abc</think>then 1"


def test_arguments_are_json_also_where_a_template_prints_them() -> None:
    text, said = learnt(THINKS, ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    assert text == '[count {"keys": true, "of": null}]<|end|>'
    assert said == []


def test_losses_are_seen_whatever_stands_beside_them() -> None:
    """A part that stands in another's text is not there for that, and a call has arguments."""
    plain = make_tokenizer().chat_template
    assert "1 tokens have no loss" in learnt(plain, ASK, {"role": "assistant", "content": "7 it is", "reasoning": "7"})[1][0]
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    names = plain.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls)
    call = {"type": "function", "function": {"name": "count", "arguments": {"where": "Oslo"}}}
    assert "have no loss" in learnt(names, ASK, ANSWER | {"tool_calls": [call]})[1][0]
    assert "have no loss" in learnt(plain, ASK, ANSWER | {"content": "I count now", "tool_calls": [call]})[1][0]
    text, _ = learnt(names, ASK, {"role": "assistant", "content": "", "function_call": {"name": "count", "arguments": "{}"}})
    assert text == "count<|end|>"


def test_templates_that_end_answers_in_text() -> None:
    """No other role's header is learnt, and no footer, where the tokenizer knows no mark to end at."""
    always = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}### assistant:\n"
    assert learnt(always, ASK, ANSWER)[0] == "\n1\n\n"  # Jinja drops a template's last line break, so the model writes it
    ends = "{% if add_generation_prompt %}assistant: {% else %}[the end]{% endif %}"
    footer = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ends
    assert learnt(footer, ASK, ANSWER)[0] == "1\n"
    strange = "{% for m in messages %}<|of|>{{ m.role }}\n{{ m.content }}<|done|>{% endfor %}<|of|>assistant\n"
    assert learnt(strange, ASK, ANSWER)[0] == "\n1<|done|>"


def test_a_template_that_shows_an_answer_twice_is_refused() -> None:
    twice = make_tokenizer().chat_template + "{% if not add_generation_prompt %}summary: {{ messages[-1].content }}{% endif %}"
    with pytest.raises(InputError, match="x: the chat template renders an answer 2 times"):
        learnt(twice, ASK, ANSWER)


def test_each_named_template_is_asked_whether_it_takes_lists() -> None:
    tokenizer = make_tokenizer()
    takes = tokenizer.chat_template.replace("{{ m['content'] }}", "{% for p in m.content %}{{ p.text or p }}{% endfor %}")
    tokenizer.chat_template = {"default": takes, "tool_use": tokenizer.chat_template}
    encoder, parts = Encoder(tokenizer, "assistant"), [{"type": "text", "text": "Q1"}]
    for more in ({}, {"tools": [{"name": "count"}]}):
        row = {"messages": [{"role": "user", "content": parts}, ANSWER], **more}
        assert shown(tokenizer, encoder.encode(row, str(more)))[0].startswith("<|user|>Q1<|end|>")


def test_parts_of_an_answer_are_not_lost_where_they_are_joined() -> None:
    """By line breaks for templates that take texts, by themselves for those that take lists."""
    parts = {"role": "assistant", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}
    assert learnt(None, ASK, parts) == ("1\n2<|end|>", [])
    takes = make_tokenizer().chat_template.replace(
        "{{ m['content'] }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
    )
    assert learnt(takes, ASK, parts) == ("12<|end|>", [])


def test_small_things_of_pairs() -> None:
    tokenizer = without_template(marked_tokenizer("<bos> $A"))
    encoder = Encoder(tokenizer, "assistant")
    assert shown(tokenizer, encoder.encode({"prompt": "", "response": "a"}, "x")) == ["<bos>[a<|end|>]"]
    assert shown(tokenizer, encoder.encode({"prompt": "a", "response": "b<|end|>"}, "x")) == ["<bos>a[b<|end|>]"]
    asked = {"instruction": "Count.", "input": "1 2", "system": "Be brief."}
    assert tokenizer.decode(encoder.prompt(asked, "x")) == "<bos>Be brief.\nCount.\n1 2"
    ends = without_template(marked_tokenizer("<bos> $A <|end|>"))
    assert ends.decode(Encoder(ends, "assistant").prompt({"prompt": "a"}, "x")) == "<bos>a"


def test_settings_of_config_json_count_where_there_are_no_others(cli: Runner, teacher: Path, tmp_path: Path) -> None:
    home = shutil.copytree(teacher, tmp_path / "home")
    config = json.loads((home / "config.json").read_text())
    (home / "generation_config.json").unlink(missing_ok=True)
    (home / "config.json").write_text(json.dumps(config | {"num_beams": 3}))
    assert "config.json has num_beams = 3" in cli.fails("generate", home, "hi")
    answers = []
    for settings in ({}, {"suppress_tokens": list(range(4, 240))}):
        (home / "config.json").write_text(json.dumps(config | settings))
        answers.append(json.loads(cli("generate", home, "hi", "--max-new-tokens", 6, "--json"))["answers"])
    (home / "config.json").write_text(json.dumps(config))
    (home / "generation_config.json").write_text(json.dumps({"suppress_tokens": list(range(4, 240)), "eos_token_id": 1}))
    answers.append(json.loads(cli("generate", home, "hi", "--max-new-tokens", 6, "--json"))["answers"])
    assert answers[0] != answers[1] == answers[2]


def test_what_cannot_be_written_is_named_before_an_answer_is(cli: Runner, teacher: Path, tmp_path: Path) -> None:
    dated = {"messages": [ASK | {"timestamp": datetime.datetime(2026, 1, 1)}]}
    pyarrow.parquet.write_table(pa.Table.from_pylist([dated]), tmp_path / "dated.parquet")
    cli("generate", teacher, "--prompts", tmp_path / "dated.parquet", "--max-new-tokens", 3, "-o", tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text())["messages"][0] == ASK
    (tmp_path / "half.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "\\ud83d"}]}\n')
    given = ("generate", teacher, "--prompts", tmp_path / "half.jsonl", "-o", tmp_path / "h.jsonl")
    assert "half.jsonl:1 cannot be written with its answer" in cli.fails(*given)
