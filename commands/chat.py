"""hybridize chat"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from hybridize.errors import InputError

from .shared import options as opt
from .shared.files import refuse_ranks
from .shared.flags import expanded
from .shared.output import LINES, Output, guarded
from .shared.speaking import OFTEN, Sampling, Speaker, growing

HELP = "/reset clears the conversation, /system TEXT starts a new one with that system prompt, /quit or Ctrl-D ends"
NARROW = 80  # least number of columns to show two answers side by side


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    versus: Annotated[
        str | None, typer.Option("--versus", help="A second checkpoint that answers side by side, for example the teacher.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.")] = None,
    sampling: Sampling,
    machine: opt.Machine,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
) -> None:
    """Reads a checkpoint, and questions from the terminal or stdin; prints its answers as they are
    generated. Writes no file.

    Each line is a question. /reset clears the conversation, /system TEXT starts a new one with that
    system prompt, /quit or Ctrl-D ends. Ctrl-C stops an answer, or ends the command at the prompt.
    """
    out = Output()
    from hybridize.runtime.device import pick_compute
    from hybridize.runtime.loading import quiet_transformers

    refuse_ranks("chat")
    quiet_transformers()
    where, compute = pick_compute(machine.device, machine.dtype)
    names = [checkpoint] if versus is None else [checkpoint, versus]
    talks = [
        Talk(Speaker(name, revision if name == checkpoint else None, sampling, machine.trust_remote_code, out), system)
        for name in names
    ]
    for talk in talks:
        talk.prompt("Hello.")  # fails before any model is loaded if the chat template rejects the conversation
    for talk in talks:
        LINES.doing(f"loading {talk.speaker.name}")
        talk.model = talk.speaker.load(where, compute)
    LINES.end()
    LINES.silent = True
    if sys.stdin.isatty():
        out.note(HELP)
    _converse(out, talks, sampling.max_new_tokens, seed)


def _converse(out: Output, talks: list[Talk], most: int, seed: int) -> None:
    """Answers questions line by line, until the input ends or the user quits."""
    turn = 0
    while (line := _next_line()) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            _restart(talks, talks[0].system)
        elif line.split()[0:1] == ["/system"]:
            _restart(talks, line.removeprefix("/system").strip() or None)
        elif line.startswith("/"):
            out.note(HELP)
        elif line:
            turn += 1
            _answer(out, talks, line, most, seed + turn)


@dataclass
class Talk:
    """A conversation with one model. speed: summary of the last answer."""

    speaker: Speaker
    system: str | None = None
    model: Any = None
    messages: list[dict[str, str]] = field(default_factory=list)
    speed: str = ""

    def prompt(self, question: str) -> list[int]:
        """Token ids of the conversation so far and a question. InputError if the chat template
        rejects it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*first, *self.messages, {"role": "user", "content": question}]
        return self.speaker.encoder.prompt({"messages": messages}, "the conversation")

    def ready(self, question: str, most: int) -> tuple[list[int], int]:
        """Token ids of the prompt, and the maximum length of the answer, at most `most`. InputError
        if the prompt fills the context."""
        read = self.prompt(question)
        room = most if self.speaker.room is None else min(most, self.speaker.room - len(read))
        if room < 1:
            raise InputError(
                f"the conversation fills all {self.speaker.room} positions of {self.speaker.name}; clear it with /reset"
            )
        return read, room

    def answer(self, question: str, most: int, seed: int, add: Callable[[str], None]) -> None:
        """Generates an answer, passes it piece by piece to `add`, and adds question and answer to
        the conversation. InputError if there is no room for an answer."""
        from hybridize.generation.writing import Wanted, write

        generation = self.speaker.generation
        read, room = self.ready(question, most)
        text, tokens, began = list[str](), 0, time.monotonic()

        def keep(piece: str) -> None:
            text.append(piece)
            add(piece)

        grow = growing(self.speaker.encoder.tokenizer, keep)

        def look(key: object, ids: list[int]) -> bool:
            nonlocal tokens
            tokens = len(ids)
            return grow(key, ids)

        ended = cut = False
        try:
            found = write(
                self.model, [Wanted((0, 0), read, seed)], len(read), room, generation.ends, generation.sampling, 1,
                generation.rules, look, OFTEN,
            )  # fmt: skip
            answer = next(found)
            if answer.broken:
                raise InputError(f"a logit of {self.speaker.name} is not finite; try --dtype float32")
            ended = answer.ended
        except KeyboardInterrupt as error:
            if error.args:  # SIGTERM ends the command
                raise
            cut = True
        reply = "".join(text)
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        why = ", cut short" if cut else "" if ended else f", cut at {room} tokens"
        self.speed = f"{tokens} tokens, {tokens / (time.monotonic() - began):,.0f} tokens/s{why}"


def _restart(talks: list[Talk], system: str | None) -> None:
    """Starts a new conversation with this system prompt, or keeps the old one if a chat template
    rejects it."""
    before = [(talk.system, talk.messages) for talk in talks]
    try:
        for talk in talks:
            talk.system, talk.messages = system, []
            talk.prompt("Hello.")
    except InputError as error:
        for talk, (old, messages) in zip(talks, before, strict=True):
            talk.system, talk.messages = old, messages
        LINES.say(f"error: {error}")


def _next_line() -> str | None:
    """The next line of input, or None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt as error:
        if error.args:  # SIGTERM
            raise
        line = ""
    if not line:
        print()
        return None
    return line.strip()


def _answer(out: Output, talks: list[Talk], question: str, most: int, seed: int) -> None:
    """Shows all answers: in columns on a wide terminal, otherwise one below the other."""
    from rich.console import Console

    console = Console()
    try:
        for talk in talks:  # either all of them answer or none
            talk.ready(question, most)
        if len(talks) > 1 and console.is_terminal and console.width >= NARROW:
            _beside(console, talks, question, most, seed)
        else:
            for talk in talks:
                if len(talks) > 1:
                    print(f"[{talk.speaker.name}]")
                talk.answer(question, most, seed, lambda piece: print(piece, end="", flush=True))
                print()
                out.note(f"({talk.speed})")
    except InputError as error:
        LINES.say(f"error: {error}")


def _beside(console: Any, talks: list[Talk], question: str, most: int, seed: int) -> None:
    """Shows answers in columns. They are generated one after the other, so that speeds are
    comparable."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    replies = [""] * len(talks)

    def columns() -> Table:
        table = Table(expand=True)
        for talk in talks:
            table.add_column(Text(talk.speaker.name), ratio=1)
        table.add_row(*map(Text, replies))
        table.add_row(*(Text(f"({talk.speed})" if talk.speed else "", style="dim") for talk in talks))
        return table

    for talk in talks:
        talk.speed = ""
    with Live(columns(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for place, talk in enumerate(talks):

            def add(piece: str, place: int = place) -> None:
                replies[place] += piece
                live.update(columns(), refresh=True)

            talk.answer(question, most, seed, add)
            live.update(columns(), refresh=True)
