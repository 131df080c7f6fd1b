"""What a chat template makes of a conversation: the prompt before each answer, and what the model
would write after it.

A template may render a turn otherwise once something follows it (reasoning is dropped, a system
text moves). So each answer is looked at as the last message, after exactly what a server would have
given to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.data.forms import REASONING, Conversation, Message
from hybridize.errors import InputError, first_line, setting

PROBE = "Qx7probeZ4"  # stands for an answer's text, to see what the template writes around it
_OPENED = re.compile(r"<([\w:.-]*(?:think|thought|reason)[\w:.-]*)>\s*\Z", re.IGNORECASE)  # as <think>, at a prompt's end
_EMPTY_BLOCK = re.compile(r"<([\w:.-]+)>\s*</\1>")
_TEXT_MARK = re.compile(r"\s*<[|/]?[\w|\u2581\uff5c-]+\|?>")  # as <|im_end|> where the tokenizer has no such token
_NEAR = 6  # characters of a prompt's end by which its place is known again
_HALF_MARK = re.compile(r"<[^<>\s]*\Z")


@dataclass(frozen=True)
class Turn:
    """One answer: the model reads `prompt` and writes `text`, which ends with the template's end
    token(s), if it has any.

    ending: the part of `text` that ends the answer; after: the line break that the template writes
    behind it. lost: what the row says and the template does not show. unclosed: the prompt opens a
    block, as <think>, which the answer leaves open.
    """

    prompt: str
    text: str
    ending: str
    after: str = ""
    lost: str = ""
    unclosed: bool = False


class ChatTemplate:
    """A tokenizer's chat template, or `template`, a Jinja text in its place.

    Named templates (a dict) are chosen between as transformers does: `tool_use` where a row has
    tools and there is one, else `default`.
    """

    def __init__(self, tokenizer: Any, template: str | dict[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or getattr(tokenizer, "chat_template", None)
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        marks = sorted({mark for mark in added | set(tokenizer.all_special_tokens) if mark.strip()}, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._parts: dict[str, bool] = {}

    def prompt(self, conversation: Conversation, where: str) -> str:
        """What a model reads before it answers the conversation's last message."""
        return self._render(conversation, conversation.messages, where, prompt=True)

    def whole(self, conversation: Conversation, where: str) -> str:
        """The finished conversation."""
        return self._render(conversation, conversation.messages, where)

    def joined(self, conversation: Conversation, where: str) -> str | None:
        """The finished conversation, if every answer stands in it as it was written, right after
        its prompt."""
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
        """Every answer of the conversation, in order. InputError where the template rejects it or
        never shows an answer."""
        messages = conversation.messages
        return [self._turn(conversation, at, where) for at, one in enumerate(messages) if one["role"] == "assistant"]

    def _turn(self, conversation: Conversation, at: int, where: str) -> Turn:
        before, message = conversation.messages[:at], conversation.messages[at]
        probed = self._render(conversation, [*before, _probe(message)], where)
        place = probed.rfind(PROBE)
        if probed.count(PROBE) > 1:
            raise InputError(
                f"{where}: the chat template shows an answer {probed.count(PROBE)} times; which of them is written?"
            )
        if place < 0:
            raise InputError(f"{where}: the loss mask keeps no token of this row: the chat template does not show its answers")
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
        """What the template writes between its prompt and a plain answer's text; `around`: all that
        it writes before that."""
        if around.startswith(prompt):
            return around[len(prompt) :]
        # it writes otherwise what precedes a finished answer: the place is known by the generation
        # prompt, if there is one
        asked = self._render(conversation, conversation.messages[:at], where)
        header = prompt[len(asked) :] if prompt.startswith(asked) else ""
        if header.strip():
            place = around.rfind(header)
            return around[place + len(header) :] if place >= 0 else ""
        text = around.rstrip()
        return around[len(text) :] if _same_end(text, prompt) >= _NEAR else ""

    def _split(self, conversation: Conversation, at: int, tail: str, where: str) -> tuple[str, str]:
        """What the template writes after an answer's text: what ends the answer, and what follows,
        as a line break.

        The end is the first special token; where others follow at once, all up to the tokenizer's
        own end token, if that is among them: what follows a finished chat may begin with special
        tokens, too. Without one it is a mark in the text, or the lines that stand there also when a
        question follows.
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
        """How much of `tail` stands behind an answer in the middle of a chat, too, in whole lines."""
        question = {"role": "user", "content": "Why?"}
        messages = [*conversation.messages[:at], _probe(conversation.messages[at]), question]
        try:
            other = self._render(conversation, messages, where).rsplit(PROBE, 1)[-1]
        except InputError:  # a template that takes no question there
            return len(tail)
        same = tail[: _shared(tail, other)]
        return same.rfind("\n") + 1 or len(same) - len(same.lstrip())

    def _run(self, text: str, begin: int) -> list[str]:
        """The special tokens that follow one another from `begin` on."""
        found: list[str] = []
        while self._marks and (mark := self._marks.match(text, begin)):
            found.append(mark[0])
            begin = mark.end()
        return found

    def _composed(
        self, conversation: Conversation, at: int, prompt: str, plain: tuple[str, str, str], where: str
    ) -> tuple[tuple[str, str, str], str]:
        """An answer with reasoning, tool calls or several parts, as the template renders it: its
        text, ending, what follows.

        Also what of it the template leaves out. plain: what the template writes before and after a
        plain answer in its place, and between prompt and answer.
        """
        message, (around, lead, tail) = conversation.messages[at], plain
        rendered = self._render(conversation, conversation.messages[: at + 1], where)
        if rendered.startswith(prompt):
            begin = len(prompt)
        else:  # the template writes otherwise what precedes a finished answer: the probe shows where the answer begins
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
            text, thought = f"<think>\n{thought.strip()}\n</think>\n\n{written}", ""  # the block that the template cuts out
        return (text, ending, after), _lost(text, thought, _texts(message), message.get("tool_calls", ()))

    def _last_marks(self, body: str) -> tuple[str, str, str]:
        """`body` in three: the special token that it closes with, what stands before, and line
        breaks after it."""
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
        """The messages as most templates take them, then as older ones want them: no content is an
        empty one, and arguments of tool calls are JSON text."""
        listed = any(isinstance(message.get("content"), list) for message in messages)
        joins = listed and not self._reads_parts(source)
        first = [{**m, "content": _joined(m["content"])} if joins and "content" in m else m for m in messages]
        yield first
        if any("tool_calls" in message for message in messages):
            yield [{"content": "", **message} for message in first]
            yield [_with_text_arguments(message) for message in first]
            yield [{"content": "", **_with_text_arguments(message)} for message in first]

    def _reads_parts(self, source: str) -> bool:
        """Whether the template takes a message's content as a list of parts; others would print the
        list."""
        if source not in self._parts:
            try:
                shown = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": [{"type": "text", "text": PROBE}]}], chat_template=source, tokenize=False
                )
            except Exception:  # whatever the template has against a list
                shown = ""
            self._parts[source] = PROBE in shown and "'text'" not in shown and '"text"' not in shown
        return self._parts[source]


def _probe(message: Message) -> Message:
    return {"role": "assistant", "content": PROBE, **({"name": message["name"]} if "name" in message else {})}


def _is_plain(message: Message) -> bool:
    return "tool_calls" not in message and REASONING[0] not in message and isinstance(message.get("content"), str)


def _lead(lead: str, prompt: str, content: str) -> str:
    """What of `lead` the answer begins with.

    An empty block of reasoning is nobody's text and left out; what closes a block that the prompt
    has opened stays, unless the answer goes on with the block or closes it itself.
    """
    opened = _OPENED.search(prompt)
    thinks = opened and (f"</{opened[1]}>" in content or content.lstrip().startswith(f"<{opened[1]}>"))
    return "" if thinks or _EMPTY_BLOCK.search(lead) else lead


def _continued(prompt: str, text: str) -> str:
    """`text` without an opening mark, as <think>, that the prompt has written already."""
    opened = _OPENED.search(prompt)
    if opened is None or not text.lstrip().startswith(f"<{opened[1]}>"):
        return text
    size = len(opened[1]) + 2
    rest, space = text.lstrip()[size:], prompt[opened.start() + size :]
    return rest[_shared(rest, space) :]


def _until_cut(text: str, message: Message) -> str:
    """An answer of several parts up to the last thing that was written before it was cut."""
    if _is_plain(message) or "tool_calls" in message:
        return text
    last = next((part for part in reversed(_texts(message)) if part), message.get(REASONING[0], ""))
    for written in (last, last.strip()):
        if written and written in text:
            return text[: text.rfind(written) + len(written)]
    return text


def _lost(text: str, thought: str, contents: Sequence[str], calls: Sequence[dict[str, Any]]) -> str:
    """What of an answer's parts does not stand in `text`: reasoning, then content, then names and
    arguments of calls."""
    thought, contents = thought.strip(), [part.strip() for part in contents]
    begin = text.find(thought) + len(thought) if thought in text else 0
    missing = [part for part in contents if part not in text]
    if thought and (thought not in text or any(part in text and part not in text[begin:] for part in contents)):
        missing.insert(0, thought)  # or it stands in the content alone
    for call in calls:
        function = _function(call)
        values = list(_values(function.get("arguments")))
        if any(value not in text for value in (str(function.get("name", "")), *values)):
            missing.append(json.dumps(function, ensure_ascii=False, default=str))
    return "\n".join(missing)


def _values(value: Any) -> Iterable[str]:
    """The words and numbers in a call's arguments, as JSON writes them."""
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
    """Whether a template printed a call's arguments as Python has them, not JSON."""
    told = [_function(call).get("arguments") for message in messages for call in message.get("tool_calls", ())]
    return any(isinstance(one, dict) and one and str(one) in text and str(one) != json.dumps(one) for one in told)


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
    """Several text parts as one text, a line each, as servers hand them to templates that take no
    lists."""
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
        told = function.get("arguments")
        function = {**function, "arguments": told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else {**call, **function})
    return {**message, "tool_calls": calls}
