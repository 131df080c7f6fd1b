"""Rows to token ids and the loss mask: which tokens the student is to learn from."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from hybridize.errors import InputError, first_line

MASKS = ("assistant", "none")
REMEMBERED = 50_000_000  # tokens, five bytes each: rows are checked before training, which then need not tokenise them again


@dataclass(frozen=True)
class Document:
    """One tokenised row. keep[i]: predicting token i counts in the loss."""

    ids: list[int]
    keep: list[bool]


class Encoder:
    """Tokenises rows with a checkpoint's tokenizer and chat template.

    mask `assistant` keeps the assistant's tokens (all tokens of a `text` row), `none` keeps every token.
    chat_template: a Jinja template in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, mask: str, chat_template: str | None = None) -> None:
        if mask not in MASKS:
            raise InputError(f"--mask {mask} is unknown; use {' or '.join(MASKS)}")
        self.tokenizer, self.mask = tokenizer, mask
        self.template = chat_template or getattr(tokenizer, "chat_template", None)
        self._known: dict[tuple[str, int], tuple[array[int], bytes]] = {}
        self._room = REMEMBERED

    def encode(self, row: dict[str, Any], where: str) -> Document:
        """The row called `where`. InputError naming it when the mask keeps none of its tokens or the template rejects it."""
        name = where, hash(repr(row))
        if name in self._known:
            ids, keep = self._known[name]
            return Document(ids.tolist(), [bool(flag) for flag in keep])
        document = self._encode(row, where)
        if self._room >= len(document.ids):
            self._room -= len(document.ids)
            self._known[name] = array("i", document.ids), bytes(document.keep)
        return document

    def prompt(self, row: dict[str, Any], where: str) -> list[int]:
        """What a model reads before it answers the row called `where`: `messages` without a last answer, or `prompt`."""
        if "messages" in row or self.template:
            return self._render(unanswered(row), where, prompt=True)
        return self._plain(row["prompt"])

    def _encode(self, row: dict[str, Any], where: str) -> Document:
        if "messages" in row or ("prompt" in row and self.template):
            document = self._chat(self._messages(row), where)
        elif "prompt" in row:
            prompt, response = self._plain(row["prompt"]), self._plain(row["response"], ends=True)
            document = Document(prompt + response, [False] * len(prompt) + [True] * len(response))
        else:
            ids = self._plain(row["text"], ends=True)
            document = Document(ids, [True] * len(ids))
        if self.mask == "none":
            document = Document(document.ids, [True] * len(document.ids))
        if not any(document.keep[1:]):
            raise InputError(f"{where}: the loss mask keeps no token of this row")
        return document

    def _messages(self, row: dict[str, Any]) -> list[dict[str, str]]:
        if "messages" in row:
            return row["messages"]
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]

    def _plain(self, text: str, ends: bool = False) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, self.tokenizer.eos_token_id] if ends and self.tokenizer.eos_token_id is not None else ids

    def _render(self, messages: list[dict[str, str]], where: str, prompt: bool = False) -> list[int]:
        if self.template is None:
            raise InputError(f"{where} is a chat, but the tokenizer has no chat template; give --chat-template FILE")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # Jinja's own errors and the template's raise_exception
            raise InputError(f"{where}: the chat template rejects it: {first_line(error)}") from error
        return self._plain(text)

    def _chat(self, messages: list[dict[str, str]], where: str) -> Document:
        """Each assistant span runs from where the rendered prefix (with the generation prompt) ends to where the next begins.

        Found by comparing tokens, since many templates lack the generation marker and then report an empty mask.
        """
        ids = self._render(messages, where)
        keep = [False] * len(ids)
        if self.mask == "assistant":
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                begin = _shared(self._render(messages[:index], where, prompt=True), ids) if index else 0
                last = index == len(messages) - 1
                end = len(ids) if last else _shared(self._render(messages[: index + 1], where), ids)
                keep[begin:end] = [True] * max(0, end - begin)
        return Document(ids, keep)


def unanswered(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's messages up to where the assistant is to speak."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _shared(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
