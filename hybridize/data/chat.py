"""Renders conversations with a chat template: the prompt before each answer, and the text that the
model would generate after it.

A template may render a turn differently once something follows it (reasoning is dropped, a system
text moves). Each answer is therefore rendered as the last message, after exactly the prompt that a
server would give to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.data.forms import REASONING, Conversation, Message
from hybridize.errors import InputError, first_line, setting

PROBE = "Qx7probeZ4"  # replaces an answer's text, to find what the template writes around it
_OPENED = re.compile(r"<([\w:.-]*(?:think|thought|reason)[\w:.-]*)>\s*\Z", re.IGNORECASE)  # such as <think> at a prompt's end
_EMPTY_BLOCK = re.compile(r"<([\w:.-]+)>\s*</\1>")
_TEXT_MARK = re.compile(r"\s*<[|/]?[\w|\u2581\uff5c-]+\|?>")  # such as <|im_end|>, if it is not a token
_NEAR = 6  # characters at a prompt's end that suffice to recognise its place
_HALF_MARK = re.compile(r"<[^<>\s]*\Z")


@dataclass(frozen=True)
class Turn:
    """One answer: the model reads `prompt` and generates `text`, which includes the template's end
    token(s), if any.

    ending: the part of `text` that ends the answer; after: the line break that the template adds
    after it. lost: text of the row that the template does not render. unclosed: the prompt opens a
    block such as <think> that the answer does not close.
    """

    prompt: str
    text: str
    ending: str
    after: str = ""
    lost: str = ""
    unclosed: bool = False


class ChatTemplate:
    """A tokenizer's chat template, or the Jinja text `template` instead.

    Of named templates (a dict) one is chosen as in transformers: `tool_use` if it exists and the
    row has tools, else `default`.
    """

    def __init__(self, tokenizer: Any, template: str | dict[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or getattr(tokenizer, "chat_template", None)
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        marks = sorted({mark for mark in added | set(tokenizer.all_special_tokens) if mark.strip()}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._parts: dict[str, bool] = {}

    def prompt(self, conversation: Conversation, where: str) -> str:
        """The text that a model reads before it answers the conversation's last message."""
        return self._render(conversation, conversation.messages, where, prompt=True)

    def whole(self, conversation: Conversation, where: str) -> str:
        """The whole conversation as text, without a generation prompt."""
        return self._render(conversation, conversation.messages, where)

    def joined(self, conversation: Conversation, where: str) -> str | None:
        """The whole conversation as text, if it has every answer unchanged directly after its
        prompt; else None."""
        whole = self.whole(conversation, where)
        for at, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                content = message.get("content")
                if not at or not _is_plain(message) or not isinstance(content, str) or not content.strip():
                    return None
                prompt = self._render(conversation, conversation.messages[:at], where, prompt=True)
                text = whole[len(prompt) :]
                if not whole.startswith(prompt) or not text.lstrip().startswith(content.lstrip()) or content not in text:
                    return None
        return whole

    def turns(self, conversation: Conversation, where: str) -> list[Turn]:
        """All answers of the conversation, in order. InputError if the template rejects it or does
        not render an answer exactly once."""
        messages = conversation.messages
        return [self._turn(conversation, at, where) for at, one in enumerate(messages) if one["role"] == "assistant"]

    def _turn(self, conversation: Conversation, at: int, where: str) -> Turn:
        before, message = conversation.messages[:at], conversation.messages[at]
        probed = self._render(conversation, [*before, _probe(message)], where)
        place = probed.rfind(PROBE)
        if probed.count(PROBE) > 1:
            raise InputError(f"{where}: the chat template renders an answer {probed.count(PROBE)} times; it must do so once")
        if place < 0:
            raise InputError(f"{where}: no token of this row has a loss: the chat template does not render its answers")
        around, tail = probed[:place], probed[place + len(PROBE) :]
        prompt = self._render(conversation, before, where, prompt=True) if before else around
        lead, lost = self._before_text(conversation, at, around, prompt, where), ""
        if _is_plain(message):
            content = message.get("content", "")
            text, ending, after = _lead(lead, prompt, content) + content, *self._split(conversation, at, tail, where)
        else:
            (text, ending, after), lost = self._composed(conversation, at, prompt, (around, lead, tail), where)
        text = _continued(prompt, text)
        opened = _OPENED.search(prompt)
        unclosed = opened is not None and f"</{opened[1]}>" not in text
        if conversation.cut and at == len(conversation.messages) - 1:
            text, ending, after, unclosed = _until_cut(text, message), "", "", False
        return Turn(prompt, text + ending, ending, after[: len(after) - len(after.lstrip())], lost, unclosed)

    def _before_text(self, conversation: Conversation, at: int, around: str, prompt: str, where: str) -> str:
        """What the template writes between its prompt and a plain answer's text; around: everything
        that it writes before the text."""
        if around.startswith(prompt):
            return around[len(prompt) :]
        # The template renders what precedes a finished answer differently: the answer's place is
        # found by the generation prompt, if there is one.
        question = self._render(conversation, conversation.messages[:at], where)
        header = prompt[len(question) :] if prompt.startswith(question) else ""
        if header.strip():
            place = around.rfind(header)
            return around[place + len(header) :] if place >= 0 else ""
        text = around.rstrip()
        return around[len(text) :] if _same_end(text, prompt) >= _NEAR else ""

    def _split(self, conversation: Conversation, at: int, tail: str, where: str) -> tuple[str, str]:
        """Splits what the template writes after an answer's text (`tail`) into the part that ends
        the answer and the rest, for example a line break.

        The ending is the first special token; if others follow directly, it extends to the
        tokenizer's own end token, if that is among them, since the text after a finished chat may
        begin with special tokens, too. Without a special token the ending is a mark in the text, or
        the lines that are also there when a question follows.
        """
        found = self._marks.search(tail) if self._marks else None
        if found is None:
            if mark := _TEXT_MARK.match(tail):
                end = mark.end()
            else:
                end = self._as_before_a_question(conversation, at, tail, where) if tail.strip() else len(tail)
            return tail[:end], tail[end:]
        end, last = found.end(), self.tokenizer.eos_token
        while last and last in self._run(tail, end) and not tail[:end].endswith(last):
            end += len(self._marks.match(tail, end)[0])  # type: ignore[union-attr, index]
        return tail[:end], tail[end:]

    def _as_before_a_question(self, conversation: Conversation, at: int, tail: str, where: str) -> int:
        """How many characters of `tail`, in whole lines, also follow an answer in the middle of a
        chat."""
        question = {"role": "user", "content": "Why?"}
        messages = [*conversation.messages[:at], _probe(conversation.messages[at]), question]
        try:
            other = self._render(conversation, messages, where).rsplit(PROBE, 1)[-1]
        except InputError:  # the template rejects a question there
            return len(tail)
        same = tail[: _shared(tail, other)]
        return same.rfind("\n") + 1 or len(same) - len(same.lstrip())

    def _run(self, text: str, begin: int) -> list[str]:
        """The consecutive special tokens from `begin` on."""
        found: list[str] = []
        while self._marks and (mark := self._marks.match(text, begin)):
            found.append(mark[0])
            begin = mark.end()
        return found

    def _composed(
        self, conversation: Conversation, at: int, prompt: str, plain: tuple[str, str, str], where: str
    ) -> tuple[tuple[str, str, str], str]:
        """An answer with reasoning, tool calls or several parts, as the template renders it: (text,
        ending, what follows), and the text of the row that the template omits.

        plain: what the template writes for a plain answer in its place: before its text, between
        prompt and text, and after the text.
        """
        message, (around, lead, tail) = conversation.messages[at], plain
        rendered = self._render(conversation, conversation.messages[: at + 1], where)
        if rendered.startswith(prompt):
            begin = len(prompt)
        else:  # what precedes a finished answer is rendered differently: the probe shows where the answer begins
            begin = min(_shared(around, rendered), len(around) - len(lead))
            if half := _HALF_MARK.search(rendered[:begin]):
                begin = half.start()
        body = rendered[begin:]
        if tail and body.endswith(tail):
            text, (ending, after) = body.removesuffix(tail), self._split(conversation, at, tail, where)
        else:
            text, ending, after = self._last_marks(body)
        if lead and text.startswith(lead):
            rest = text.removeprefix(lead)
            text = _lead(lead, prompt, rest) + rest
        thought, source = message.get(REASONING[0], ""), self._source(conversation)
        if thought.strip() and thought.strip() not in text and "</think>" in source and not message.get("tool_calls"):
            written = _joined(message.get("content", ""))
            text, thought = f"<think>\n{thought.strip()}\n</think>\n\n{written}", ""  # the block that the template removes
        return (text, ending, after), _lost(text, thought, _texts(message), message.get("tool_calls", ()))

    def _last_marks(self, body: str) -> tuple[str, str, str]:
        """Splits `body` into the text before its last special token, that token, and the white
        space after it. Everything is text if it does not end with a special token."""
        text = body.rstrip()
        marks = list(self._marks.finditer(text)) if self._marks else []
        if not marks or marks[-1].end() < len(text):
            return body, "", ""
        return text[: marks[-1].start()], marks[-1][0], body[len(text) :]

    def _source(self, conversation: Conversation) -> str:
        if not isinstance(self.template, dict):
            return self.template or ""
        name = "tool_use" if conversation.kwargs.get("tools") and "tool_use" in self.template else "default"
        return self.template.get(name, "")

    def _render(self, conversation: Conversation, messages: Sequence[Message], where: str, prompt: bool = False) -> str:
        if self.template is None:
            raise InputError(f"{where} is a chat, but the tokenizer has no chat template; give {setting('chat_template')} FILE")
        source = self._source(conversation)
        if not source:
            raise InputError(f"{where}: the tokenizer has templates {', '.join(self.template)} but none is called 'default'")
        failed: Exception | None = None
        printed: str | None = None
        for form in self._forms(messages, source):
            try:
                text: str = self.tokenizer.apply_chat_template(
                    form, chat_template=source, tokenize=False, add_generation_prompt=prompt, **conversation.kwargs
                )
            except Exception as error:  # Jinja's own errors and the template's raise_exception
                failed = failed or error
                continue
            if not _prints_python(text, form):
                return text
            printed = printed or text
        if printed is not None:
            return printed
        assert failed is not None
        raise InputError(f"{where}: the chat template rejects it: {first_line(failed)}") from failed

    def _forms(self, messages: Sequence[Message], source: str) -> Iterable[list[Message]]:
        """The messages as most templates expect them, then as older ones do: with an empty content
        instead of none, and with the arguments of tool calls as JSON text."""
        listed = any(isinstance(message.get("content"), list) for message in messages)
        joins = listed and not self._reads_parts(source)
        first = [{**m, "content": _joined(m["content"])} if joins and "content" in m else m for m in messages]
        yield first
        if any("tool_calls" in message for message in messages):
            yield [{"content": "", **message} for message in first]
            yield [_with_text_arguments(message) for message in first]
            yield [{"content": "", **_with_text_arguments(message)} for message in first]

    def _reads_parts(self, source: str) -> bool:
        """Whether the template accepts a message's content as a list of parts; others print the
        list."""
        if source not in self._parts:
            try:
                shown = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": [{"type": "text", "text": PROBE}]}], chat_template=source, tokenize=False
                )
            except Exception:  # a template that rejects a list may raise anything
                shown = ""
            self._parts[source] = PROBE in shown and "'text'" not in shown and '"text"' not in shown
        return self._parts[source]


