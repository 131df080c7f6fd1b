"""hybridize replace"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import options as opt
from .shared.models import calibration_for, found_data, open_checkpoint, teacher_of
from .shared.output import Output, guarded
from .shared.strip import draw_strip

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.checkpoint.scores import Scores
    from hybridize.surgery.replace import Calibration, Surgery
    from hybridize.surgery.teacher import Teacher

SMALL = 2 << 30  # bytes of weights up to which the result is verified unasked
PROVE = (2, 128)  # rows and tokens
ENOUGH = 8  # calibration tokens a dimension from which it was better than none, see docs/results.md


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    layers: Annotated[int | None, typer.Option("--layers", min=0, help="Mamba layers in the result, old and new.")] = None,
    indices: Annotated[str | None, typer.Option("--indices", help="Layers to convert, by index: 3,5-8.")] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Ranking [default: the checkpoint's mmr, else restore, else loo].")
    ] = None,
    init_from: Annotated[
        str, typer.Option("--init-from", help="Whose attention weights: checkpoint (as they are now) or teacher.")
    ] = "checkpoint",
    teacher: opt.Teacher = None,
    mixer: opt.Mixer = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help="Text to calibrate on [default: as --data elsewhere, if there is any].")
    ] = None,
    no_calibrate: opt.NoCalibrate = False,
    calibration_tokens: opt.CalibrationTokens = opt.CALIBRATION_TOKENS,
    calibration_parts: opt.CalibrationParts = opt.CALIBRATION_PARTS,
    chat_template: opt.ChatTemplate = None,
    d_state: opt.DState = None,
    d_conv: opt.DConv = None,
    dt_rank: opt.DtRank = None,
    expand: opt.Expand = None,
    output: opt.Output = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    trust_remote_code: opt.TrustRemoteCode = False,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Prove the result before it is kept [default: if it is below 2 GiB]."),
    ] = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint and its scores; writes a checkpoint (h{N}/ when -o is omitted) with attention layers replaced.

    New Mamba layers start from the attention's own weights (Mamba-in-Llama) and are calibrated on a little text, where there is
    any. The layers with the lowest scores go first; layers that are Mamba already stay as they are, and everything else is
    copied bit for bit.
    """
    out = Output(as_json, quiet)
    from hybridize.errors import InputError

    if (layers is None) == (indices is None):
        raise InputError("say which layers: either --layers N or --indices LIST")
    if init_from not in ("checkpoint", "teacher"):
        raise InputError(f"--init-from is checkpoint or teacher, not {init_from}")
    if teacher is not None and init_from != "teacher":
        raise InputError("--teacher has no use without --init-from teacher")
    if calibrate is not None and no_calibrate:
        raise InputError("--calibrate and --no-calibrate contradict each other")
    _check_scores(checkpoint, layers, scores)
    from hybridize.checkpoint.writer import check_output
    from hybridize.surgery.features import features
    from hybridize.surgery.replace import MixerSettings, plan, replace
    from hybridize.surgery.teacher import read_teacher
    from hybridize.surgery.verify import fates

    source = open_checkpoint(checkpoint, revision)
    contract = read_teacher(source)
    chosen, ranking = _choose(source, checkpoint, contract, layers, indices, scores, out)
    total = len(contract.mixer_layers) + len(chosen)
    target = output or Path(f"h{total}")
    surgery = plan(contract, chosen, MixerSettings(mixer, d_state, d_conv, dt_rank, expand))
    donor = teacher_of(source, checkpoint, teacher) if init_from == "teacher" else source
    check_output(target, overwrite or dry_run, source.path, donor.path)
    if donor is not source:
        _check_donor(donor, checkpoint, contract, chosen)
    text = None if no_calibrate or not chosen else calibrate or found_data(source)
    if chosen and text is None and not no_calibrate:
        out.warn(
            "no text to calibrate on (--calibrate DATA, or a traces.jsonl here): the new layers start from attention "
            "weights alone and will need far more training; --mixer mamba starts better so"
        )
    try:
        fit = calibration_for(
            out, text, source, calibration_parts, calibration_tokens, device, seed, chat_template, trust_remote_code
        )  # fmt: skip
    except InputError as error:
        if text is None or calibrate is not None:
            raise
        raise InputError(f"{error} (--no-calibrate does without)") from error
    if fit is not None and fit.ids.numel() < (enough := ENOUGH * max(contract.hidden, contract.inner)):
        out.warn(f"{fit.ids.numel()} tokens are little to calibrate on and may be worse than none; {enough} are enough here")
    init = "mil" if fit is None else "calibrated"
    if ranking is not None and surgery.mixer is not None:
        kind = surgery.mixer["kind"]
        if ranking.mixer not in (None, kind) or ranking.init not in (None, init):
            out.warn(f"the scores were measured with {ranking.mixer} mixers ({ranking.init}), not with {kind} ({init})")
    strip = draw_strip(contract.layer_types, chosen)
    summary: dict[str, Any] = {
        "output": str(target), "converted": chosen, "mamba_layers": sorted([*chosen, *contract.mixer_layers]),
        "layers": len(contract.layer_types), "mixer": surgery.mixer, "init_from": init_from,
        "calibration": None if fit is None else fit.settings(), "features": features(source),
        "fates": fates(source, surgery, donor),
    }  # fmt: skip
    proving = _wanted(verify, source, surgery)
    if dry_run:
        plans = [
            {"target": t.name, "shape": list(t.shape), "rows": t.describe(fit is not None)}
            for ts in surgery.targets.values()
            for t in ts
        ]

        def show() -> None:
            for entry in plans:
                print(f"{entry['target']} {entry['shape']}: {entry['rows']}")
            print(f"{strip}; all other tensors are copied as they are")
            _show_features(summary["features"])

        out.result({**summary, "dry_run": True, "plan": plans}, show)
        return
    proven: dict[str, Any] = {}

    def check(path: Path) -> None:
        if chosen and proving:
            out.progress("verifying")
            proven.update(_prove(source, donor, path, surgery, contract, fit, device, seed))

    settings = {"layers": layers, "indices": chosen, "mixer": surgery.mixer, "init_from": init_from}
    replace(
        source, checkpoint, surgery, target, donor=donor, init_from=init_from, seed=seed, overwrite=overwrite,
        settings=settings, calibration=fit, progress=out.progress, check=check,
    )  # fmt: skip
    out.progress(f"wrote {target}", last=True)
    summary["proof"] = proven or None

    def human() -> None:
        print(f"{target}: {total} of {len(contract.layer_types)} layers are Mamba, {len(chosen)} new: {chosen}")
        print(strip)
        if chosen:
            _show_features(summary["features"])
        if proven:
            _show_proof(proven)

    out.result(summary, human)


