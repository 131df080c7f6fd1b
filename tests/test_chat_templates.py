"""What is learnt of a chat, under the templates of many families, against a statement of the rule
that shares no code with it.

The rule: each assistant turn is learnt in the context in which it would be generated. That is the
template's own rendering of what precedes it, with the generation prompt (add_generation_prompt=True
on messages[:i], same tools, documents and chat_template_kwargs), then the turn's text as it was
written, reasoning included, then its end token(s). Turns share one sequence where that gives the
same tokens, else each is a document of its own. No token of another role is ever kept.
"""

# ruff: noqa: RUF001 - the fullwidth bars are DeepSeek's own

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridize.data.encode import Document, Encoder
from hybridize.errors import InputError
from tests.chat_templates import BY_NAME, FAMILIES, SPECIALS, Family

Row = dict[str, Any]
Message = dict[str, Any]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"  # what a template inserts where an answer has no thought
MARK = "\x02where the text stands\x03"


# The oracle


class Generation(Extension):
    """The markers around what is generated, which change nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    raise TemplateError(message)


def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.cache
def compiled(template: str) -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def aliased(message: Message) -> Message:
    """A message as transformers hands it to a template: nothing that is None, and its reasoning
    under the older name too."""
    message = {key: value for key, value in message.items() if value is not None}
    return {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message


def render(family: Family, row: Row, messages: list[Message], prompt: bool = False) -> str:
    """The template's text of these messages, with what else the row gives a template."""
    tokens = {name: token for name, token in (("bos_token", family.bos), ("eos_token", family.eos)) if token}
    return compiled(family.template).render(
        messages=[aliased(message) for message in messages], tools=row.get("tools"), documents=row.get("documents"),
        add_generation_prompt=prompt, **{**tokens, **row.get("chat_template_kwargs", {})},
    )  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What is to be learnt of an answer, and the text that stands before it."""

    context: str
    learnt: str


def opening(prompt: str) -> str:
    """The thinking block that a generation prompt leaves open, with the whitespace after its tag."""
    begin = prompt.rfind("<think>")
    return prompt[begin:] if begin >= 0 and not prompt[begin + len("<think>") :].strip() else ""


def separate(message: Message) -> bool:
    """Whether a turn has more to it than a text, so that only the template knows how it is written."""
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def plain(family: Family, prompt: str, message: Message) -> str:
    content: str = message["content"]
    opened = opening(prompt)
    if opened and content.startswith("<think>"):
        content = content[max(size for size in range(len(opened) + 1) if content.startswith(opened[:size])) :]
    elif opened and "</think>" not in content:
        content = family.closes + content
    return family.lead + content + family.end


def rendered(family: Family, prompt: str, whole: str, message: Message) -> str:
    """A turn with tool calls or reasoning: the template's text of it after the prompt, up to its
    end token."""
    assert whole.startswith(prompt), "the rule says nothing of a turn that the template does not write after its prompt"
    text = whole[len(prompt) :]
    end = family.call_end if message.get("tool_calls") and family.call_end else family.end
    text = text[: text.rindex(end) + len(end)]
    reasoning = message.get("reasoning_content")
    assert reasoning is None or reasoning in text
    return text if reasoning or opening(prompt) else text.removeprefix(EMPTY_THOUGHT)


def turns_of(family: Family, row: Row) -> Iterator[Turn]:
    """What the rule says of each assistant turn, in their order."""
    messages = row["messages"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index:
            prompt = render(family, row, messages[:index], prompt=True)
        else:
            prompt = render(family, row, [{"role": "assistant", "content": MARK}]).split(MARK)[0]
        if separate(message):
            learnt = rendered(family, prompt, render(family, row, messages[: index + 1]), message)
        else:
            learnt = plain(family, prompt, message)
        if index == len(messages) - 1 and row.get("finish") == "length":
            learnt = learnt.removesuffix(family.end)
        yield Turn(prompt, learnt)


# Tokenizers


@functools.cache
def byte_core() -> Tokenizer:
    """Bytes and a few merges, which cross the border between a prompt and an answer where they can."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("t", "h"), ("h", "e"), ("Ġ", "a"), ("th", "e"), ("Ġ", "the"), (":", "Ġ"), (">", "Ċ")]
    tokens = [*SPECIALS, *alphabet, *(one + other for one, other in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    return core


def piece_core(family: Family) -> Tokenizer:
    """Like sentencepiece's: words begin with a mark, unknown characters are bytes, and a text's
    first word has the mark too.

    Gemma's has no such first mark, and knows newlines.
    """
    gemma = family.name.startswith("gemma")
    merges = [("t", "h"), ("h", "e"), ("▁", "▁"), ("▁", "a"), *([("\n", "\n")] if gemma else [])]
    letters = [chr(code) for code in range(33, 127)] + ["▁"] + (["\n"] if gemma else [])
    tokens = ["<unk>", *family.specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never" if gemma else "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps if gemma else [*steps, decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(list(family.specials))
    return core


def wrapped(core: Tokenizer, family: Family) -> PreTrainedTokenizerFast:
    named = {name: token for name, token in (("bos_token", family.bos), ("eos_token", family.eos)) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = family.template
    return tokenizer


@functools.cache
def byte_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return wrapped(byte_core(), family)


@functools.cache
def piece_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return wrapped(piece_core(family), family)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# The check


def encoded(tokenizer: PreTrainedTokenizerFast, family: Family, row: Row) -> Document:
    return Encoder(tokenizer, "assistant", family.template).encode(row, "row")


def starts(turns: list[Turn], parts: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """Each turn's part and where it begins there: the one place where its context ends and
    something is kept."""
    found = []
    for turn in turns:
        before = ids_of(tokenizer, turn.context)
        size = len(before)
        places = [
            number for number, part in enumerate(parts) if part.ids[:size] == before and any(part.loss_mask[size : size + 1])
        ]
        assert len(places) == 1, (turn, [text_of(tokenizer, part.ids) for part in parts])
        found.append((places[0], size))
    return found


def check(tokenizer: PreTrainedTokenizerFast, family: Family, row: Row) -> None:
    """Everything that the rule says of a row, on tokens."""
    document = encoded(tokenizer, family, row)
    parts = document.parts()
    for part in [document, *parts]:
        assert len(part.ids) == len(part.loss_mask)
    turns = [turn for turn in turns_of(family, row) if turn.learnt]
    places = starts(turns, parts, tokenizer)
    covered: list[set[int]] = [set() for _ in parts]
    ends = []
    for turn, (number, begin) in zip(turns, places, strict=True):
        part = parts[number]
        others = [place for other, place in places if other == number and place > begin]
        end = min([*others, *(index for index in range(begin, len(part.ids)) if not part.loss_mask[index]), len(part.ids)])
        assert text_of(tokenizer, part.ids[:begin]) == turn.context
        assert text_of(tokenizer, part.ids[:end])[len(turn.context) :] == turn.learnt
        assert part.ids[begin:end] in spellings(tokenizer, family, turn), "not the tokens that the tokenizer gives"
        covered[number].update(range(begin, end))
        ends.append(end)
    for part, kept in zip(parts, covered, strict=True):
        assert kept == {index for index, flag in enumerate(part.loss_mask) if flag}, "a token of another role is kept"
        rest = text_of(tokenizer, part.ids[max(kept) + 1 :])  # the line break that a finished chat ends with
        assert not rest.strip(), "a sequence goes on after its last answer"
        assert not rest or (part is parts[-1] and "finish" not in row)
    learnt = sum(end - begin for end, (_, begin) in zip(ends, places, strict=True))
    assert learnt == sum(document.loss_mask) == sum(sum(part.loss_mask) for part in parts)
    for index in range(1, len(turns)):
        number = places[index - 1][0]
        before = parts[number].ids[: ends[index - 1]]
        fits = ids_of(tokenizer, turns[index].context)[: len(before)] == before
        if fits:
            assert places[index][0] == number, "two turns that could share a sequence do not"
        else:
            assert places[index][0] not in {place for place, _ in places[:index]}, "two turns share a sequence that cannot"


def spellings(tokenizer: PreTrainedTokenizerFast, family: Family, turn: Turn) -> list[list[int]]:
    """The tokens that a turn may have: cut from the whole text's, its own, or its text's own and
    then its end token's own."""
    before, both = ids_of(tokenizer, turn.context), ids_of(tokenizer, turn.context + turn.learnt)
    found = [ids_of(tokenizer, turn.learnt)]
    if both[: len(before)] == before:
        found.append(both[len(before) :])
    if family.end and turn.learnt.endswith(family.end):
        found.append(ids_of(tokenizer, turn.learnt.removesuffix(family.end)) + ids_of(tokenizer, family.end))
    return found


def pairs(family: Family, row: Row) -> list[tuple[str, str]]:
    """What precedes each run of learnt tokens, and the run."""
    tokenizer = byte_tokenizer(family)
    found = []
    for part in encoded(tokenizer, family, row).parts():
        keep = [False, *part.loss_mask, False]
        edges = [index for index in range(len(part.ids) + 1) if keep[index] != keep[index + 1]]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            found.append((text_of(tokenizer, part.ids[:begin]), text_of(tokenizer, part.ids[begin:end])))
    return found


# Conversations


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "height",
            "description": "How high a mountain is.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    }
]
DOCUMENTS = [{"title": "Eiger", "text": "The Eiger is 3967 m high."}]


def system(text: str = "Be brief.") -> Message:
    return {"role": "system", "content": text}


def ask(text: str = "How high is the Eiger?") -> Message:
    return {"role": "user", "content": text}


def say(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def think(text: str) -> Message:
    return say(f"<think>\nIt is a mountain.\n</think>\n\n{text}")


def call(text: str = "", place: str = "Mönch", **more: Any) -> Message:
    function = {"name": "height", "arguments": {"name": place}}
    return say(text, tool_calls=[{"id": "call12345", "type": "function", "function": function}], **more)


def result(text: str = '{"m": 4107}') -> Message:
    return {"role": "tool", "name": "height", "content": text, "tool_call_id": "call12345"}


def must_think(family: Family, row: Row) -> bool:
    """Whether an answer without a thought has no text: the prompt opens one, and the template has
    no way to close it."""
    return bool(opening(render(family, row, [ask()], prompt=True))) and not family.closes


def chat(*messages: Message, **more: Any) -> Row:
    return {"messages": list(messages), **more}


def plain_cases(family: Family, more: Row) -> dict[str, Row]:
    """Rows without tools; `more`: what else each row has."""
    answer: Callable[[str], Message] = think if must_think(family, more) else say
    cases = {
        "one": chat(ask(), answer("It is 3967 m.")),
        "two": chat(ask(), answer("It is 3967 m."), ask("And the Mönch?"), answer("the Mönch: 4107 m")),
        "spaces": chat(ask("  How? "), answer(" the answer  "), ask(" a "), answer(" a  ")),
        "newlines": chat(ask("\nHow?\n"), answer("\n\nthe\n"), ask("\n\n"), answer("\n")),
        "characters": chat(ask("山は🏔️?"), answer("3967 メートル 🙂"), ask("e\u0301?"), answer("👩\u200d👧 e\u0301 ")),
        "thoughts": chat(ask(), think("It is 3967 m."), ask("And?"), think(" 4107 m ")),
        "thought and not": chat(ask(), think("It is 3967 m."), ask("And?"), answer("4107 m"), ask("a"), answer("the")),
        "half a thought": chat(ask(), say("A mountain.\n</think>\n\n3967 m"), ask("And?"), say("High.</think>4107")),
        "cut": chat(ask(), answer("It is"), ask("And?"), think("It "), finish="length"),
        "question last": chat(ask(), answer("3967 m"), ask("And the Mönch?")),
    }
    if (family.lead or family.end) and answer is say:
        cases["empty"] = chat(ask(), say(""), ask("Pardon?"), say("3967 m"))
    if family.system:
        cases["system"] = chat(system(), ask(), answer("3967 m"), ask("And?"), answer("4107 m"))
        cases["system, no thoughts"] = chat(system("/no_think Be brief."), ask(), answer("3967 m"), ask("And?"), answer("4107"))
    if family.consecutive:
        cases["in a row"] = chat(ask(), answer("3967 m"), answer("or so "), answer("a"), ask("And?"), answer("4107 m"))
    if family.leading:
        cases["leading"] = chat(answer("Good morning."), ask(), answer("3967 m"))
        cases["leading, alone"] = chat(answer(" Good morning. "))
    if family.parts:
        text = [{"type": "text", "text": "Well, "}, {"type": "text", "text": " How high? "}]
        cases["parts"] = chat({"role": "user", "content": text}, answer("3967 m"), ask("And?"), answer("4107 m"))
    return {name: {**row, **more} for name, row in cases.items()}


def cases_of(family: Family) -> dict[str, Row]:
    """Rows that the family's flags allow, by what is tried with them."""
    cases = plain_cases(family, {})
    if family.options:
        for name, row in plain_cases(family, {"chat_template_kwargs": dict(family.options)}).items():
            cases[f"{name}, option"] = row
    if family.documents:
        cases["documents"] = {**cases["two"], "documents": DOCUMENTS}
    if family.tools:
        cases["tools, unused"] = {**cases["two"], "tools": TOOLS}
        cases["call"] = chat(ask(), call(), tools=TOOLS)
        cases["calls"] = chat(
            ask(),
            call("A moment."),
            result(),
            call(place="Eiger"),
            result("é"),
            say("4107 m "),
            ask("And?"),
            call(),
            tools=TOOLS,
        )
        if family.beside:
            cases["call, system"] = chat(system(), ask(), call(), result(), say("4107 m"), ask("And?"), say("a"), tools=TOOLS)
    if family.reasoning:
        cases["reasoning"] = chat(
            ask(),
            say("3967 m", reasoning_content="the Eiger"),
            ask("And?"),
            say("4107 m", reasoning_content="It is\n\nhigh. 山"),
        )
    if family.reasoning and family.tools:
        cases["reasoning, call"] = chat(
            ask(), call(reasoning_content="I ask."), result(), say("4107 m"), ask("So?"), say("So.", reasoning_content="Hm."),
            tools=TOOLS,
        )  # fmt: skip
    return cases


CASES = [
    pytest.param(family, row, id=f"{family.name}: {name}") for family in FAMILIES for name, row in cases_of(family).items()
]
PIECES = (
    "the",
    " he",
    "a",
    " a",
    "th",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "1",
    "é",
    "e\u0301",
    "山",
    "漢字",
    "🙂",
    "👩‍👩‍👧",
    '"',
    "\\",
    "{",
    "\t",
    ":",
    "<",
)
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
answers = st.one_of(texts, texts.map(lambda text: text + " "), texts.map(lambda text: "\n" + text))
thoughts = st.tuples(texts, texts, st.sampled_from(("<think>\n", "<think>", ""))).map(
    lambda drawn: f"{drawn[2]}{drawn[0]}\n</think>\n\n{drawn[1]}"
)


def judged(family: Family, row: Row, message: Message) -> bool:
    """Whether the template writes this turn after its prompt, as it does not where a later turn
    changes an earlier one."""
    messages = row["messages"]
    return render(family, row, [*messages, message]).startswith(render(family, row, messages, prompt=True))


@st.composite
def rows(draw: st.DrawFn, families: tuple[Family, ...]) -> tuple[Family, Row]:
    """A family and a conversation that its flags allow."""
    family = draw(st.sampled_from(families))
    maybe = st.booleans()
    row = chat()
    messages = row["messages"]
    calls = family.tools and draw(maybe)
    reasons = family.reasoning and draw(maybe)
    if calls:
        row["tools"] = TOOLS
    if family.documents and draw(maybe):
        row["documents"] = DOCUMENTS
    if family.options and not calls and not reasons and draw(maybe):
        row["chat_template_kwargs"] = dict(family.options)
    if family.system and (family.beside or not calls) and draw(maybe):
        messages.append(system(draw(st.sampled_from(("Be brief.", "/no_think", " the 山 ")))))

    def answer() -> Message:
        prompt = render(family, row, messages, prompt=True) if messages else ""
        thinks = (opening(prompt) and not family.closes) or draw(maybe)
        empty = not thinks and (family.lead or family.end) and draw(st.integers(0, 5)) == 5
        return say("" if empty else draw(thoughts if thinks else answers))

    def special(message: Message) -> Message:
        return message if judged(family, row, message) else answer()

    if family.leading and not messages and not calls and draw(maybe):
        messages.append(answer())
    for _ in range(draw(st.integers(1, 3))):
        text = draw(texts)
        listed = family.parts and draw(maybe)
        messages.append({"role": "user", "content": [{"type": "text", "text": text}] if listed else text})
        for _ in range(draw(st.integers(0, 2)) if calls else 0):
            reason = reasons and draw(maybe)
            text = "" if reason or draw(maybe) else draw(texts)
            message = special(call(text, reasoning_content="the reason") if reason else call(text))
            if "tool_calls" not in message:
                break
            messages += [message, result(draw(texts))]
        if reasons and draw(maybe):
            messages.append(special(say(draw(answers), reasoning_content="the reason 山\n\nof it")))
        else:
            messages.append(answer())
        messages += [answer() for _ in range(draw(st.integers(0, 4)) - 2 if family.consecutive else 0)]
    last = messages[-1]
    if not last["content"]:
        last["content"] = "the end" if not must_think(family, row) else "<think>\nthe\n</think>\n\nend"
    if family.trailing and draw(st.integers(0, 3)) == 3:
        messages.append(ask(draw(texts)))
    elif not separate(last) and ("</think>" in last["content"] or not family.opens) and draw(maybe):
        row["finish"] = "length"
    return family, row


def each_of(families: tuple[Family, ...], examples: int, say_of: Callable[[Family, Row], None]) -> None:
    """Tries what is said of any row on some; the families' names alone decide which, so every run
    tries the same."""

    def tried(drawn: tuple[Family, Row]) -> None:
        say_of(*drawn)

    limits = settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )  # no shrinking: a broken encoder fails for most families, and the rows are short as they are
    seed(zlib.crc32(" ".join(family.name for family in families).encode()))(limits(given(rows(families))(tried)))()


# The templates and the oracle themselves


def assert_alike(family: Family, row: Row) -> None:
    """transformers writes the same text as the oracle, for every beginning of the row, with and
    without the prompt."""
    given_to = {key: row.get(key) for key in ("tools", "documents")} | row.get("chat_template_kwargs", {})
    for count in range(1, len(row["messages"]) + 1):
        if count == 1 and row["messages"][0]["role"] == "system":
            continue  # a system text alone is no chat, and some templates say so
        for prompt in (False, True):
            messages = row["messages"][:count]
            # one name for all templates: transformers gives them the others from 5.21 on, before it
            # is the caller's affair
            named = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
            text = byte_tokenizer(family).apply_chat_template(
                named, tokenize=False, add_generation_prompt=prompt, **given_to
            )  # fmt: skip
            assert text == render(family, row, messages, prompt)


def test_the_families_are_many_and_distinct() -> None:
    assert len(FAMILIES) == len(BY_NAME) == len({family.template for family in FAMILIES}) >= 34
    assert all(
        {family.bos, family.eos} - {""} <= {*family.specials} | {"<bos>"} for family in FAMILIES if family.name != "llama-3"
    )


@pytest.mark.parametrize(("family", "row"), CASES)
def test_transformers_writes_what_the_oracle_writes(family: Family, row: Row) -> None:
    assert_alike(family, row)


def test_transformers_writes_what_the_oracle_writes_of_any_chat() -> None:
    each_of(FAMILIES, 30, assert_alike)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_table_says_how_an_answer_begins_and_ends(family: Family) -> None:
    row = chat(ask(), say(MARK))
    prompt, whole = render(family, row, [ask()], prompt=True), render(family, row, row["messages"])
    assert opening(prompt) == family.opens
    assert family.lead + MARK + family.end in whole
    tail = whole.split(MARK + family.end)[1]
    assert tail == "" or not family.end or tail[:1] in "\n <"
    if whole.startswith(prompt):
        assert (
            whole.removeprefix(prompt).removeprefix(EMPTY_THOUGHT).startswith(family.closes + family.lead + MARK + family.end)
        )
    else:
        assert family.name in {"qwq", "deepseek-r1", "counted", "command-r"}


# What the encoder learns


SENTENCEPIECE = tuple(BY_NAME[name] for name in ("llama-2", "mistral-v0.1", "mistral-v0.2", "mistral-v0.3", "gemma"))
PIECE_CASES = [
    pytest.param(family, row, id=f"{family.name}: {name}") for family in SENTENCEPIECE for name, row in cases_of(family).items()
]


@pytest.mark.parametrize(("family", "row"), CASES)
def test_each_turn_is_learnt_in_its_own_context(family: Family, row: Row) -> None:
    check(byte_tokenizer(family), family, row)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_turn_of_any_chat_is_learnt_in_its_own_context(family: Family) -> None:
    each_of((family,), 4, lambda family, row: check(byte_tokenizer(family), family, row))


@pytest.mark.parametrize(("family", "row"), PIECE_CASES)
def test_a_mark_before_the_first_word_changes_nothing(family: Family, row: Row) -> None:
    check(piece_tokenizer(family), family, row)


@pytest.mark.parametrize("family", SENTENCEPIECE, ids=lambda family: family.name)
def test_a_mark_before_the_first_word_changes_nothing_in_any_chat(family: Family) -> None:
    each_of((family,), 5, lambda family, row: check(piece_tokenizer(family), family, row))


REFUSED = {
    "gemma: system": ("gemma", chat(system(), ask(), say("a"))),
    "gemma: answer first": ("gemma", chat(say("a"), ask(), say("a"))),
    "gemma-3: in a row": ("gemma-3", chat(ask(), say("a"), say("a"))),
    "mistral-v0.1: system": ("mistral-v0.1", chat(system(), ask(), say("a"))),
    "mistral-v0.2: in a row": ("mistral-v0.2", chat(ask(), say("a"), say("a"))),
    "mistral-v0.3: two questions": ("mistral-v0.3", chat(ask(), ask(), say("a"))),
    "mistral-nemo: an id too short": ("mistral-nemo", chat(ask(), call(), {**result(), "tool_call_id": "1"}, say("a"))),
    "llama-2: answer first": ("llama-2", chat(say("a"), ask(), say("a"))),
    "llama-3.1: two calls": ("llama-3.1", chat(ask(), say("", tool_calls=call()["tool_calls"] * 2), tools=TOOLS)),
    "qwen3.5: no question": ("qwen3.5", chat(system(), say("a"))),
    "hermes: a nameless result": ("hermes", chat(ask(), call(), {"role": "tool", "content": "1"}, say("a"), tools=TOOLS)),
    "command-r: in a row": ("command-r", chat(ask(), say("a"), say("a"))),
    "gpt-oss: a content and a thought": ("gpt-oss", chat(ask(), call("a", reasoning_content="b"), tools=TOOLS)),
}
REFUSED["mistral-nemo: an id too short"][1]["messages"][1]["tool_calls"][0]["id"] = "1"


@pytest.mark.parametrize(("name", "row"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_its_template_rejects_is_named(name: str, row: Row) -> None:
    family = BY_NAME[name]
    with pytest.raises(TemplateError):
        render(family, row, row["messages"])
    with pytest.raises(InputError, match="row 7"):
        Encoder(byte_tokenizer(family), "assistant", family.template).encode(row, "row 7")


@pytest.mark.parametrize("messages", [[ask(), say(" the answer ")], [system(), ask(" a "), say("山 🙂\n")]])
def test_what_generation_markers_mark_is_kept(messages: list[Message]) -> None:
    family = BY_NAME["marked"]
    tokenizer = byte_tokenizer(family)
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (part,) = encoded(tokenizer, family, chat(*messages)).parts()
    size = len(part.ids)
    assert marked["input_ids"][:size] == part.ids
    assert marked["assistant_masks"][:size] == [int(flag) for flag in part.loss_mask]
    assert sum(marked["assistant_masks"]) == sum(part.loss_mask) > 0


# Learnt texts, word for word


HI, BYE = ask("Hi"), ask("Bye")
QWEN_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
QWEN_BYE = "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"


def learnt(name: str, *messages: Message, **more: Any) -> list[tuple[str, str]]:
    return sorted(pairs(BY_NAME[name], chat(*messages, **more)))


def test_qwen3_learns_the_thought_and_then_forgets_it() -> None:
    assert learnt("qwen3", HI, say("<think>\nHm.\n</think>\n\nHello."), BYE, say("Bye. ")) == [
        (QWEN_HI, "<think>\nHm.\n</think>\n\nHello.<|im_end|>"),
        (QWEN_HI + "Hello." + QWEN_BYE, "Bye. <|im_end|>"),
    ]


def test_qwen3_does_not_learn_the_empty_thought_that_its_template_puts_in() -> None:
    assert learnt("qwen3", HI, say("Hello."), BYE, say("Bye.")) == [
        (QWEN_HI, "Hello.<|im_end|>"),
        (QWEN_HI + "Hello." + QWEN_BYE, "Bye.<|im_end|>"),
    ]
    empty = "<think>\n\n</think>\n\n"
    assert learnt("qwen3", HI, say("Hello."), chat_template_kwargs={"enable_thinking": False}) == [
        (QWEN_HI + empty, "Hello.<|im_end|>")
    ]


def test_qwen3_learns_reasoning_that_stands_apart() -> None:
    assert learnt("qwen3", HI, say("Hello.", reasoning_content="Hm.")) == [
        (QWEN_HI, "<think>\nHm.\n</think>\n\nHello.<|im_end|>")
    ]


def test_qwen3_learns_a_call_without_an_empty_thought() -> None:
    ((context, text),) = learnt("qwen3", system(), HI, call(), tools=TOOLS)
    assert context.endswith("<|im_end|>\n" + QWEN_HI)
    assert text == '<tool_call>\n{"name": "height", "arguments": {"name": "Mönch"}}\n</tool_call><|im_end|>'


def test_qwen35_closes_the_thought_that_its_prompt_opens() -> None:
    prompt = QWEN_HI + "<think>\n"
    assert learnt("qwen3.5", HI, say("Hello.")) == [(prompt, "\n</think>\n\nHello.<|im_end|>")]
    assert learnt("qwen3.5", HI, say("<think>\nHm.\n</think>\n\nHello.")) == [(prompt, "Hm.\n</think>\n\nHello.<|im_end|>")]
    assert learnt("qwen3.5", HI, say("Hm.\n</think>\n\nHello.")) == [(prompt, "Hm.\n</think>\n\nHello.<|im_end|>")]


def test_qwen35_learns_a_thought_that_was_cut_off() -> None:
    assert learnt("qwen3.5", HI, say("<think>\nHm, a"), finish="length") == [(QWEN_HI + "<think>\n", "Hm, a")]


def test_mistral_v03_learns_each_turn_with_the_system_text_before_it() -> None:
    assert learnt("mistral-v0.3", system(), HI, say("Hello. "), BYE, say("Bye.")) == [
        ("<s>[INST] Be brief.\n\nHi[/INST]", " Hello. </s>"),
        ("<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye[/INST]", " Bye.</s>"),
    ]


def test_mistral_v03_learns_a_call() -> None:
    ((context, text),) = learnt("mistral-v0.3", HI, call(), tools=TOOLS)
    assert context.startswith("<s>[AVAILABLE_TOOLS] [{")
    assert context.endswith("}][/AVAILABLE_TOOLS][INST] Hi[/INST]")
    assert text == '[TOOL_CALLS] [{"name": "height", "arguments": {"name": "Mönch"}, "id": "call12345"}]</s>'


def test_qwen25_learns_a_call() -> None:
    ((context, text),) = learnt("qwen2.5", HI, call("A moment."), tools=TOOLS)
    assert context.startswith("<|im_start|>system\nYou are Q, an assistant.\n\n# Tools\n<tools>\n{")
    assert context.endswith("<|im_end|>\n" + QWEN_HI)
    assert text == 'A moment.\n<tool_call>\n{"name": "height", "arguments": {"name": "Mönch"}}\n</tool_call><|im_end|>'


def test_deepseek_r1_opens_the_thought_once() -> None:
    first = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    assert learnt("deepseek-r1", HI, say("<think>\nHm.\n</think>\n\nHello."), BYE, say("<think>Hm.</think>Bye.")) == [
        (
            first + "\n\nHello.<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜><think>\n",
            "Hm.</think>Bye.<｜end▁of▁sentence｜>",
        ),
        (first + "<think>\n", "Hm.\n</think>\n\nHello.<｜end▁of▁sentence｜>"),
    ]


def test_deepseek_r1_learns_an_answer_without_a_thought_as_it_was_written() -> None:
    prompt = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
    assert learnt("deepseek-r1", HI, say("Hello.")) == [(prompt, "Hello.<｜end▁of▁sentence｜>")]


def test_llama31_does_not_learn_the_system_text_before_a_leading_answer() -> None:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    first = (
        "<|begin_of_text|>" + head.format("system") + "Knowledge until: December 2023\nToday: 26 Jul 2024\n\n<|eot_id|>"
        + head.format("assistant")
    )  # fmt: skip
    second = first + "Welcome!<|eot_id|>" + head.format("user") + "Hi<|eot_id|>" + head.format("assistant")
    assert learnt("llama-3.1", say("Welcome!"), HI, say("Hello.")) == [
        (first, "Welcome!<|eot_id|>"),
        (second, "Hello.<|eot_id|>"),
    ]


def test_phi3_does_not_learn_what_its_template_writes_after_the_end() -> None:
    first = "<s><|user|>\nHi<|end|>\n<|assistant|>\n"
    second = first + "Hello.<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n"
    assert learnt("phi-3", HI, say("Hello."), BYE, say("Bye.")) == [(first, "Hello.<|end|>"), (second, "Bye.<|end|>")]
    (part,) = encoded(byte_tokenizer(BY_NAME["phi-3"]), BY_NAME["phi-3"], chat(HI, say("Hello."), BYE, say("Bye."))).parts()
    assert text_of(byte_tokenizer(BY_NAME["phi-3"]), part.ids) == second + "Bye.<|end|>\n"


def test_gpt_oss_learns_its_channels_and_returns() -> None:
    row = chat(HI, say("Hello."), BYE, say("Bye.", reasoning_content="Hm."))
    (first, one), (second, two) = sorted(pairs(BY_NAME["gpt-oss"], row), key=lambda pair: len(pair[0]))
    assert first.endswith("<|start|>user<|message|>Hi<|end|><|start|>assistant")
    assert one == "<|channel|>final<|message|>Hello.<|return|>"
    assert second == (
        first + "<|channel|>final<|message|>Hello.<|end|><|start|>user<|message|>Bye<|end|><|start|>assistant"
    )  # fmt: skip
    assert two == "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Bye.<|return|>"


def test_gpt_oss_learns_a_call() -> None:
    ((_, text),) = learnt("gpt-oss", HI, call(reasoning_content="Hm."), tools=TOOLS)
    assert text == (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.height<|channel|>commentary json<|message|>"
        '{"name": "Mönch"}<|call|>'
    )


@pytest.mark.parametrize(
    ("name", "sequences"),
    [("chatml", 1), ("qwen3", 1), ("qwen3.5", 2), ("llama-2", 1), ("mistral-v0.3", 1), ("gpt-oss", 2), ("counted", 2)],
)
def test_turns_share_a_sequence_where_they_can(name: str, sequences: int) -> None:
    family = BY_NAME[name]
    row = chat(HI, say("Hello."), BYE, say("Bye."))
    assert len(encoded(byte_tokenizer(family), family, row).parts()) == sequences


def test_an_answer_that_was_cut_off_has_no_end() -> None:
    assert learnt("chatml", HI, say("Hello. "), finish="length") == [(QWEN_HI, "Hello. ")]
    assert learnt("chatml", HI, say("Hello."), BYE, say("By"), finish="length") == [
        (QWEN_HI, "Hello.<|im_end|>"),
        (QWEN_HI + "Hello." + QWEN_BYE, "By"),
    ]


def test_a_last_question_is_left_out() -> None:
    assert learnt("chatml", HI, say("Hello."), BYE) == [(QWEN_HI, "Hello.<|im_end|>")]
