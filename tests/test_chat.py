"""`hybridize chat`: a scripted conversation, each side remembering its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hybridize.commands import app, chat
from hybridize.commands.chat import Talk
from hybridize.commands.shared.speaking import Sampling, Speaker, growing
from typer.testing import CliRunner

from hybridize.notes import SILENT
from tests.conftest import TEMPLATE, Runner, make_place, make_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("chat"), ("replace", "--indices", "1,2", "-o", "h2"))


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def talk(text: str, *command: str) -> Any:
    result = CliRunner().invoke(app, ["chat", *command, "--device", "cpu"], input=text)
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result


def test_answers_are_those_of_generate(place: Path, cli: Runner) -> None:
    for name in ("teacher", "h2"):
        alone = cli("generate", name, "Two and two?", "--max-new-tokens", "12", "--device", "cpu")
        said = talk("Two and two?\n", name, "--max-new-tokens", "12")
        assert said.stdout.rstrip("\n") == alone.rstrip("\n")
        assert "12 tokens, " in said.stderr
        assert "cut at 12 tokens" in said.stderr
    both = talk("Two and two?\n", "h2", "--versus", "teacher", "--max-new-tokens", "12").stdout
    assert both.split("[teacher]\n")[1].rstrip("\n") == alone_of(cli, "teacher")
    assert both.split("[teacher]\n")[0].removeprefix("[h2]\n").rstrip("\n") == alone_of(cli, "h2")


def alone_of(cli: Runner, name: str) -> str:
    return cli("generate", name, "Two and two?", "--max-new-tokens", "12", "--device", "cpu").rstrip("\n")


def test_a_conversation_is_remembered_and_forgotten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, prompt = list[list[dict[str, str]]](), Talk.prompt

    def noting(self: Talk, question: str) -> list[int]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        seen.append([*first, *self.messages, {"role": "user", "content": question}])
        return prompt(self, question)

    monkeypatch.setattr(Talk, "prompt", noting)
    lines = ["One?", "Two?", "/reset", "Three?", "/system Be brief.", "Four?", "/what", "", "/quit", "Five?"]
    told = talk("\n".join(lines) + "\n", "h2", "--system", "Be kind.", "--max-new-tokens", "3")
    asked = [messages for messages, _ in itertools.groupby(seen) if messages[-1]["content"] != "Hello."]
    assert [[(m["role"], m["content"]) for m in messages if m["role"] != "assistant"] for messages in asked] == [
        [("system", "Be kind."), ("user", "One?")],
        [("system", "Be kind."), ("user", "One?"), ("user", "Two?")],
        [("system", "Be kind."), ("user", "Three?")],
        [("system", "Be brief."), ("user", "Four?")],
    ]
    answers = [m["content"] for m in asked[1] if m["role"] == "assistant"]
    assert told.stdout.splitlines()[0] == answers[0] != ""
    assert told.stderr.count("/reset clears the conversation") == 1  # of a command that there is not


def test_a_conversation_that_is_too_long_says_so(place: Path) -> None:
    told = talk(f"{'x' * 300}\nHi.\n", "h2", "--max-new-tokens", "3")
    assert "error: the conversation fills all 256 positions of h2; clear it with /reset" in told.stderr
    assert "3 tokens, " in told.stderr  # and the next question is answered


def test_an_answer_may_be_cut_short_and_a_signal_ends(place: Path) -> None:
    import torch

    speaker = Speaker("h2", None, Sampling(), False, SILENT)
    one = Talk(speaker, None, speaker.load(torch.device("cpu"), torch.float32))
    pieces: list[str] = []

    def interrupting(piece: str, *number: int) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt(*number)

    one.answer("Hi?", 40, 0, interrupting)
    assert one.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert one.speed.endswith("cut short")
    pieces.clear()
    with pytest.raises(KeyboardInterrupt):
        one.answer("Hi?", 40, 0, lambda piece: interrupting(piece, 15))


def test_columns_hold_both_answers(place: Path, cli: Runner) -> None:
    import io

    import torch
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    talks = [Talk(Speaker(name, None, Sampling(), False, SILENT)) for name in ("h2", "teacher")]
    for one in talks:
        one.model = one.speaker.load(torch.device("cpu"), torch.float32)
    chat._beside(console, talks, "Two and two?", 4, 0)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "h2" in shown
    assert "teacher" in shown
    assert shown.count("4 tokens, ") >= 2


def test_what_cannot_be_is_said_before_a_model_is_loaded(place: Path, cli: Runner, tmp_path: Path) -> None:
    no_system = tmp_path / "strict.jinja"
    no_system.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + TEMPLATE)
    told = cli.fails("chat", "h2", "--system", "Be kind.", "--chat-template", no_system)
    assert "No system." in told
    said = talk("/system Be kind.\nHi.\n", "h2", "--chat-template", str(no_system), "--max-new-tokens", "2")
    assert "No system." in said.stderr
    assert "2 tokens, " in said.stderr
    assert "nowhere does not exist" in cli.fails("chat", "./nowhere").replace("./", "")


def test_half_a_character_waits() -> None:
    tokenizer, pieces = make_tokenizer(), list[str]()
    ids = tokenizer.encode("a\u5c71b", add_special_tokens=False)
    look = growing(tokenizer, pieces.append)
    for count in range(1, len(ids) + 1):
        assert look(None, ids[:count]) is False
    assert "".join(pieces) == "a\u5c71b"
    assert "\ufffd" not in "".join(pieces)


def test_two_conversations_stay_side_by_side(place: Path, tmp_path: Path) -> None:
    """A question that one of them cannot answer is asked of none; a system prompt that one refuses
    is none's."""
    long = Talk(Speaker("h2", None, Sampling(), False, SILENT), messages=[{"role": "user", "content": "x" * 300}])
    short = Talk(Speaker("teacher", None, Sampling(), False, SILENT))
    chat._answer(chat.Output(), [short, long], "Hi?", 3, 0)
    assert (len(short.messages), len(long.messages)) == (0, 1)
    strict = tmp_path / "strict.jinja"
    strict.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + TEMPLATE)
    refuses = Talk(
        Speaker("h2", None, Sampling(chat_template=strict), False, SILENT), messages=[{"role": "user", "content": "Hi."}]
    )
    short.messages = [{"role": "user", "content": "Ho."}]
    chat._restart([short, refuses], "Be kind.")
    assert [(talk.system, talk.messages[0]["content"]) for talk in (short, refuses)] == [(None, "Ho."), (None, "Hi.")]
    chat._restart([short, refuses], None)
    assert [talk.messages for talk in (short, refuses)] == [[], []]
