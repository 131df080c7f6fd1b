"""Opening what a command line names: checkpoints, their teachers, data and chat templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import LINES, Output

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.data.encode import Encoder
    from hybridize.data.packing import Batch
    from hybridize.distillation.run_dir import RunDir
    from hybridize.surgery.replace import Calibration


def open_checkpoint(name: str, revision: str | None = None, network: bool = True) -> CheckpointReader:
    """A checkpoint of a supported family; InputError says what is wrong with it. network: see resolve_checkpoint."""
    from hybridize.checkpoint.manifest import check_manifest
    from hybridize.checkpoint.reader import INDEX, SINGLE, CheckpointReader, resolve_checkpoint
    from hybridize.surgery.teacher import check_whole

    LINES.doing(f"opening {name}")
    reader = CheckpointReader(resolve_checkpoint(name, revision, network=network))
    check_whole(reader)
    check_manifest(reader)
    if not reader.sharded and (reader.path / INDEX).exists():
        LINES.say(f"warning: {reader.path} has {SINGLE} and shards with an index: {SINGLE} is read, as transformers does")
    return reader


def check_weights(*readers: CheckpointReader) -> None:
    """Reads every weight of checkpoints that are measured or trained, once. InputError where one is not finite."""
    for reader in readers:
        LINES.doing(f"reading the weights of {reader.path}")
        _ = reader.hash


def teacher_of(source: CheckpointReader, name: str, teacher: str | None) -> CheckpointReader:
    """--teacher, else the manifest's root, else the checkpoint itself where it is no hybrid."""
    from hybridize.checkpoint.manifest import root_of
    from hybridize.errors import InputError

    if teacher is not None:
        return open_checkpoint(teacher)
    root = root_of(source.path)
    if root is not None:
        try:
            return open_checkpoint(root, network=False)  # a checkpoint's word is no reason to call anybody
        except InputError as error:
            raise InputError(f"the teacher of {name} cannot be opened ({error}); say where it is with --teacher") from error
    if source.config.get("model_type") == "hybridize":
        raise InputError(f"{name} does not say which teacher it comes from; give --teacher")
    return source


def result_file(target: Path, name: str, replaceable: bool, what: str = "results go") -> Path:
    """`name` in the folder `target`; InputError where it may not be written."""
    from hybridize.checkpoint.writer import check_writable
    from hybridize.errors import InputError

    path = target / name
    if path.exists() and not replaceable:
        raise InputError(f"{path} exists; give another -o or --overwrite")
    if target.is_file():
        raise InputError(f"{target} is a file; {what} into a directory")
    check_writable(path)
    return path


def refuse_ranks(command: str) -> None:
    """InputError under torchrun, for a command that would do the same on every rank."""
    from hybridize.errors import InputError
    from hybridize.runtime.distributed import world_size

    if world_size() > 1:
        raise InputError(f"{command} runs in one process, not under torchrun")


def done_already(out: Output, run: RunDir, path: Path, overwrite: bool, made: Callable[[Path], bool]) -> bool:
    """Whether `path` is there as the result of this very run, which then has nothing left to do; what it may have left behind
    goes. InputError where `path` is another's and not to be replaced."""
    from hybridize.checkpoint.atomic import clear_leftovers
    from hybridize.errors import InputError
    from hybridize.runtime.distributed import leave

    if overwrite or not path.exists():
        return False
    if run.ranks.first(not made(path)):
        raise InputError(f"{path} exists and is not of this run; give another -o or --overwrite")
    run.remove()
    clear_leftovers(path)
    leave()
    out.note(f"{path} is this run's result already")
    out.result({"output": str(path), "already": True})
    return True


def is_here(where: torch.device) -> bool:
    """Whether this machine has the device that is planned for."""
    import torch

    return where.type != "cuda" or torch.cuda.is_available()


def say_tuning(out: Output, device: torch.device, mixer: dict[str, Any] | None) -> None:
    """Why nothing may be heard for minutes, where that can be."""
    from hybridize.modeling import engine_for, mixer_class

    if mixer is not None and mixer_class(mixer).tunes and engine_for(device) == "kernel":
        out.note("the first step ever on a machine takes minutes: Mamba-2's kernels try their configurations, and remember")


def data_for(out: Output, data: str | None, teacher: CheckpointReader | None) -> str:
    """What --data is; where it was omitted, says which of the places it is looked for in has won."""
    from hybridize.data.rows import find_data

    found = find_data(data, None if teacher is None else teacher.path)
    if data is None:
        told = " (from $HYBRIDIZE_DATA)" if found == os.environ.get("HYBRIDIZE_DATA") else ""
        out.note(f"--data is omitted: {found}{told} is read")
    return found


