"""What a training run will take, shown before it begins; also of a chain of steps whose checkpoints are not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridize.errors import InputError

from .models import is_here, open_checkpoint
from .output import LESS_MEMORY, Output
from .training_settings import settings_of

ROOM = 0.9  # share of the free memory that a plan may fill


def check_run(settings: Any, source: Any, ranks: Any) -> None:
    """InputError when the run cannot be of these layers or on so many ranks, whatever the device."""
    from hybridize.modeling import mixer_class

    ranks.share(settings.batch_size, "batch_size")
    settings.sharded(ranks.size)
    mixer = source.config.get("mixer")
    if settings.cuda_graph and settings.mask != "none" and mixer and not mixer_class(mixer).graphs_documents:
        raise InputError(
            f"--cuda-graph with documents side by side cannot hold {mixer['kind']} layers; --mask none has no documents"
        )
    settings.recomputed(source.config.get("num_hidden_layers", 0))


def show_plan(out: Output, source: Any, teacher: Any, settings: Any, device: str, dtype: str) -> None:
    """Says what the run takes on the device that would run it."""
    from hybridize.runtime.device import planned_on
    from hybridize.runtime.distributed import Ranks, world_size

    ranks = world_size()
    check_run(settings, source, Ranks(0, ranks))
    where, compute = planned_on(device, dtype)
    theirs = None if teacher is None else teacher.config
    figures, lines = training_plan(source.config, theirs, settings, ranks, where, compute)
    out.result(figures, lambda: print("\n".join(lines)))


def training_plan(
    student: dict[str, Any], teacher: dict[str, Any] | None, settings: Any, ranks: int, where: Any, compute: Any
) -> tuple[dict[str, Any], list[str]]:
    """The plan of a run from the configs of student and teacher alone: its figures, and lines that show them."""
    from dataclasses import replace

    from hybridize.distillation.plan import GIB, micro_that_fits, plan
    from hybridize.distillation.watch import expected_flops
    from hybridize.runtime.device import free_memory
    from hybridize.surgery.teacher import empty_model

    ours, theirs = (None if raw is None else empty_model(raw, "the checkpoint") for raw in (student, teacher))
    chosen = None
    if settings.micro_batch_size is None and settings.stage != "align" and is_here(where):
        chosen, _ = micro_that_fits(ours, theirs, settings, ranks, compute, where.type, ROOM * free_memory(where))
        settings = replace(settings, micro_batch_size=chosen)
    found = plan(ours, theirs, settings, ranks, compute, where.type)
    speed, share = expected_flops(where, student["hidden_size"])
    hours = found.flops / (speed * ranks) / 3600

    lines = [f"{name:28} {value / GIB:9.2f} GiB" for name, value in found.bytes.items()]
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    lines.append(f"{'at the peak':28} {found.total / GIB:9.2f} GiB{each}")
    if chosen is not None:
        lines.append(f"{chosen} of {settings.batch_size // ranks} sequences at once, by what is free here (--micro-batch-size)")
    lines.append(f"{found.tokens:,} tokens, {found.flops:.2e} FLOPs, {hours:.2f} hours on {where.type} at {share}")
    parts = {name: round(value / GIB, 3) for name, value in found.bytes.items()}
    sums = {"total_gib": round(found.total / GIB, 3), "tokens": found.tokens, "flops": found.flops, "hours": hours}
    return {"gib": parts, **sums, "micro_batch_size": settings.micro, "device": where.type}, lines


def with_micro(out: Output, source: Any, teacher: Any, settings: Any, where: Any, compute: Any, ranks: Any) -> Any:
    """The settings with the sequences at once that fit into what memory is free, where nobody has said how many."""
    from dataclasses import replace

    from hybridize.distillation.plan import GIB, micro_that_fits
    from hybridize.runtime.device import free_memory
    from hybridize.surgery.teacher import empty_model

    if settings.micro_batch_size is not None or settings.stage == "align":
        return settings
    student, origin = (None if r is None else empty_model(r.config, str(r.path)) for r in (source, teacher))
    free = free_memory(where)
    fits, wanted = micro_that_fits(student, origin, settings, ranks.size, compute, where.type, ROOM * free)
    micro = min(ranks.all(fits))
    if not ranks.main:
        return replace(settings, micro_batch_size=micro)
    told = f"the plan takes {wanted / GIB:.1f} GiB, {free / GIB:.1f} are free"
    if micro < settings.batch_size // ranks.size:
        out.note(f"{micro} of {settings.batch_size // ranks.size} sequences at once (--micro-batch-size): {told}")
    if wanted > free:
        out.warn(f"{told}: it may run out of memory; {LESS_MEMORY}")
    return replace(settings, micro_batch_size=micro)


class Planned:
    """The chain so far: for each checkpoint that a step would write, its config and the teacher it comes from."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.made: dict[str, tuple[dict[str, Any], str]] = {}

    def follow(self, command: str, params: dict[str, Any]) -> None:
        """Takes up what a step would write."""
        if command not in ("replace", "distill"):
            return
        source = str(params["checkpoint"])
        config, root = self._config(source)
        name = Path(source).name
        if command == "replace":
            config = self._replaced(config, root, params)
            name = f"h{config['layer_types'].count('linear_attention')}"
        self.made[_key(params["output"] or (name if command == "replace" else f"{name}-kd"))] = config, root

    def of(self, command: str, params: dict[str, Any], ranks: int) -> dict[str, Any] | None:
        """Shows the plan of a step that trains, on so many ranks; None for others."""
        if command != "distill":
            return None
        from hybridize.distillation.losses import Loss
        from hybridize.runtime.device import planned_on

        settings = settings_of(params)
        config, root = self._config(str(params["checkpoint"]))
        teacher = None
        if Loss.parse(settings.loss, settings.temperature).needs_teacher or settings.stage == "align":
            teacher = open_checkpoint(str(params["teacher"] or root)).config
        where, compute = planned_on(params["device"], params["dtype"])
        figures, lines = training_plan(config, teacher, settings, ranks, where, compute)
        if not self.out.as_json and not self.out.quiet:
            print("\n".join(f"    {line}" for line in lines))
        return figures

    def _config(self, name: str) -> tuple[dict[str, Any], str]:
        """Config and teacher of a checkpoint that a step before would write, or that is there."""
        if (found := self.made.get(_key(name))) is not None:
            return found
        from hybridize.checkpoint.manifest import root_of

        if not Path(name).exists() and "/" not in name.strip("./"):
            raise InputError(f"{name} is not there, and no step before writes it")
        reader = open_checkpoint(name)
        return reader.config, root_of(reader.path) or name

    @staticmethod
    def _replaced(config: dict[str, Any], root: str, params: dict[str, Any]) -> dict[str, Any]:
        """The config with so many layers replaced; the lowest stand for those that scores will choose, which cost the same."""
        from hybridize.parsing import parse_indices
        from hybridize.surgery.replace import MixerSettings, hybrid_json, plan
        from hybridize.surgery.teacher import read_teacher

        if (params["layers"] is None) == (params["indices"] is None):
            raise InputError("say which layers: either --layers N or --indices LIST")
        reader = open_checkpoint(root)
        contract = read_teacher(reader)
        kinds = config.get("layer_types") or []
        done = [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]
        if params["indices"] is not None:
            chosen = sorted({*done, *parse_indices(params["indices"])})
        else:
            others = [layer for layer in contract.attention_layers if layer not in done]
            chosen = sorted([*done, *others[: max(0, params["layers"] - len(done))]])
        asked = MixerSettings(*(params[key] for key in ("mixer", "d_state", "d_conv", "dt_rank", "expand")))
        before = config.get("mixer")
        if before is not None and asked == MixerSettings():
            asked = MixerSettings(before["kind"])
        return hybrid_json(reader.config, plan(contract, chosen, asked))


def _key(path: Any) -> str:
    return str(Path(str(path)).resolve())
