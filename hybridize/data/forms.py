"""Converts the common forms of training rows to the three forms that the rest of the program uses.

A row becomes a `Conversation` (chat messages), a `Pair` (prompt and response) or a `Plain` text.
Independent of tokenizers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hybridize.errors import InputError

Message = dict[str, Any]
ROLES = {  # ShareGPT's names of speakers -> the roles of chat templates
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "assistant": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # servers' names for the reasoning of an answer
WRITTEN_BY_GENERATE = frozenset({"tokens", "row", "sample", "correct"})  # keys that `generate` adds to its answers
CONTEXT = ("tools", "documents", "chat_template_kwargs")  # keys of a row that chat templates read besides the messages
LOSS_WEIGHTS = ("weight", "train")  # a message's weight in the loss in other tools, ignored here
READ = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "from", "value", *REASONING}  # of a message
CUT = ("length", "max_tokens", "max_length")  # servers' finish reasons for an answer that reached the maximum length


@dataclass(frozen=True)
class Conversation:
    """Chat messages as templates expect them: no key with the value null; `content` is a text, a
    list of text parts, or missing.

    kwargs: other arguments of the chat template from the row (`tools`, `documents`,
    `chat_template_kwargs`). generated: a model generated the last answer, so nothing follows it.
    cut: that answer reached the maximum length without an end. written: its token ids, if the row
    has them.
    """

    messages: list[Message]
    kwargs: dict[str, Any] = field(default_factory=dict)
    generated: bool = False
    cut: bool = False
    written: list[int] | None = None

    @property
    def question(self) -> Conversation:
        """The conversation without a last answer."""
        messages = self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages
        return Conversation(messages, self.kwargs)


@dataclass(frozen=True)
class Pair:
    """A prompt and its response, after the text `system` if any. generated, cut, written: see
    Conversation."""

    prompt: str
    response: str
    system: str | None = None
    generated: bool = False
    cut: bool = False
    written: list[int] | None = None

    @property
    def before(self) -> str:
        """The text before the response if there is no chat template."""
        return f"{self.system}\n{self.prompt}" if self.system else self.prompt

    def as_chat(self) -> Conversation:
        """The pair as chat messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]
        return Conversation(messages, {}, self.generated, self.cut, self.written)


@dataclass(frozen=True)
class Plain:
    """A document."""

    text: str


def read_form(row: Any, where: str) -> tuple[Conversation | Pair | Plain, frozenset[str]]:
    """The content of the row called `where`, and those of its keys that are ignored. InputError
    naming the row if it has no known form or nothing to train on.

    Known forms: `messages`; ShareGPT's `conversations`; `prompt` with `response` or `completion`;
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
    """The question of the row called `where`: chat messages without a last answer, or a prompt, as
    a pair with an empty response if the row has a system text.

    InputError naming the row if there is nothing to answer.
    """
    given = _given(row, where)
    form, _ = _conversation(given, where)
    if form is not None:
        if not form.question.messages:
            raise InputError(f"{where}: there is no message before the assistant's answer")
        return form.question
    prompt, system = _prompt(given, where), _text(given, "system", where)
    if not prompt:
        raise InputError(f"{where} has neither `messages` nor a `prompt` with text")
    return Pair(prompt, "", system) if system else prompt


def has_question(row: Any, where: str) -> bool:
    """Whether there is something to answer in a row that has something to train on; see read_form."""
    form, _ = read_form(row, where)
    if isinstance(form, Conversation):
        return bool(form.question.messages)
    return isinstance(form, Pair) and bool(form.prompt)


def check_row(row: Any, where: str) -> None:
    """InputError naming the row unless it has a known form and something to train on; see
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
    """The conversation in a row with `messages`, `conversations`, or lists of messages as `prompt`
    and `completion`, else None; and the keys that were read."""
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
            answer = given["completion"]
            answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            messages = messages + _messages(answer, "completion", where)
    else:
        return None, set()
    kwargs = {key: value for key in ("tools", "documents") if (value := _listed(given, key, where))}
    more = _parsed(given.get("chat_template_kwargs", {}))
    if not isinstance(more, dict):
        raise InputError(f"{where}: `chat_template_kwargs` must be an object")
    return Conversation(messages, kwargs | more, *_generated(given, where)), read