def open_encoder(source: CheckpointReader, mask: str, chat_template: Path | None, trust_remote_code: bool) -> Encoder:
    """The checkpoint's tokenizer and chat template, to encode rows with. InputError where it has none that works."""
    from hybridize.data.encode import Encoder
    from hybridize.runtime.loading import load_tokenizer

    LINES.doing("reading the tokenizer")
    tokenizer = load_tokenizer(source.path, trust_remote_code)
    LINES.doing("reading the data")  # which comes next, wherever rows are encoded
    return Encoder(tokenizer, mask, template_text(chat_template), source.config.get("vocab_size"))


def say_of_rows(out: Output, encoder: Encoder) -> None:
    """At the start of a run: what of its rows is not read or not learnt."""
    if encoder.unread:
        out.note(f"keys of the rows that are not read: {', '.join(encoder.unread)}")
    for remark in encoder.remarks():
        out.warn(remark)


def warn_of_length(out: Output, source: CheckpointReader, seq_len: int) -> None:
    """Says so where sequences are longer than the model was made for."""
    room = source.config.get("max_position_embeddings")
    if isinstance(room, int) and seq_len > room:
        out.warn(f"--seq-len {seq_len} is more than the {room} positions that the model was made for")


def text_beside(
    out: Output, source: CheckpointReader, name: str, teacher: str | None, data: str | None, encoder: Encoder,
    limit: int | None, windows: int, seq_len: int, rows: int,
) -> tuple[CheckpointReader, str, list[Batch]]:  # fmt: skip
    """What a checkpoint is held against its teacher on: the teacher, the data's name, windows in batches of `rows`."""
    from hybridize.data.corpus import open_corpus
    from hybridize.errors import InputError
    from hybridize.surgery.teacher import check_vocabularies

    origin = teacher_of(source, name, teacher)
    check_vocabularies(source, origin)
    spec = data_for(out, data, origin)
    corpus = open_corpus(spec, spec, encoder, limit)
    say_of_rows(out, encoder)
    batches = corpus.held_out(windows, seq_len, rows)
    if not batches:
        raise InputError(f"{spec} does not fill one window of {seq_len} tokens; a smaller --seq-len may")
    return origin, corpus.rows.name, batches


def found_data(source: CheckpointReader) -> str | None:
    """What --data would be if it were omitted, or None. The teacher's own traces are looked for on this disk only."""
    from hybridize.checkpoint.manifest import root_of
    from hybridize.data.rows import find_data
    from hybridize.errors import InputError

    root = root_of(source.path)
    for folder in (source.path, *([Path(root)] if root is not None and Path(root).is_dir() else [])):
        try:
            return find_data(None, folder)
        except InputError:
            continue
    return None


def calibration_for(
    out: Output, spec: str | None, source: CheckpointReader, parts: str, tokens: int, device: str, seed: int,
    chat_template: Path | None, trust_remote_code: bool,
) -> Calibration | None:  # fmt: skip
    """Text from `spec` to calibrate new mixers on, or None without a spec. InputError when a setting or the text is no good."""
    from hybridize.data.rows import Rows, read_mixture
    from hybridize.data.sample import FEWEST, WINDOW, sample_windows
    from hybridize.errors import InputError
    from hybridize.runtime.device import pick_device
    from hybridize.runtime.loading import quiet_transformers
    from hybridize.surgery.mixers import KINDS
    from hybridize.surgery.replace import Calibration

    chosen = frozenset(part.strip() for part in parts.split(",") if part.strip())
    known = dict.fromkeys(part for kind in KINDS.values() for part in kind.parts)
    if not chosen or chosen - set(known):
        raise InputError(f"--calibration-parts {parts!r}: choose from {','.join(known)}")
    if tokens < FEWEST:
        raise InputError(f"--calibration-tokens {tokens} must be at least {FEWEST}")
    where = pick_device(device)
    if spec is None:
        return None
    quiet_transformers()
    encoder = open_encoder(source, "none", chat_template, trust_remote_code)
    rows = Rows.joined([part for part, _ in read_mixture(spec)])
    name = Path(spec).name if Path(spec).is_file() else spec
    longest = min(WINDOW, source.config.get("max_position_embeddings") or WINDOW)
    ids = sample_windows(rows, encoder, tokens, seed, longest)
    say_of_rows(out, encoder)
    return Calibration(ids, chosen, where, name)


def template_text(path: Path | None) -> str | None:
    from hybridize.errors import InputError

    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"--chat-template {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"--chat-template {path} is empty")
    return text
