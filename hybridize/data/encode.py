"""Encodes rows to token ids and a loss mask, each answer in the context in which a model would
generate it."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hybridize.data.chat import ChatTemplate, Turn
from hybridize.data.forms import Conversation, Pair, Plain, read_form, read_question
from hybridize.errors import InputError, setting

MASKS = ("assistant", "none")
REMEMBERED = 50_000_000  # cached tokens, five bytes each: training need not tokenise again the rows that were checked before
_LOST, _UNCLOSED, _ENDLESS, _STALE = "lost", "unclosed", "endless", "stale"


@dataclass(frozen=True)
class Document:
    """One tokenised row. loss_mask[i]: whether the prediction of token i counts in the loss.

    starts: where its sequences begin; each is a separate text, which does not see the others.
    whole: its end is the intended one; False if generation was cut at a length.
    """

    ids: list[int]
    loss_mask: list[bool]
    starts: tuple[int, ...] = (0,)
    whole: bool = True

    def parts(self) -> list[Document]:
        """The sequences, as one document each."""
        if len(self.starts) == 1:
            return [self]
        ends = [*self.starts[1:], len(self.ids)]
        spans = zip(self.starts, ends, strict=True)
        return [Document(self.ids[a:b], self.loss_mask[a:b], whole=self.whole or b < len(self.ids)) for a, b in spans]


class Encoder:
    """Tokenises rows with a checkpoint's tokenizer and chat template.

    mask: `assistant` computes the loss on what the assistant writes (all tokens of a `text` row),
    `none` on every token. chat_template: a Jinja template instead of the tokenizer's own.
    vocabulary: the size of the model's embedding, to reject rows with other tokens.
    """

    def __init__(
        self, tokenizer: Any, mask: str, chat_template: str | dict[str, str] | None = None, vocabulary: int | None = None
    ) -> None:
        if mask not in MASKS:
            raise InputError(f"{setting('mask')} {mask} is unknown; use {' or '.join(MASKS)}")
        self.tokenizer, self.mask, self.vocabulary = tokenizer, mask, vocabulary
        self.chat = ChatTemplate(tokenizer, chat_template)
        self.template = self.chat.template
        self.unread: dict[str, None] = {}  # ignored keys of rows, in the order of their first occurrence
        self._counted: Counter[str] = Counter()
        self._known: dict[tuple[str, int], tuple[array[int], bytes, tuple[int, ...], bool]] = {}
        self._room = REMEMBERED
        self._front, self._back = self._added()

    def encode(self, row: dict[str, Any], where: str) -> Document:
        """The row called `where`, cached. InputError naming it if none of its tokens has a loss or
        the template rejects it."""
        name = where, hash(repr(row))
        if name in self._known:
            ids, loss_mask, starts, whole = self._known[name]
            return Document(ids.tolist(), [bool(flag) for flag in loss_mask], starts, whole)
        document = self.read(row, where)
        if self._room >= len(document.ids):
            self._room -= len(document.ids)
            self._known[name] = array("i", document.ids), bytes(document.loss_mask), document.starts, document.whole
        return document

    def prompt(self, row: dict[str, Any], where: str) -> list[int]:
        """The token ids that a model reads before it answers the row called `where`: those of its
        messages without a last answer, or of its prompt."""
        question = read_question(row, where)
        if isinstance(question, str) and self.template:
            question = Conversation([{"role": "user", "content": question}])
        if isinstance(question, Pair) and not self.template:
            question = question.before
        elif isinstance(question, Pair):
            question = question.as_chat().question
        if isinstance(question, str):
            return self._check(self._without_back(self._with_added(question, where)), where)
        return self._check(self._tokens(self.chat.prompt(question, where), where), where)

    def remarks(self) -> list[str]:
        """Warnings about the rows so far, for the start of a run: text without a loss, and other
        surprises."""
        found = []
        if count := self._counted[_LOST]:
            tokens = self._counted["lost tokens"]
            found.append(f"{count} answers have text that the chat template does not render: {tokens} tokens have no loss")
        if count := self._counted[_UNCLOSED]:
            found.append(
                f"{count} answers do not close the reasoning block that the chat template's prompt opens: "
                "the model learns them as reasoning"
            )
        if count := self._counted[_ENDLESS]:
            found.append(f"the chat template adds no end token to {count} answers: the model does not learn to end them")
        if count := self._counted[_STALE]:
            found.append(f"{count} answers were generated with another tokenizer: they are tokenised again")
        return found

    def read(self, row: dict[str, Any], where: str) -> Document:
        """Like `encode`, without the cache."""
        form, unread = read_form(row, where)
        source = str(self.template)  # a template may read any key of a message
        self.unread.update(
            dict.fromkeys(key for key in sorted(unread) if "[]." not in key or key.split("[].")[1] not in source)
        )
        if isinstance(form, Pair) and self.template:
            form = form.as_chat()
        if isinstance(form, Conversation):
            document = self._conversation(form, where)
        elif isinstance(form, Pair):
            document = self._pair(form, where)
        else:
            document = self._plain(form, where)
        if self.mask == "none":
            document = Document(document.ids, [True] * len(document.ids), document.starts, document.whole)
        if not any(any(part.loss_mask[1:]) for part in document.parts()):
            raise InputError(f"{where}: no token of this row has a loss")
        self._check(document.ids, where)
        return document

    def _plain(self, form: Plain, where: str) -> Document:
        """A text with the special tokens that the tokenizer adds, and the end token."""
        ids = self._with_added(form.text, where)
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return Document(ids, [True] * len(ids))

    def _pair(self, form: Pair, where: str) -> Document:
        """A prompt and its response without a chat template: one text, with a loss on the response
        and the end token."""
        before = form.before
        head = self._without_back(self._with_added(before, where))
        if self._is_written(form.written, form.response):
            answer = list(form.written or ())
        else:
            answer = self._answer(head, before, form.response, where)
        end = self.tokenizer.eos_token_id
        if not form.cut and end is not None and answer[-1:] != [end]:
            answer = [*answer, end]
        return Document(head + answer, [False] * len(head) + [True] * len(answer), whole=not form.cut)

    def _conversation(self, form: Conversation, where: str) -> Document:
        """Each answer after its own prompt; an answer continues the current sequence if its prompt
        begins with that sequence, else it starts a new one."""
        written = form.generated and form.messages[-1]["role"] == "assistant"
        if self.mask == "none" and not written and (text := self.chat.joined(form, where)) is not None:
            joined = self._tokens(text, where)
            return Document(joined, [True] * len(joined))
        ids: list[int] = []
        loss_mask: list[bool] = []
        starts, whole = [0], True
        turns = self.chat.turns(form, where)
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1 and form.messages[-1]["role"] == "assistant"
            head = self._tokens(turn.prompt, where)
            if (
                last
                and "tool_calls" not in form.messages[-1]
                and "reasoning" not in form.messages[-1]
                and self._is_written(form.written, form.messages[-1].get("content"))
            ):
                answer = [*form.written, *self._tokens(turn.ending, where)]  # type: ignore[misc]
            else:
                answer = self._answer(head, turn.prompt, turn.text, where)
            sequence = ids[starts[-1] :]
            if head[: len(sequence)] == sequence:
                head = head[len(sequence) :]
            else:
                starts.append(len(ids))
            ids += head + answer
            loss_mask += [False] * len(head) + [True] * len(answer)
            whole = not (last and form.cut)
            self._count(turn, whole)
        if last and not form.generated:
            ids += self._tokens(turns[-1].after, where)
        if self.mask == "none" and not (
            last and form.generated
        ):  # with a loss on every token, text after the last answer is included
            every, sequence = self._tokens(self.chat.whole(form, where), where), ids[starts[-1] :]
            if every[: len(sequence)] == sequence:
                ids += every[len(sequence) :]
        loss_mask += [False] * (len(ids) - len(loss_mask))
        return Document(ids, loss_mask, tuple(starts), whole)

    def _answer(self, head: list[int], before: str, text: str, where: str) -> list[int]:
        """The ids of `text` as a model would generate it after `before`, whose ids are `head`."""
        both = self._tokens(before + text, where)
        bare = head[len(self._front) :] if self._front and head[: len(self._front)] == self._front else head
        for begin in (head, bare):
            if both[: len(begin)] == begin:
                return both[len(begin) :]
        return self._continued(text, where)  # a token would span the border, but the model reads `head`

    def _continued(self, text: str, where: str) -> list[int]:
        """The ids of `text` in the middle of a text: at the beginning some tokenizers add a space."""
        mark = self.tokenizer.eos_token
        if mark:
            before, both = self._tokens(mark, where), self._tokens(mark + text, where)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._tokens(text, where)

    def _is_written(self, ids: list[int] | None, text: Any) -> bool:
        """Whether a row's own ids can be used for its answer `text`: this tokenizer decodes them to
        it."""
        if ids is None:
            return False
        known = self.vocabulary or len(self.tokenizer)
        if all(token < known for token in ids) and decoded(self.tokenizer, ids) == text:
            return True
        self._counted[_STALE] += 1
        return False

    def _count(self, turn: Turn, whole: bool) -> None:
        if turn.lost:
            self._counted[_LOST] += 1
            self._counted["lost tokens"] += len(self._tokens(turn.lost, ""))
        self._counted[_UNCLOSED] += turn.unclosed
        self._counted[_ENDLESS] += whole and not turn.ending

    def _tokens(self, text: str, where: str, added: bool = False) -> list[int]:
        if not text and not added:
            return []
        try:
            return list(self.tokenizer(text, add_special_tokens=added)["input_ids"])
        except (TypeError, UnicodeEncodeError) as error:
            at = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if at is None:
                raise
            raise InputError(
                f"{where} has a lone surrogate ({text[at]!a}, half a character) after {text[max(0, at - 20) : at]!r}"
            ) from error

    def _with_added(self, text: str, where: str) -> list[int]:
        """The ids of a text with the special tokens that the tokenizer adds, but not twice if the
        text has them already, as a rendered chat does."""
        ids = self._tokens(text, where, added=True)
        front, back = self._front, self._back
        if front and ids[: 2 * len(front)] == front * 2:
            ids = ids[len(front) :]
        if back and ids[-2 * len(back) :] == back * 2:
            ids = ids[: -len(back)]
        return ids

    def _without_back(self, ids: list[int]) -> list[int]:
        """The ids without the special tokens that the tokenizer adds after a text, so that an
        answer can follow."""
        return ids[: -len(self._back)] if self._back and ids[-len(self._back) :] == self._back else ids

    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after any text."""
        bare, full = self._tokens("a", ""), self._tokens("a", "", added=True)
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        return full[:at], full[at + len(bare) :]

    def _check(self, ids: list[int], where: str) -> list[int]:
        """The ids; InputError if the model has no embedding for one of them."""
        if self.vocabulary is not None and (unknown := unknown_token(self.tokenizer, ids, self.vocabulary)):
            raise InputError(f"{where} has {unknown}")
        return ids


def unknown_token(tokenizer: Any, ids: list[int], vocabulary: int) -> str | None:
    """A description of the highest id if the model, which has `vocabulary` embeddings, has none for
    it; else None."""
    if not ids or (highest := max(ids)) < vocabulary:
        return None
    token = tokenizer.convert_ids_to_tokens(highest)
    return f"the token {token!r} ({highest}), but the model has only {vocabulary} embeddings"


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens, including special ones, without any clean-up of spaces."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