def _probe(message: Message) -> Message:
    return {"role": "assistant", "content": PROBE, **({"name": message["name"]} if "name" in message else {})}


def _is_plain(message: Message) -> bool:
    return "tool_calls" not in message and REASONING[0] not in message and isinstance(message.get("content"), str)


def _lead(lead: str, prompt: str, content: str) -> str:
    """The part of `lead` that belongs to the answer: all of it or nothing.

    An empty block of reasoning was not generated and is omitted. A mark that closes a block opened
    by the prompt stays, unless the answer continues the block or closes it itself.
    """
    opened = _OPENED.search(prompt)
    thinks = opened and (f"</{opened[1]}>" in content or content.lstrip().startswith(f"<{opened[1]}>"))
    return "" if thinks or _EMPTY_BLOCK.search(lead) else lead


def _continued(prompt: str, text: str) -> str:
    """`text` without an opening mark such as <think> that the prompt already ends with."""
    opened = _OPENED.search(prompt)
    if opened is None or not text.lstrip().startswith(f"<{opened[1]}>"):
        return text
    size = len(opened[1]) + 2
    rest, space = text.lstrip()[size:], prompt[opened.start() + size :]
    return rest[_shared(rest, space) :]


def _until_cut(text: str, message: Message) -> str:
    """A cut answer of several parts, up to the end of the last text that was generated."""
    if _is_plain(message) or "tool_calls" in message:
        return text
    last = next((part for part in reversed(_texts(message)) if part), message.get(REASONING[0], ""))
    for written in (last, last.strip()):
        if written and written in text:
            return text[: text.rfind(written) + len(written)]
    return text


