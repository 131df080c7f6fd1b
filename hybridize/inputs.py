"""Opens what a user names: checkpoints and their teachers, data, chat templates, calibration text.

Everything is checked here, before anything expensive starts; an InputError explains what is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

from hybridize.checkpoint.manifest import check_manifest, root_of
from hybridize.checkpoint.reader import INDEX, SINGLE, CheckpointReader, resolve_checkpoint
from hybridize.data.corpus import open_corpus
from hybridize.data.encode import Encoder
from hybridize.data.packing import Batch
from hybridize.data.rows import Rows, find_data, read_mixture
from hybridize.data.sample import FEWEST, WINDOW, sample_windows
from hybridize.errors import InputError, setting
from hybridize.notes import SILENT, Notes
from hybridize.runtime.device import pick_device
from hybridize.runtime.loading import load_tokenizer, quiet_transformers
from hybridize.surgery.mixers import kind_of
from hybridize.surgery.replace import Calibration
from hybridize.surgery.teacher import check_vocabularies, check_whole


def open_checkpoint(name: str, revision: str | None = None, network: bool = True, notes: Notes = SILENT) -> CheckpointReader:
    """A reader of a checkpoint, whose family must be supported. network: see resolve_checkpoint."""
    notes.doing(f"opening {name}")
    reader = CheckpointReader(resolve_checkpoint(name, revision, network=network))
    check_whole(reader)
    check_manifest(reader)
    if not reader.sharded and (reader.path / INDEX).exists():
        notes.warn(f"{reader.path} has both {SINGLE} and shards with an index; {SINGLE} is read, as in transformers")
    return reader


def check_weights(*readers: CheckpointReader, notes: Notes = SILENT) -> None:
    """Reads every weight of the checkpoints once. InputError if one is not finite."""
    for reader in readers:
        notes.doing(f"reading the weights of {reader.path}")
        reader.check_weights()


def teacher_of(source: CheckpointReader, name: str, teacher: str | None, notes: Notes = SILENT) -> CheckpointReader:
    """The checkpoint called `teacher`, else the manifest's root, else the checkpoint itself if it
    is not a hybrid."""
    if teacher is not None:
        return open_checkpoint(teacher, notes=notes)
    root = root_of(source.path)
    if root is not None:
        try:  # a path in a manifest must not start a download
            return open_checkpoint(root, network=False, notes=notes)
        except InputError as error:
            raise InputError(
                f"the teacher of {name} cannot be opened ({error}); name its location with {setting('teacher')}"
            ) from error
    if source.config.get("model_type") == "hybridize":
        raise InputError(f"{name} has no manifest that names its teacher; give {setting('teacher')}")
    return source


def data_for(data: str | None, teacher: CheckpointReader | None, notes: Notes = SILENT) -> str:
    """`data`, or if it is None the default that is found, which is noted."""
    found = find_data(data, None if teacher is None else teacher.path)
    if data is None:
        where = " (from $HYBRIDIZE_DATA)" if found == os.environ.get("HYBRIDIZE_DATA") else ""
        notes.note(f"{setting('data')} is not given: {found}{where} is used")
    return found


def found_data(source: CheckpointReader) -> str | None:
    """The default for `data`, or None. The teacher's own traces are searched on this disk only."""
    root = root_of(source.path)
    for folder in (source.path, *([Path(root)] if root is not None and Path(root).is_dir() else [])):
        try:
            return find_data(None, folder)
        except InputError:
            continue
    return None


def template_text(path: Path | None) -> str | None:
    """The text of a file with a chat template (Jinja), or None without a path."""
    if path is None:
        return None
    what = f"{setting('chat_template')} {path}"
    if not path.is_file():
        raise InputError(f"{what} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"{what} is empty")
    return text


def open_encoder(
    source: CheckpointReader, mask: str, chat_template: Path | None, trust_remote_code: bool, notes: Notes = SILENT
) -> Encoder:
    """An encoder of rows with the checkpoint's tokenizer and chat template."""
    notes.doing("reading the tokenizer")
    tokenizer = load_tokenizer(source.path, trust_remote_code)
    notes.doing("reading the data")  # all callers do so next
    return Encoder(tokenizer, mask, template_text(chat_template), source.config.get("vocab_size"))


def remark_on_rows(encoder: Encoder, notes: Notes) -> None:
    """Reports at the start of a run which keys of its rows are ignored, and which text has no loss."""
    if encoder.unread:
        notes.note(f"ignored keys of the rows: {', '.join(encoder.unread)}")
    for remark in encoder.remarks():
        notes.warn(remark)


def warn_of_length(source: CheckpointReader, seq_len: int, notes: Notes) -> None:
    """Warns if sequences are longer than the model's context."""
    room = source.config.get("max_position_embeddings")
    if isinstance(room, int) and seq_len > room:
        notes.warn(f"{setting('seq_len')} {seq_len} exceeds the model's context of {room} positions")


def windows_beside_teacher(
    source: CheckpointReader, name: str, teacher: str | None, data: str | None, encoder: Encoder, *, limit: int | None,
    windows: int, seq_len: int, batch_size: int, notes: Notes = SILENT,
) -> tuple[CheckpointReader, str, list[Batch]]:  # fmt: skip
    """What a comparison with the teacher needs: the teacher, the data's name, and held-out windows
    in batches."""
    origin = teacher_of(source, name, teacher, notes)
    check_vocabularies(source, origin)
    spec = data_for(data, origin, notes)
    corpus = open_corpus(spec, spec, encoder, limit)
    remark_on_rows(encoder, notes)
    batches = corpus.held_out(windows, seq_len, batch_size)
    if not batches:
        raise InputError(f"{spec} does not fill one window of {seq_len} tokens; give a smaller {setting('seq_len')}")
    return origin, corpus.rows.name, batches


def calibration_for(
    spec: str | None, source: CheckpointReader, kind: str, *, parts: str | None, tokens: int, device: str, seed: int,
    chat_template: Path | None, trust_remote_code: bool, notes: Notes = SILENT,
) -> Calibration | None:  # fmt: skip
    """Text from `spec` to calibrate new mixers of a kind on; None without a spec, or if the kind
    has nothing to calibrate."""
    known = kind_of(kind).parts
    chosen = frozenset(kind_of(kind).default_parts)
    if parts is not None:
        chosen = frozenset(part.strip() for part in parts.split(",") if part.strip())
    if known and (not chosen or chosen - set(known)):
        raise InputError(f"{setting('calibration_parts')} {parts!r}: choose from {','.join(known)}")
    if tokens < FEWEST:
        raise InputError(f"{setting('calibration_tokens')} {tokens} must be at least {FEWEST}")
    where = pick_device(device)
    if spec is None or not known:
        return None
    quiet_transformers()
    encoder = open_encoder(source, "none", chat_template, trust_remote_code, notes)
    rows = Rows.joined([part for part, _ in read_mixture(spec)])
    name = Path(spec).name if Path(spec).is_file() else spec
    longest = min(WINDOW, source.config.get("max_position_embeddings") or WINDOW)
    ids = sample_windows(rows, encoder, tokens, seed, longest)
    remark_on_rows(encoder, notes)
    return Calibration(ids, chosen, where, name)
