"""Memory, FLOPs and hours of a training run before it starts, also in a chain of steps whose
checkpoints do not exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.checkpoint.manifest import MIXER_LAYER, root_of
from hybridize.errors import InputError, setting
from hybridize.parsing import check_either, parse_indices

from .output import Output
from .training_settings import settings_of

if TYPE_CHECKING:
    from hybridize.distillation.fitting import Expected


def plan_lines(found: Expected, ranks: int, device: str) -> list[str]:
    """A plan as lines of text."""
    from hybridize.distillation.plan import GIB

    plan, settings = found.plan, found.settings
    lines = [f"{name:28} {value / GIB:9.2f} GiB" for name, value in plan.bytes.items()]
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    lines.append(f"{'at the peak':28} {plan.total / GIB:9.2f} GiB{each}")
    if found.fitted:
        rows = settings.batch_size // ranks
        lines.append(f"{settings.micro} of {rows} sequences at once, fitted to the free memory (--micro-batch-size)")
    lines.append(f"{plan.tokens:,} tokens, {plan.flops:.2e} FLOPs, {found.hours:.2f} hours on {device} at {found.share}")
    return lines


def plan_json(found: Expected, device: str) -> dict[str, Any]:
    """A plan for --json."""
    from hybridize.distillation.plan import GIB

    plan = found.plan
    parts = {name: round(value / GIB, 3) for name, value in plan.bytes.items()}
    sums = {"total_gib": round(plan.total / GIB, 3), "tokens": plan.tokens, "flops": plan.flops, "hours": found.hours}
    return {"gib": parts, **sums, "micro_batch_size": found.settings.micro, "device": device}


class Planned:
    """The chain so far: config and root teacher of each checkpoint that an earlier step would
    write."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self.made: dict[str, tuple[dict[str, Any], str]] = {}

    def follow(self, command: str, params: dict[str, Any]) -> None:
        """Adds the checkpoint that a step would write."""
        if command not in ("replace", "distill"):
            return
        source = str(params["checkpoint"])
        config, root = self._config(source)
        name = f"{Path(source).name}-kd"
        if command == "replace":
            config = self._replaced(config, root, params)
            name = f"h{config['layer_types'].count(MIXER_LAYER)}"
        self.made[_key(params["output"] or name)] = config, root

    def of(self, command: str, params: dict[str, Any], ranks: int) -> dict[str, Any] | None:
        """Shows and returns the plan of a training step; None for other steps. ranks: processes."""
        if command != "distill":
            return None
        from hybridize.distillation.fitting import expected
        from hybridize.distillation.losses import Loss
        from hybridize.inputs import open_checkpoint
        from hybridize.runtime.device import planned_on

        settings = settings_of(params, params["config"])
        config, root = self._config(str(params["checkpoint"]))
        teacher = None
        if Loss.parse(settings.loss, settings.temperature).needs_teacher or settings.stage == "align":
            teacher = open_checkpoint(str(params["teacher"] or root), notes=self.out).config
        where, compute = planned_on(params["device"], params["dtype"])
        found = expected(config, teacher, settings, ranks, where, compute)
        if not self.out.as_json and not self.out.quiet:
            print("\n".join(f"    {line}" for line in plan_lines(found, ranks, where.type)))
        return plan_json(found, where.type)

    def _config(self, name: str) -> tuple[dict[str, Any], str]:
        """Config and root teacher of a checkpoint that exists or that an earlier step would
        write."""
        if (found := self.made.get(_key(name))) is not None:
            return found
        from hybridize.inputs import open_checkpoint

        if not Path(name).exists() and "/" not in name.strip("./"):
            raise InputError(f"{name} does not exist, and no earlier step writes it")
        reader = open_checkpoint(name, notes=self.out)
        return reader.config, root_of(reader.path) or name

    def _replaced(self, config: dict[str, Any], root: str, params: dict[str, Any]) -> dict[str, Any]:
        """The config with layers replaced. The lowest layers stand in for those that scores will
        choose, since they cost the same."""
        from hybridize.inputs import open_checkpoint
        from hybridize.surgery.replace import MixerSettings, hybrid_json, plan
        from hybridize.surgery.teacher import read_teacher

        layers, indices = params["layers"], params["indices"]
        check_either("say which layers", f"{setting('layers')} N", layers, f"{setting('indices')} LIST", indices)
        reader = open_checkpoint(root, notes=self.out)
        contract = read_teacher(reader)
        done = [layer for layer, kind in enumerate(config.get("layer_types") or []) if kind == MIXER_LAYER]
        if indices is not None:
            chosen = sorted({*done, *parse_indices(indices)})
        else:
            others = [layer for layer in contract.attention_layers if layer not in done]
            chosen = sorted([*done, *others[: max(0, layers - len(done))]])
        settings = MixerSettings(*(params[key] for key in ("mixer", "d_state", "d_conv", "dt_rank", "expand")))
        before = config.get("mixer")
        if before is not None and settings == MixerSettings():
            settings = MixerSettings(before["kind"])
        return hybrid_json(reader.config, plan(contract, chosen, settings))


def _key(path: Any) -> str:
    return str(Path(str(path)).resolve())