def _pair(given: dict[str, Any], where: str) -> tuple[Pair | None, set[str]]:
    """The pair in a row with `prompt` or `instruction`, else None; and the keys that were read."""
    if "instruction" in given or "output" in given:
        names = ("instruction", "output")
    elif "prompt" in given or "response" in given or "completion" in given:
        names = ("prompt", "completion" if "completion" in given and "response" not in given else "response")
    else:
        return None, set()
    if not all(isinstance(given.get(name), str) for name in names):
        raise InputError(f"{where}: `{names[0]}` and `{names[1]}` must both be given, as text")
    system = _text(given, "system", where)
    pair = Pair(_prompt(given, where) or "", given[names[1]], system, *_generated(given, where))
    return pair, {*names, "system", *(("input",) if names[0] == "instruction" else ())}


def _prompt(given: dict[str, Any], where: str) -> str | None:
    """The question of a pair. Alpaca's `input` follows its `instruction` on a new line."""
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
    """The value of a JSON text, the form in which tables with typed columns store schemas; anything
    else unchanged."""
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
    """What `generate` records of an answer: whether it is generated, whether it was cut, and its
    token ids."""
    finish, ids = given.get("finish", given.get("finish_reason")), given.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise InputError(f"{where}: `token_ids` must be a list of token ids")
    return finish is not None, finish in CUT, ids


def _messages(value: Any, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{key}` must be a list with at least one message")
    return [_message(message, where) for message in value]


def _message(value: Any, where: str) -> Message:
    """One message without empty keys, and with its reasoning under all names that templates use."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
    message = {key: part for key, part in value.items() if _is_json(part) and key not in LOSS_WEIGHTS}
    if isinstance(message.get("function_call"), dict) and "tool_calls" not in message:  # OpenAI's form before tools
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
        raise InputError(f"{where}: the reasoning of a message must be a single text")
    for key in REASONING:
        message.pop(key, None)
    if thought is not None:
        message |= dict.fromkeys(REASONING, thought)
    if content is None and thought is None and "tool_calls" not in message:
        raise InputError(f"{where}: each message needs a `role` and a `content`, both text")
    return message


def _is_json(value: Any) -> bool:
    """Whether a template can be given the value: it is neither null nor a table's type such as a
    date."""
    return isinstance(value, str | bool | int | float | list | dict)


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: a message has a part of type {kind!r}; only text is supported")
    return {"type": "text", "text": part["text"]}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, as templates and servers expect; OpenAI's files
    have them as JSON text."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(_parsed(function.get("arguments")), dict):
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    if isinstance(_parsed(call.get("arguments")), dict):
        return {**call, "arguments": _parsed(call["arguments"])}
    return call


def _sharegpt(value: Any, where: str) -> list[Message]:
    """ShareGPT's turns as messages; some data sets have `role` and `content` in them instead of
    `from` and `value`."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: `conversations` must be a list with at least one message")
    return [_message(turn if "from" not in turn else _sharegpt_turn(turn, where), where) for turn in value]


def _sharegpt_turn(turn: dict[str, Any], where: str) -> Message:
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise InputError(f"{where}: unknown speaker {speaker!r} in `conversations`; use one of {', '.join(ROLES)}")
    if not isinstance(value, str):
        raise InputError(f"{where}: each turn of `conversations` needs a `from` and a `value`, both text")
    if speaker != "function_call":
        rest = {key: part for key, part in turn.items() if key not in ("from", "value")}
        return {**rest, "role": ROLES[speaker], "content": value}
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise InputError(f"{where}: a function_call must be JSON with `name` and `arguments`")
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _check_answers(form: Conversation, where: str) -> None:
    answers = [message for message in form.messages if message["role"] == "assistant"]
    if not answers:
        raise InputError(f"{where}: there is no assistant message to train on")
    if not any(message.get(key) for message in answers for key in ("content", "tool_calls", REASONING[0])):
        raise InputError(f"{where}: all assistant messages are empty")
