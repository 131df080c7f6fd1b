"""hybridize replace"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .models import open_checkpoint, teacher_of
from .output import Output, guarded


@guarded
def command(
    checkpoint: opt.Checkpoint = "./teacher",
    layers: Annotated[int | None, typer.Option("--layers", min=0, help="Mamba layers in the result, old and new.")] = None,
    indices: Annotated[str | None, typer.Option("--indices", help="Layers to convert, by index: 3,5-8.")] = None,
    scores: Annotated[Path | None, typer.Option("--scores", help="Ranking [default: the checkpoint's mmr, else loo].")] = None,
    init_from: Annotated[
        str, typer.Option("--init-from", help="Whose attention weights: checkpoint (as they are now) or teacher.")
    ] = "checkpoint",
    teacher: opt.Teacher = None,
    d_state: opt.DState = None,
    d_conv: opt.DConv = None,
    dt_rank: opt.DtRank = None,
    expand: opt.Expand = None,
    output: opt.Output = None,
    seed: opt.Seed = 0,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Reads a checkpoint and its scores; writes a checkpoint (h{N}/ when -o is omitted) with attention layers replaced.

    New Mamba layers start from the attention's own weights (Mamba-in-Llama). The layers with the lowest scores go first;
    layers that are Mamba already stay as they are, and everything else is copied bit for bit.
    """
    out = Output(as_json, quiet)
    from hybridize.checkpoint.scores import find_scores, read_scores
    from hybridize.checkpoint.writer import check_output
    from hybridize.errors import InputError
    from hybridize.surgery.replace import MixerSettings, plan, replace
    from hybridize.surgery.select import check_indices, lowest, needed, parse_indices
    from hybridize.surgery.teacher import read_teacher

    if (layers is None) == (indices is None):
        raise InputError("say which layers: either --layers N or --indices LIST")
    if init_from not in ("checkpoint", "teacher"):
        raise InputError(f"--init-from is checkpoint or teacher, not {init_from}")
    source = open_checkpoint(checkpoint, revision)
    contract = read_teacher(source)
    if indices is not None:
        if scores is not None:
            raise InputError("--scores has no use beside --indices")
        chosen = check_indices(contract, parse_indices(indices))
    else:
        assert layers is not None
        count, chosen = needed(contract, layers), []
        if count:
            path = scores or find_scores(source.path, checkpoint)
            if path is None:
                raise InputError(f"{checkpoint} has no scores; run score-loo or score-mmr first, or name layers with --indices")
            ranking = read_scores(path)
            if ranking.checkpoint != source.hash:
                raise InputError(f"{path} was measured on another checkpoint than {checkpoint}; score this one")
            chosen = lowest(contract, ranking, count)
            out.note(f"layers by {path} ({ranking.kind}, {ranking.metric})")
            if ranking.mixer not in (None, "mamba") or ranking.init not in (None, "mil"):
                out.warn(f"{path} was measured with {ranking.mixer} mixers started by {ranking.init}, not with mamba by mil")
    total = len(contract.mixer_layers) + len(chosen)
    target = output or Path(f"h{total}")
    if teacher is not None and init_from != "teacher":
        raise InputError("--teacher has no use without --init-from teacher")
    surgery = plan(contract, chosen, MixerSettings(d_state, d_conv, dt_rank, expand))
    donor = teacher_of(source, checkpoint, teacher) if init_from == "teacher" else source
    check_output(target, overwrite or dry_run, source.path, donor.path)
    if donor is not source:
        origin = read_teacher(donor)
        if (origin.hidden, origin.heads, origin.kv_heads, origin.head_dim) != (
            contract.hidden, contract.heads, contract.kv_heads, contract.head_dim,
        ):  # fmt: skip
            raise InputError(f"{donor.path} has another attention shape than {checkpoint}")
        lacking = [layer for layer in chosen if layer not in origin.attention_layers]
        if lacking:
            raise InputError(f"{donor.path} has no attention in layer {lacking[0]} to start from")
    strip = "".join(
        "N" if i in chosen else "M" if i in contract.mixer_layers else "a" for i in range(len(contract.layer_types))
    )
    summary = {
        "output": str(target), "converted": chosen, "mamba_layers": sorted([*chosen, *contract.mixer_layers]),
        "layers": len(contract.layer_types), "mixer": surgery.mixer, "init_from": init_from,
    }  # fmt: skip
    if dry_run:
        plans = [{"target": t.name, "shape": list(t.shape), "rows": t.describe()} for t in surgery.targets]

        def show() -> None:
            for entry in plans:
                print(f"{entry['target']} {entry['shape']}: {entry['rows']}")
            print(f"{strip}   (N new Mamba, M Mamba, a attention); all other tensors are copied as they are")

        out.result({**summary, "dry_run": True, "plan": plans}, show)
        return
    settings = {"layers": layers, "indices": chosen, "mixer": surgery.mixer, "init_from": init_from}
    replace(
        source, checkpoint, surgery, target, donor=donor, init_from=init_from, seed=seed, overwrite=overwrite,
        settings=settings, progress=lambda name: out.progress(f"writing {name}"),
    )  # fmt: skip
    out.progress(f"wrote {target}", last=True)

    def human() -> None:
        print(f"{target}: {total} of {len(contract.layer_types)} layers are Mamba, {len(chosen)} new: {chosen}")
        print(f"{strip}   (N new Mamba, M Mamba, a attention)")

    out.result(summary, human)
