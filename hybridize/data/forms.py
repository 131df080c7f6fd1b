"""The forms in which people keep training rows, and the three forms that the rest of the program
knows.

A row becomes a `Conversation` (chat messages), a `Pair` (prompt and response) or a `Plain` text.
Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hybridize.errors import InputError

Message = dict[str, Any]
ROLES = {  # ShareGPT's names of who speaks, and the roles of chat templates
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # what servers call the reasoning beside an answer
WRITTEN_BY_GENERATE = frozenset({"tokens", "row", "sample"})  # what `generate` notes about its answers
CONTEXT = ("tools", "documents", "chat_template_kwargs")  # what of a row its chat template reads beside the messages
LOSS_WEIGHTS = ("weight", "train")  # a message's share of the loss in other tools, which is not read here
READ = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "from", "value", *REASONING}  # of a message
CUT = ("length", "max_tokens", "max_length")  # what servers call an answer that reached its length


@dataclass(frozen=True)
class Conversation:
    """Chat messages as templates take them: no key without a value; `content` a text, a list of
    text parts, or missing.

    kwargs: what the row gives the chat template besides (`tools`, `documents`,
    `chat_template_kwargs`). generated: a model wrote the last answer, which ends where it ended.
    cut: it reached its length without an end. written: its token ids, where its text does not give
    them back.
    """

    messages: list[Message]
    kwargs: dict[str, Any] = field(default_factory=dict)
    generated: bool = False
    cut: bool = False
    written: list[int] | None = None

    @property
    def question(self) -> Conversation:
        """Up to where the assistant is to speak: without a last answer."""
        messages = self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages
        return Conversation(messages, self.kwargs)


@dataclass(frozen=True)
class Pair:
    """A prompt and its response; `system` stands before them. generated, cut, written: see
    Conversation."""

    prompt: str
    response: str
    system: str | None = None
    generated: bool = False
    cut: bool = False
    written: list[int] | None = None

    @property
    def before(self) -> str:
        """What stands before the response without a chat template."""
        return f"{self.system}\n{self.prompt}" if self.system else self.prompt

    def as_chat(self) -> Conversation:
        """The same as chat messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]
        return Conversation(messages, {}, self.generated, self.cut, self.written)


@dataclass(frozen=True)
class Plain:
    """A document."""

    text: str


def read_form(row: Any, where: str) -> tuple[Conversation | Pair | Plain, frozenset[str]]:
    """What the row called `where` says, and those of its keys that are not read. InputError naming
    the row where it has no known form or lacks something to learn from.

    Known: `messages`; ShareGPT's `conversations`; `prompt` with `response` or `completion`;
    Alpaca's `instruction`, `input` and `output`; `text`. A key with the value null counts as
    missing.
    """
    given = _given(row, where)
    form: Conversation | Pair | Plain | None
    form, read = _conversation(given, where)
    if form is None:
        form, read = _pair(given, where)
    if form is None:
        form, read = _plain(given, where), {"text"}
    if isinstance(form, Conversation):
        _check_answers(form, where)
    elif isinstance(form, Pair) and not form.response:
        raise InputError(f"{where}: the response is empty")
    return form, _unread(given, read)


def read_question(row: Any, where: str) -> Conversation | Pair | str:
    """What is to be answered in the row called `where`: chat messages less a last answer, or a
    prompt, a pair where there is a system text to it.

    InputError naming the row where there is nothing to answer.
    """
    given = _given(row, where)
    form, _ = _conversation(given, where)
    if form is not None:
        if not form.question.messages:
            raise InputError(f"{where}: there is no message before the assistant's")
        return form.question
    prompt, system = _prompt(given, where), _text(given, "system", where)
    if not prompt:
        raise InputError(f"{where} has neither `messages` nor a `prompt` with text")
    return Pair(prompt, "", system) if system else prompt


def check_row(row: Any, where: str) -> None:
    """InputError naming the row unless it has a known form with something to learn from; see
    read_form."""
    read_form(row, where)


def check_prompt(row: Any, where: str) -> None:
    """InputError naming the row unless there is something to answer; see read_question."""
    read_question(row, where)


