"""Reads a checkpoint's generation settings: which are supported, which are refused by name, and
which tokens end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.errors import InputError, first_line
from hybridize.generation.sampling import Rules, SamplingSettings

FILE = "generation_config.json"
MOST = 1 << 31  # limit of settings that count tokens
TOP_K = 50  # transformers' default if a checkpoint samples without setting it
FOLLOWED: dict[str, tuple[Any, ...]] = {  # supported, with the values that have no effect
    "repetition_penalty": (None, 1, 1.0), "no_repeat_ngram_size": (None, 0), "min_length": (None, 0),
    "min_new_tokens": (None, 0), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, ...]] = {  # not supported, with values that have no effect; see GenerationConfig
    "num_beams": (None, 1), "num_beam_groups": (None, 1), "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,),
    "guidance_scale": (None, 1, 1.0), "sequence_bias": (None,), "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,), "watermarking_config": (None,), "stop_strings": (None, []),
    "max_time": (None,), "token_healing": (None, False), "constraints": (None,), "force_words_ids": (None,),
}  # fmt: skip
REFUSED_IN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1, 1.0), "epsilon_cutoff": (None, 0, 0.0), "eta_cutoff": (None, 0, 0.0), "top_h": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """How a checkpoint's answers are generated. ends: tokens that end an answer; others:
    unsupported settings that would change answers, with their values."""

    sampling: SamplingSettings
    rules: Rules
    ends: frozenset[int]
    others: dict[str, Any] = field(default_factory=dict)


def read_generation(path: Path, config: Mapping[str, Any], tokenizer: Any, overrides: Mapping[str, Any]) -> Generation:
    """Returns the generation settings of the checkpoint directory `path`, overridden by the user's.

    config: its config.json. overrides: the user's temperature (0 is greedy), top_k, top_p and
    min_p, None where not set. Without a temperature from the user, answers are sampled only if the
    checkpoint's `do_sample` is set. Raises InputError if the file cannot be read.
    """
    from transformers import GenerationConfig

    file = path / FILE if (path / FILE).is_file() else path / "config.json"
    try:
        if file.name == FILE:
            made = GenerationConfig.from_pretrained(path, local_files_only=True)
        else:  # where older checkpoints keep them
            made = GenerationConfig(**{key: config[key] for key in vars(GenerationConfig()) if key in config})
        _check(made)
    except Exception as error:  # bad values raise many types of exceptions
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    overrides = {key: value for key, value in overrides.items() if value is not None}
    samples = overrides["temperature"] > 0 if "temperature" in overrides else bool(made.do_sample)
    own = made.do_sample  # transformers ignores sampling settings unless do_sample is set
    drawn = {key: getattr(made, key) if own else None for key in ("temperature", "top_k", "top_p", "min_p")} | dict(overrides)
    if own and drawn["top_k"] is None:
        drawn["top_k"] = TOP_K
    return settings_of(vars(made), drawn, samples, ends_of((made.eos_token_id, config.get("eos_token_id")), tokenizer))


def settings_of(made: Mapping[str, Any], drawn: Mapping[str, Any], samples: bool, ends: Iterable[int]) -> Generation:
    """Returns the Generation for settings in transformers' terms.

    made: generation settings by name; drawn: temperature, top_k, top_p and min_p, None where unset;
    samples: whether answers are sampled; ends: tokens that end an answer.
    """
    unset = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    chosen = {key: value if drawn.get(key) is None else drawn[key] for key, value in unset.items()}
    if not samples:
        chosen["temperature"] = 0.0
    sampling = SamplingSettings(
        float(chosen["temperature"]), int(chosen["top_k"]), float(chosen["top_p"]), float(chosen["min_p"])
    )
    refused = REFUSED | (REFUSED_IN_SAMPLING if samples else {})
    others = {key: made[key] for key, neutral in refused.items() if made.get(key) not in neutral}
    given = {key: made[key] for key, neutral in FOLLOWED.items() if made.get(key) not in neutral}
    banned = given.pop("bad_words_ids", [])
    if any(len(word) != 1 for word in banned):
        others["bad_words_ids"] = banned
    ends = frozenset(ends)
    if "min_new_tokens" in given:  # takes precedence over min_length
        given.pop("min_length", None)
    rules = Rules(
        float(given.get("repetition_penalty", 1.0)), max(0, int(given.get("no_repeat_ngram_size", 0))),
        tuple(given.get("suppress_tokens", ())), tuple(given.get("begin_suppress_tokens", ())),
        tuple(word[0] for word in banned if len(word) == 1 and word[0] not in ends),
        int(given.get("min_length", 0)), int(given.get("min_new_tokens", 0)), tuple(sorted(ends)),
    )  # fmt: skip
    return Generation(sampling, rules, ends, others)


def ends_of(end_ids: Iterable[Any], tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end an answer: `end_ids` (ids, lists of ids or None, from generation
    settings and config), or if there are none the tokenizer's own."""
    ends = {end for one in end_ids for end in (one if isinstance(one, list | tuple) else [one]) if end is not None}
    return frozenset(ends or ({tokenizer.eos_token_id} - {None}))


def _check(made: Any) -> None:
    """Raises ValueError if a supported setting has an invalid value."""
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if not isinstance(getattr(made, name), int | float | None):
            raise ValueError(f"{name} is {getattr(made, name)!r}")
    for name in ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"):
        value = getattr(made, name)
        if value is not None and (not isinstance(value, int | float) or value != int(value) or abs(value) > MOST):
            raise ValueError(f"{name} is {value!r}")
    words = made.bad_words_ids
    if words is not None and not (isinstance(words, list) and all(_are_tokens(word) for word in words)):
        raise ValueError(f"bad_words_ids is {words!r}")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        value = getattr(made, name)
        if value is not None and not _are_tokens(value):
            raise ValueError(f"{name} is {value!r}")
    for end in made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]:
        if not isinstance(end, int | None):
            raise ValueError(f"eos_token_id is {made.eos_token_id!r}")


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