def _show_features(found: dict[str, str]) -> None:
    for has, becomes in found.items():
        print(f"  {has}: {becomes}")


def _show_proof(proven: dict[str, Any]) -> None:
    worst = ", ".join(f"{name} {value:.1e}" for name, value in proven["worst"].items())
    on = "random tokens" if proven["text"] is None else f"tokens of {proven['text']}"
    print(f"verified on {proven['tokens']} {on}; largest deviations from the attention: {worst}")


def _wanted(verify: bool | None, source: CheckpointReader, surgery: Surgery) -> bool:
    """Whether to prove the result; InputError where that is asked for and impossible."""
    from hybridize.errors import InputError

    other = surgery.mixer is not None and surgery.mixer.get("expand") == "chunk"
    if verify and other:
        raise InputError("--verify cannot be had with --expand chunk, which pairs other parts of heads than the attention does")
    small = sum(file.stat().st_size for file in source.path.glob("*.safetensors")) <= SMALL
    return bool(verify) or (verify is None and small and not other)


def _prove(
    source: CheckpointReader, donor: CheckpointReader, path: Path, surgery: Surgery, contract: Teacher, fit: Calibration | None,
    device: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The proof as a dictionary; WorkError where it fails. On text where there is some, else on random tokens."""
    from dataclasses import asdict

    import torch

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.modeling import hybrid_config
    from hybridize.runtime.device import pick_device
    from hybridize.surgery.verify import prove

    parts = frozenset[str]() if fit is None else fit.parts
    if fit is not None:
        ids, text = fit.ids[: PROVE[0], : PROVE[1]], fit.data
    else:
        high, draw = min(hybrid_config(source.config).vocab_size, 1 << 15), torch.Generator().manual_seed(seed)
        ids, text = torch.randint(0, high, PROVE, generator=draw), None
    proof = prove(source, donor, CheckpointReader(path), surgery, contract, ids, pick_device(device), parts)
    return {**asdict(proof), "text": text}


def _choose(
    source: CheckpointReader, name: str, contract: Teacher, layers: int | None, indices: str | None, scores: Path | None,
    out: Output,
) -> tuple[list[int], Scores | None]:  # fmt: skip
    """The layers to convert, and the ranking that chose them, if one did."""
    from hybridize.checkpoint.manifest import ancestors
    from hybridize.checkpoint.scores import find_scores, read_scores
    from hybridize.errors import InputError
    from hybridize.parsing import parse_indices
    from hybridize.surgery.select import astride, check_indices, lowest, needed

    if indices is not None:
        if scores is not None:
            raise InputError("--scores has no use beside --indices")
        return check_indices(contract, parse_indices(indices)), None
    assert layers is not None
    count = needed(contract, layers)
    if not count:
        return [], None
    path = scores or find_scores(source.path, name)
    if path is None:
        raise InputError(_no_scores(source.path, name))
    ranking, inherited = read_scores(path), False
    if ranking.checkpoint != source.hash:
        line = ancestors(source.path)
        if ranking.checkpoint not in line:
            raise InputError(f"{path} was measured on another checkpoint than {name}; score this one")
        inherited = True
        out.warn(
            f"{path} was measured on {line[ranking.checkpoint]}, which {name} was made from: its scores know nothing of what "
            "has been converted and trained since"
        )
    out.note(f"layers by {path} ({ranking.kind}, {ranking.metric})")
    try:
        chosen = lowest(contract, ranking, count, inherited)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    cut = max(place for place, layer in enumerate(ranking.ranking(), 1) if layer in chosen)  # layers below it may be gone
    tied = [layer for layer in astride(ranking.layers, cut) if layer not in contract.mixer_layers]
    if tied:
        names = ", ".join(map(str, tied))
        out.warn(f"the cut after {count} layers falls inside a tie: {names} could be on either side of it (90% of resamples)")
    return chosen, ranking


def _check_scores(name: str, layers: int | None, scores: Path | None) -> None:
    """InputError where a ranking is needed and a local checkpoint has none, or it is no ranking; before torch is imported."""
    from hybridize.checkpoint.json_files import read_json
    from hybridize.checkpoint.scores import find_scores, read_scores
    from hybridize.errors import InputError

    if scores is not None:
        read_scores(scores)
        return
    config = Path(name) / "config.json"
    if layers is None or not config.is_file() or find_scores(Path(name), name) is not None:
        return
    raw = read_json(config)
    kinds, count = raw.get("layer_types"), raw.get("num_hidden_layers")
    done = kinds.count("linear_attention") if isinstance(kinds, list) else 0
    if isinstance(count, int) and done < layers <= count:
        raise InputError(_no_scores(Path(name), name))


def _no_scores(path: Path, name: str) -> str:
    """What to do without scores; an ancestor's are named, if there are such."""
    from hybridize.checkpoint.manifest import ancestors
    from hybridize.checkpoint.scores import find_scores

    told = f"{name} has no scores; run score-loo, score-mmr or score-restore first, or name layers with --indices"
    for place in ancestors(path).values():
        found = find_scores(Path(place), place)
        if found is not None:
            return f"{told}; --scores {found} takes those of {place}, which it was made from"
    return told


def _check_donor(donor: CheckpointReader, name: str, contract: Teacher, chosen: list[int]) -> None:
    """InputError unless `donor` has attention of the same shape in all layers that need it."""
    from hybridize.errors import InputError
    from hybridize.surgery.teacher import read_teacher

    origin = read_teacher(donor)
    ours, theirs = ((t.hidden, t.heads, t.kv_heads, t.head_dim) for t in (contract, origin))
    if ours != theirs:
        raise InputError(f"{donor.path} has another attention shape than {name}")
    ours, theirs = ((t.tensors, t.scale, t.norm_bc, t.eps) for t in (contract, origin))  # type: ignore[assignment]
    if ours != theirs:
        raise InputError(f"{donor.path} has another attention than {name}: other biases, norms, tensors or another scale")
    lacking = [layer for layer in chosen if layer not in origin.attention_layers]
    if lacking:
        raise InputError(f"{donor.path} has no attention in layer {lacking[0]} to start from")
