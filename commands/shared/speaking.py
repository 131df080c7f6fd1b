"""What `generate` and `chat` share: the sampling flags, a checkpoint that answers, and its text as
it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.notes import Notes

from . import options as opt

if TYPE_CHECKING:
    import torch

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.data.encode import Encoder
    from hybridize.generation.settings import Generation

OFTEN = 4  # tokens between two looks at an answer that somebody is reading


@dataclass(frozen=True)
class Sampling:
    """How tokens of an answer are chosen. None: as the checkpoint has it."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 1024
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy [default: as generation_config.json says, else 0].")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="Only the k most likely tokens [default: as above].")] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Only the most likely up to this mass [default: as above].")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Only those of this share of the likeliest's probability [default: as above]."),
    ] = None
    chat_template: opt.ChatTemplate = None

    def asked(self) -> dict[str, Any]:
        """What read_generation takes."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


class Speaker:
    """A checkpoint that answers: its reader, encoder and generation settings; InputError where
    something of them is wrong."""

    def __init__(self, name: str, revision: str | None, sampling: Sampling, trust_remote_code: bool, notes: Notes) -> None:
        from hybridize.errors import InputError
        from hybridize.generation.decoder import check_decodable
        from hybridize.generation.settings import FILE, read_generation
        from hybridize.inputs import open_checkpoint, open_encoder
        from hybridize.modeling import hybrid_config

        self.name = name
        self.source: CheckpointReader = open_checkpoint(name, revision, notes=notes)
        check_decodable(hybrid_config(self.source.config))
        self.encoder: Encoder = open_encoder(self.source, "assistant", sampling.chat_template, trust_remote_code, notes)
        tokenizer = self.encoder.tokenizer
        self.generation: Generation = read_generation(self.source.path, self.source.config, tokenizer, sampling.asked())
        for key, value in self.generation.others.items():
            raise InputError(f"{self.source.path / FILE} has {key} = {value!r}, which is not followed here; take it out")

    @property
    def room(self) -> int | None:
        """Positions that the model was made for, if it says so."""
        found = self.source.config.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    def load(self, where: torch.device, compute: torch.dtype) -> Any:
        """The model, ready to answer."""
        from hybridize.runtime.loading import load_hybrid

        return load_hybrid(self.source, where, compute)


def growing(tokenizer: Any, add: Callable[[str], None]) -> Callable[[object, list[int]], bool]:
    """What `write` may be given as `stop`: hands each new piece of the one answer's text to `add`,
    and never stops it."""
    from hybridize.data.encode import decoded

    said = ""

    def look(_: object, ids: list[int]) -> bool:
        nonlocal said
        text = decoded(tokenizer, ids).rstrip("\ufffd")  # half a character
        add(text[len(said) :])
        said = text
        return False

    return look