def _lost(text: str, thought: str, contents: Sequence[str], calls: Sequence[dict[str, Any]]) -> str:
    """The parts of an answer that `text` lacks: reasoning, content, tool calls."""
    thought, contents = thought.strip(), [part.strip() for part in contents]
    begin = text.find(thought) + len(thought) if thought in text else 0
    missing = [part for part in contents if part not in text]
    if thought and (thought not in text or any(part in text and part not in text[begin:] for part in contents)):
        missing.insert(0, thought)  # also if it only occurs inside the content
    for call in calls:
        function = _function(call)
        values = list(_values(function.get("arguments")))
        if any(value not in text for value in (str(function.get("name", "")), *values)):
            missing.append(json.dumps(function, ensure_ascii=False, default=str))
    return "\n".join(missing)


def _values(value: Any) -> Iterable[str]:
    """The keys, words and integers in a call's arguments, as JSON writes them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield str(key)
            yield from _values(part)
    elif isinstance(value, list):
        for part in value:
            yield from _values(part)
    elif isinstance(value, str):
        yield from (word for word in value.split() if word.isalnum() and word.isascii())
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _prints_python(text: str, messages: Sequence[Message]) -> bool:
    """Whether a template printed a call's arguments in Python's notation instead of JSON."""
    arguments = [_function(call).get("arguments") for message in messages for call in message.get("tool_calls", ())]
    return any(isinstance(one, dict) and one and str(one) in text and str(one) != json.dumps(one) for one in arguments)


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _same_end(one: str, other: str) -> int:
    """Length of the common suffix."""
    return _shared(one[::-1], other[::-1])


def _texts(message: Message) -> list[str]:
    """The content of a message, part by part."""
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _joined(content: Any) -> str:
    """Several text parts joined by line breaks, as servers do for templates that accept no lists."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        value = function.get("arguments")
        function = {**function, "arguments": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else {**call, **function})
    return {**message, "tool_calls": calls}
