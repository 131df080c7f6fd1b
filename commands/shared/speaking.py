"""Shared by `generate` and `chat`: sampling flags, a checkpoint that generates, and streaming of
its text."""

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

OFTEN = 4  # tokens between updates of a streamed answer


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. None: the checkpoint's own value."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer, in tokens.")] = (
        1024
    )
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sampling temperature; 0 is greedy [default: generation_config.json's, else 0]."),
    ] = None
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from the k most likely tokens [default: generation_config.json's].")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Nucleus sampling: cumulative probability [default: generation_config.json's]."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", help="Least probability relative to the most likely token [default: generation_config.json's]."
        ),
    ] = None
    chat_template: opt.ChatTemplate = None

    def overrides(self) -> dict[str, Any]:
        """Settings that override those of the checkpoint, for read_generation."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


class Speaker:
    """A checkpoint that generates: its reader, encoder and generation settings. InputError if one
    of them cannot be used."""

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
        self.generation: Generation = read_generation(self.source.path, self.source.config, tokenizer, sampling.overrides())
        for key, value in self.generation.others.items():
            raise InputError(f"{self.source.path / FILE} has {key} = {value!r}, which is not supported; remove it")

    @property
    def room(self) -> int | None:
        """The model's maximum context length, or None if its config has none."""
        found = self.source.config.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    def load(self, where: torch.device, compute: torch.dtype) -> Any:
        """Loads the model. where, compute: device and compute type."""
        from hybridize.runtime.loading import load_hybrid

        return load_hybrid(self.source, where, compute)


def growing(tokenizer: Any, add: Callable[[str], None]) -> Callable[[object, list[int]], bool]:
    """A callback for the `stop` parameter of `write`, for a single answer: passes each new piece of
    its text to `add`, and never stops."""
    from hybridize.data.encode import decoded

    shown = ""

    def look(_: object, ids: list[int]) -> bool:
        nonlocal shown
        text = decoded(tokenizer, ids).rstrip("\ufffd")  # an incomplete character
        add(text[len(shown) :])
        shown = text
        return False

    return look