def _given(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object")
    return {key: value for key, value in row.items() if value is not None}


def _unread(given: dict[str, Any], read: set[str]) -> frozenset[str]:
    known = read | WRITTEN_BY_GENERATE | {"finish", "finish_reason", "token_ids"}
    lists = [name for name in ("messages", "conversations", "prompt", "completion") if isinstance(given.get(name), list)]
    inside = {
        f"{name}[].{key}" for name in lists for message in given[name] if isinstance(message, dict)
        for key, value in message.items() if key not in READ and value is not None
    }  # fmt: skip
    return frozenset(given.keys() - known) | inside


def _conversation(given: dict[str, Any], where: str) -> tuple[Conversation | None, set[str]]:
    """Of a row with `messages`, `conversations`, or lists of messages as `prompt` and `completion`;
    None for others."""
    read = set(CONTEXT)
    if "messages" in given:
        messages, read = _messages(given["messages"], "messages", where), read | {"messages"}
    elif "conversations" in given:
        messages, read = _sharegpt(given["conversations"], where), read | {"conversations", "system"}
        system = _text(given, "system", where)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    elif isinstance(given.get("prompt"), list):
        messages, read = _messages(given["prompt"], "prompt", where), read | {"prompt", "completion"}
        if "completion" in given:
            said = given["completion"]
            said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
            messages = messages + _messages(said, "completion", where)
    else:
        return None, set()
    kwargs = {key: value for key in ("tools", "documents") if (value := _listed(given, key, where))}
    asked = _parsed(given.get("chat_template_kwargs", {}))
    if not isinstance(asked, dict):
        raise InputError(f"{where}: `chat_template_kwargs` must be an object")
    return Conversation(messages, kwargs | asked, *_generated(given, where)), read


def _pair(given: dict[str, Any], where: str) -> tuple[Pair | None, set[str]]:
    """Of a row with `prompt` or `instruction`; None for others."""
    if "instruction" in given or "output" in given:
        names = ("instruction", "output")
    elif "prompt" in given or "response" in given or "completion" in given:
        names = ("prompt", "completion" if "completion" in given and "response" not in given else "response")
    else:
        return None, set()
    if not all(isinstance(given.get(name), str) for name in names):
        raise InputError(f"{where}: `{names[0]}` and `{names[1]}` must both be there, as text")
    system = _text(given, "system", where)
    pair = Pair(_prompt(given, where) or "", given[names[1]], system, *_generated(given, where))
    return pair, {*names, "system", *(("input",) if names[0] == "instruction" else ())}


def _prompt(given: dict[str, Any], where: str) -> str | None:
    """The question of a pair. Alpaca's `input` follows its `instruction` on a line of its own."""
    if "instruction" not in given:
        return _text(given, "prompt", where)
    return "\n".join(part for key in ("instruction", "input") if (part := _text(given, key, where)))


def _plain(given: dict[str, Any], where: str) -> Plain:
    if not isinstance(given.get("text"), str):
        raise InputError(
            f"{where} has neither `messages` (or `conversations`), nor `prompt` and `response` (or `instruction` and "
            "`output`), nor `text`"
        )
    if not given["text"]:
        raise InputError(f"{where}: the text is empty")
    return Plain(given["text"])


def _text(given: dict[str, Any], key: str, where: str) -> str | None:
    value = given.get(key)
    if not isinstance(value, str | None):
        raise InputError(f"{where}: `{key}` must be text")
    return value


def _parsed(value: Any) -> Any:
    """A JSON text as what it says: tables with typed columns keep schemas so."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _listed(given: dict[str, Any], key: str, where: str) -> list[Any] | None:
    value = _parsed(given.get(key) or [])
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise InputError(f"{where}: `{key}` must be a list of objects")
    return value or None


def _generated(given: dict[str, Any], where: str) -> tuple[bool, bool, list[int] | None]:
    """What `generate` says of an answer: that there is one, that it was cut, and its token ids."""
    finish, ids = given.get("finish", given.get("finish_reason")), given.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise InputError(f"{where}: `token_ids` must be a list of token ids")
    return finish is not None, finish in CUT, ids


def _messages(value: Any, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{key}` must be a list with at least one message")
    return [_message(message, where) for message in value]


def _message(value: Any, where: str) -> Message:
    """One message without keys that say nothing; reasoning under all the names that templates know
    it by."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
    message = {key: part for key, part in value.items() if _is_json(part) and key not in LOSS_WEIGHTS}
    if isinstance(message.get("function_call"), dict) and "tool_calls" not in message:  # as OpenAI had it before tools
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        message["content"] = [_part(part, where) for part in content]
    elif not isinstance(content, str | None):
        raise InputError(f"{where}: the `content` of a message must be text or a list of text parts")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise InputError(f"{where}: `tool_calls` must be a list of objects")
        message["tool_calls"] = [_call(call) for call in calls]
        if not calls:
            del message["tool_calls"]
    thoughts = [message[key] for key in REASONING if message.get(key)]
    thought = thoughts[0] if thoughts else None
    if not isinstance(thought, str | None) or any(other != thought for other in thoughts):
        raise InputError(f"{where}: the reasoning of a message must be text, and one")
    for key in REASONING:
        message.pop(key, None)
    if thought is not None:
        message |= dict.fromkeys(REASONING, thought)
    if content is None and thought is None and "tool_calls" not in message:
        raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
    return message


def _is_json(value: Any) -> bool:
    """Whether a value says something that a template can be given: no null, and no date of a
    table's."""
    return isinstance(value, str | bool | int | float | list | dict)


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: a message has a part of type {kind!r}; only text can be learnt")
    return {"type": "text", "text": part["text"]}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, as templates and servers have them; OpenAI's files keep them as JSON
    text."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(_parsed(function.get("arguments")), dict):
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    if isinstance(_parsed(call.get("arguments")), dict):
        return {**call, "arguments": _parsed(call["arguments"])}
    return call


def _sharegpt(value: Any, where: str) -> list[Message]:
    """`from` and `value` of ShareGPT as roles and contents; some sets have `role` and `content`
    under the same name."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: `conversations` must be a list with at least one message")
    return [_message(turn if "from" not in turn else _sharegpt_turn(turn, where), where) for turn in value]


def _sharegpt_turn(turn: dict[str, Any], where: str) -> Message:
    speaker, said = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise InputError(f"{where}: nobody knows who {speaker!r} is in `conversations`; known: {', '.join(ROLES)}")
    if not isinstance(said, str):
        raise InputError(f"{where}: each turn of `conversations` needs a `from` and a `value`, both text")
    if speaker != "function_call":
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        return {**rest, "role": ROLES[speaker], "content": said}
    calls = _parsed(said)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise InputError(f"{where}: a function_call must be JSON with `name` and `arguments`")
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _check_answers(form: Conversation, where: str) -> None:
    answers = [message for message in form.messages if message["role"] == "assistant"]
    if not answers:
        raise InputError(f"{where}: there is no assistant message to learn from")
    if not any(message.get(key) for message in answers for key in ("content", "tool_calls", REASONING[0])):
        raise InputError(f"{where}: the assistant says nothing")
