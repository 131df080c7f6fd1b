"""hybridize replace"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridize.options import CALIBRATION_TOKENS

from .shared import options as opt
from .shared.flags import expanded
from .shared.output import Output, guarded
from .shared.strip import draw_strip

if TYPE_CHECKING:
    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.checkpoint.scores import Scores
    from hybridize.surgery.replace import Calibration, Surgery
    from hybridize.surgery.teacher import Teacher

SMALL = 2 << 30  # bytes of weights up to which the result is verified by default
ENOUGH = 8  # calibration tokens per dimension that were better than none for mamba, see docs/results.md


@dataclass(frozen=True)
class Layers:
    """Which layers to convert, and which attention weights initialize them."""

    layers: Annotated[
        int | None, typer.Option("--layers", min=0, help="Number of Mamba layers in the result, old and new.")
    ] = None
    indices: Annotated[str | None, typer.Option("--indices", help="Indices of layers to convert, such as 3,5-8.")] = None
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Score file [default: the checkpoint's mmr, else restore, else loo].")
    ] = None
    init_from: Annotated[
        str, typer.Option("--init-from", help="Whose attention weights to start from: checkpoint (as they are now) or teacher.")
    ] = "checkpoint"
    teacher: opt.Teacher = None


@dataclass(frozen=True)
class Calibrating:
    """Text and settings for the calibration of new mixers."""

    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help="Text to calibrate on [default: as --data of distill, if there is any].")
    ] = None
    no_calibrate: opt.NoCalibrate = False
    calibration_tokens: opt.CalibrationTokens = CALIBRATION_TOKENS
    calibration_parts: Annotated[
        str | None,
        typer.Option("--calibration-parts", help="Some of z,conv,decay,scale,out [default: z,conv,decay,scale]."),
    ] = None
    chat_template: opt.ChatTemplate = None
    device: opt.Device = "auto"
    seed: opt.Seed = 0
    trust_remote_code: opt.TrustRemoteCode = False


@guarded
@expanded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    *,
    which: Layers,
    mixers: opt.NewMixers,
    calibrating: Calibrating,
    output: opt.Output = None,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Verify the conversion before it is kept [default: if below 2 GiB]."),
    ] = None,
    dry_run: opt.DryRun = False,
    speech: opt.Speech,
) -> None:
    """Reads a checkpoint and its scores; writes a checkpoint (h{N}/ when -o is omitted) with
    attention layers replaced.

    New Mamba layers are initialized from the attention's weights (Mamba-in-Llama) and calibrated on
    some text, if there is any. Layers with the lowest scores are converted first. Existing Mamba
    layers and everything else are copied bit for bit.
    """
    out = speech.output()
    _check_early(checkpoint, which, calibrating)
    from hybridize.checkpoint.writer import check_output

    plan = _prepare(out, checkpoint, revision, which, mixers, calibrating, output, verify)
    check_output(plan.target, overwrite or dry_run, plan.source.path, plan.donor.path)
    summary = plan.summary()  # raises if a tensor would be lost
    if dry_run:
        _show_plan(out, plan, summary)
        return
    proof = _convert(out, plan, calibrating, overwrite)
    _show_result(out, plan, {**summary, "proof": proof})


@dataclass(frozen=True)
class Plan:
    """A checked conversion before it starts. which: from the command line. unverified: why the
    conversion is not verified before the result is kept, or None if it is."""

    name: str
    source: CheckpointReader
    donor: CheckpointReader
    contract: Teacher
    surgery: Surgery
    fit: Calibration | None
    target: Path
    which: Layers
    unverified: str | None

    @property
    def total(self) -> int:
        """Number of Mamba layers in the result."""
        return len(self.contract.mixer_layers) + len(self.surgery.layers)

    @property
    def strip(self) -> str:
        """Layer types of the result, see draw_strip."""
        return draw_strip(self.contract.layer_types, self.surgery.layers)

    def summary(self) -> dict[str, Any]:
        """The plan for --json."""
        from hybridize.surgery.features import features
        from hybridize.surgery.verify import provenance

        return {
            "output": str(self.target), "converted": self.surgery.layers,
            "mamba_layers": sorted([*self.surgery.layers, *self.contract.mixer_layers]),
            "layers": len(self.contract.layer_types), "mixer": self.surgery.mixer, "init_from": self.which.init_from,
            "calibration": None if self.fit is None else self.fit.settings(), "features": features(self.source),
            "fates": provenance(self.source, self.surgery, self.donor),
        }  # fmt: skip


def _check_early(name: str, which: Layers, calibrating: Calibrating) -> None:
    """InputError for flags that contradict each other or a missing score file; runs before torch is
    imported."""
    from hybridize.errors import InputError, setting
    from hybridize.parsing import check_either

    check_either("say which layers", f"{setting('layers')} N", which.layers, f"{setting('indices')} LIST", which.indices)
    if which.init_from not in ("checkpoint", "teacher"):
        raise InputError(f"{setting('init_from')} must be checkpoint or teacher, not {which.init_from}")
    if which.teacher is not None and which.init_from != "teacher":
        raise InputError(f"{setting('teacher')} requires {setting('init_from')} teacher")
    if calibrating.calibrate is not None and calibrating.no_calibrate:
        raise InputError(f"{setting('calibrate')} and {setting('calibrate', False)} contradict each other")
    _check_scores(name, which)


def _check_scores(name: str, which: Layers) -> None:
    """InputError if a score file is needed and a local checkpoint has none, or if it is invalid."""
    from hybridize.checkpoint.json_files import read_json
    from hybridize.checkpoint.manifest import MIXER_LAYER
    from hybridize.checkpoint.scores import explain_no_scores, find_scores, read_scores
    from hybridize.errors import InputError

    if which.scores is not None:
        read_scores(which.scores)
        return
    config = Path(name) / "config.json"
    if which.layers is None or not config.is_file() or find_scores(Path(name), name) is not None:
        return
    raw = read_json(config)
    kinds, count = raw.get("layer_types"), raw.get("num_hidden_layers")
    done = kinds.count(MIXER_LAYER) if isinstance(kinds, list) else 0
    if isinstance(count, int) and done < which.layers <= count:
        raise InputError(explain_no_scores(Path(name), name))


def _prepare(
    out: Output, name: str, revision: str | None, which: Layers, mixers: opt.NewMixers, calibrating: Calibrating,
    output: Path | None, verify: bool | None,
) -> Plan:  # fmt: skip
    """Opens and checks everything that the conversion needs, and chooses the layers."""
    from hybridize.inputs import open_checkpoint, teacher_of
    from hybridize.surgery.replace import check_rules, plan
    from hybridize.surgery.select import Selection, choose_layers
    from hybridize.surgery.teacher import check_donor, read_teacher

    source = open_checkpoint(name, revision, notes=out)
    contract = read_teacher(source)
    selection = Selection(which.layers, which.indices, which.scores)
    chosen, ranking = choose_layers(source, name, contract, selection, out)
    surgery = plan(contract, chosen, mixers.settings())
    check_rules(source, surgery)
    donor = source
    if which.init_from == "teacher":
        donor = teacher_of(source, name, which.teacher, out)
        check_donor(donor, contract, chosen)
    fit = _calibration(out, source, contract, surgery, calibrating) if chosen else None
    _warn_of_scores(out, ranking, surgery, fit)
    target = output or Path(f"h{len(contract.mixer_layers) + len(chosen)}")
    return Plan(name, source, donor, contract, surgery, fit, target, which, _unverified(verify, source, surgery))


def _calibration(
    out: Output, source: CheckpointReader, contract: Teacher, surgery: Surgery, calibrating: Calibrating
) -> Calibration | None:
    """The calibration, or None; warns if there is no text or too little."""
    from hybridize.errors import InputError, setting
    from hybridize.inputs import calibration_for, found_data

    text = None if calibrating.no_calibrate else calibrating.calibrate or found_data(source)
    if text is None and not calibrating.no_calibrate and surgery.kind.parts:
        out.warn(
            f"no text to calibrate on ({setting('calibrate')} DATA, or a traces.jsonl here): the new layers start from "
            f"attention weights alone and need far more training; {setting('mixer')} mamba starts better without calibration"
        )
    try:
        fit = calibration_for(
            text, source, surgery.kind.kind, parts=calibrating.calibration_parts, tokens=calibrating.calibration_tokens,
            device=calibrating.device, seed=calibrating.seed, chat_template=calibrating.chat_template,
            trust_remote_code=calibrating.trust_remote_code, notes=out,
        )  # fmt: skip
    except InputError as error:
        if text is None or calibrating.calibrate is not None:
            raise
        raise InputError(f"{error} ({setting('calibrate', False)} skips the calibration)") from error
    if fit is not None and fit.ids.numel() < (enough := ENOUGH * max(contract.hidden, contract.inner)):
        out.warn(f"{fit.ids.numel()} calibration tokens are few and may be worse than none; use at least {enough}")
    return fit


def _warn_of_scores(out: Output, ranking: Scores | None, surgery: Surgery, fit: Calibration | None) -> None:
    """Warns if the layers were scored with other mixers than they get."""
    if ranking is None or surgery.mixer is None:
        return
    kind, init = surgery.mixer["kind"], "mil" if fit is None else "calibrated"
    if ranking.mixer not in (None, kind) or ranking.init not in (None, init):
        out.warn(f"the scores were measured with {ranking.mixer} mixers ({ranking.init}), not with {kind} ({init})")


def _unverified(required: bool | None, source: CheckpointReader, surgery: Surgery) -> str | None:
    """Why the conversion will not be verified, or None if it will. InputError if the user requires
    it and it is impossible."""
    from hybridize.errors import InputError, setting

    if not surgery.layers or surgery.mixer is None:
        return "no new mixers"
    if required is False:
        return "--no-verify was given"
    if not surgery.kind.can_verify(surgery.mixer):
        why = f"{surgery.mixer['kind']} mixers of this shape cannot be compared with attention heads"
        if required:
            raise InputError(f"{setting('verify')} is not possible: {why}")
        return why
    size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    return None if required or size <= SMALL else f"the checkpoint has more than {SMALL >> 30} GiB; --verify does it"


def _convert(out: Output, plan: Plan, calibrating: Calibrating, overwrite: bool) -> dict[str, Any] | None:
    """Writes the result; returns the report of its verification, or None if it was not verified."""
    from dataclasses import asdict

    from hybridize.checkpoint.reader import CheckpointReader
    from hybridize.runtime.device import pick_device
    from hybridize.surgery.replace import replace
    from hybridize.surgery.verify import verification_ids, verify_conversion

    proof: dict[str, Any] = {}

    def check(path: Path) -> None:
        if plan.unverified is None:
            out.progress("verifying")
            ids, text = verification_ids(plan.fit, plan.source.config, calibrating.seed)
            found = verify_conversion(
                plan.source, plan.donor, CheckpointReader(path), plan.surgery, plan.contract, ids,
                pick_device(calibrating.device), frozenset() if plan.fit is None else plan.fit.parts,
            )  # fmt: skip
            proof.update(asdict(found), text=text)

    which = plan.which
    settings = {
        "layers": which.layers, "indices": plan.surgery.layers, "mixer": plan.surgery.mixer, "init_from": which.init_from
    }  # fmt: skip
    replace(
        plan.source, plan.name, plan.surgery, plan.target, donor=plan.donor, init_from=which.init_from, seed=calibrating.seed,
        overwrite=overwrite, settings=settings, calibration=plan.fit, progress=out.progress, check=check,
    )  # fmt: skip
    out.progress(f"wrote {plan.target}", last=True)
    return proof or None


def _show_plan(out: Output, plan: Plan, summary: dict[str, Any]) -> None:
    """Shows from which weights the rows of each new tensor come."""
    targets = [target for made in plan.surgery.targets.values() for target in made]
    rows = [{"target": t.name, "shape": list(t.shape), "rows": t.describe(plan.fit is not None)} for t in targets]

    def human() -> None:
        for entry in rows:
            print(f"{entry['target']} {entry['shape']}: {entry['rows']}")
        print(f"{plan.strip}; all other tensors are copied unchanged")
        _show_features(summary["features"])

    out.result({**summary, "dry_run": True, "plan": rows}, human)


def _show_result(out: Output, plan: Plan, summary: dict[str, Any]) -> None:
    """Shows the new layers and the result of the verification."""
    chosen, proof = plan.surgery.layers, summary["proof"]

    def human() -> None:
        print(f"{plan.target}: {plan.total} of {len(plan.contract.layer_types)} layers are Mamba, {len(chosen)} new: {chosen}")
        print(plan.strip)
        if chosen:
            _show_features(summary["features"])
        if plan.fit is not None:
            done = plan.fit.settings()
            print(f"calibrated {', '.join(done['parts'])} on {done['tokens']} tokens of {done['data']}")
        elif chosen:
            print("not calibrated")
        if chosen and not proof:
            print(f"not verified: {plan.unverified}")
        if proof:
            worst = ", ".join(f"{name} {value:.1e}" for name, value in proof["worst"].items())
            on = "random tokens" if proof["text"] is None else f"tokens of {proof['text']}"
            print(f"verified on {proof['tokens']} {on}; largest deviations from the attention: {worst}")

    out.result(summary, human)


def _show_features(found: dict[str, str]) -> None:
    """One line per feature of the attention, with what becomes of it."""
    for has, becomes in found.items():
        print(f"  {has}: {becomes}")
