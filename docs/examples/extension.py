"""One of each: a mixer, a family, an export format, a scorer and a loss, as a package outside of
hybridize adds them.

HYBRIDIZE_EXTENSIONS=docs/examples/extension.py hybridize replace teacher --indices 1,3 \
  --mixer retention
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from hybridize.checkpoint.manifest import Manifest
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.checkpoint.scores import LayerScore
from hybridize.checkpoint.writer import CheckpointWriter
from hybridize.distillation.losses import DIVERGENCES, Terms
from hybridize.export.formats import Format, register_format
from hybridize.export.formats.base import check_hybrid
from hybridize.export.verify import BOUND, Reference, Verdict, judge
from hybridize.modeling import HybridConfig, Mixer, register_mixer, ssd_scan
from hybridize.modeling.mixer import document_starts
from hybridize.options import option
from hybridize.runtime.loading import load_model
from hybridize.scoring.scorers import Scorer, register_scorer
from hybridize.scoring.setup import Ranking, Setup
from hybridize.surgery.calibrate import channel_ratio, decays, pass_through
from hybridize.surgery.families import FamilySpec, register_family
from hybridize.surgery.mapping import Rows, Target
from hybridize.surgery.mixers import MixerKind, register_kind
from hybridize.surgery.mixers.base import attention_rows, norm_targets, output_targets
from hybridize.surgery.observe import LayerObservation
from hybridize.surgery.teacher import Teacher

# --8<-- [start:mixer]
STEP = math.log(2)  # the step size of ssd_scan at step parameters of zero: softplus(0)


@register_mixer
class RetentionMixer(Mixer):
    """Linear attention whose heads forget at a rate of their own, the same for every token (RetNet,
    2307.08621).

    in_proj rows, in order: x, B and C, each as wide as the query heads; convolution and SiLU over
    all.
    """

    kind = "retention"
    sizes = ("d_inner", "d_state", "d_conv")

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        shape = config.mixer
        assert shape is not None
        self.layer_idx, self.inner, self.head = layer_idx, shape["d_inner"], shape["d_state"]
        self.heads, wide = self.inner // self.head, 3 * self.inner
        self.in_proj = nn.Linear(config.hidden_size, wide, bias=shape.get("in_bias", False))
        self.conv1d = nn.Conv1d(wide, wide, shape["d_conv"], groups=wide, bias=True)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=shape.get("out_bias", False))
        self._add_norms(shape, self.head, self.inner, self.inner, config.rms_norm_eps)
        self.reset_parameters()

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.heads, self.head, self.head

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As MambaMixer.forward: [B, T, D] -> ([B, T, D], None)."""
        cache = past_key_values if cache is None else cache
        x, state = self._convolve(self.project(hidden_states), attention_mask, cache, seq_idx)
        kwargs = {"mask": attention_mask, "reset": document_starts(seq_idx), "state": state}
        y, last = self.scan(x, inplace=self._steps(cache, x), **kwargs)
        self._store(cache, last)
        return self.out_proj(y), None

    def project(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] -> x, B and C side by side [B, T, 3 I]."""
        x, B, C = self.in_proj(hidden_states).chunk(3, -1)
        return torch.cat([x, self.B_norm(B), self.C_norm(C)], -1)

    def scan(self, xBC: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, T, 3 I] -> [B, T, I] and the last state; kwargs: see ssd_scan."""
        x, B, C = (part.unflatten(-1, (-1, self.head)) for part in xBC.chunk(3, -1))
        still = xBC.new_zeros(self.heads, dtype=torch.float32)
        steps = xBC.new_zeros(*xBC.shape[:2], self.heads)
        y, last = ssd_scan(x, steps, -torch.exp(self.A_log.float()), B, C, still, still, **kwargs)
        return y.flatten(2), last


# --8<-- [end:mixer]
# --8<-- [start:kind]
class RetentionKind(MixerKind):
    """How a RetentionMixer comes out of an attention layer."""

    kind = "retention"
    parts = default_parts = ("conv", "decay", "scale")

    def targets(self, teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
        """v, k and q become x, B and C, KV heads repeated per query head; o becomes out_proj."""
        base, wide, taps = f"model.layers.{layer}.mixer", 3 * mixer["d_inner"], mixer["d_conv"]
        rows = {what: tuple(attention_rows(teacher, layer, what, expanded=True).values()) for what in ("weight", "bias")}
        made = [
            Target(f"{base}.in_proj.weight", (wide, teacher.hidden), rows["weight"]),
            Target(f"{base}.conv1d.weight", (wide, 1, taps), (Rows("all", wide),)),
            Target(f"{base}.conv1d.bias", (wide,), (Rows("all", wide),), fan_in=taps),
            Target(f"{base}.A_log", (teacher.heads,), (Rows("all", teacher.heads),)),
            *output_targets(teacher, mixer, layer),
            *norm_targets(teacher, layer, expanded=True),
        ]
        if mixer.get("in_bias"):
            made.append(Target(f"{base}.in_proj.bias", (wide,), rows["bias"]))
        return sorted(made, key=lambda target: target.name)

    def set_part(self, part: str, mixer: Any, seen: LayerObservation, plain: Mapping[str, Tensor]) -> None:
        """conv: the identity times a small tap. decay: a head forgets within the distance that its
        attention looks back. scale: out_proj's columns, so that channels have the attention's RMS.
        """
        if part == "conv":
            pass_through(mixer.conv1d)
        elif part == "decay":
            mixer.A_log.copy_((decays(seen.distance) / STEP).log())
        else:
            mixer.out_proj.weight.mul_(channel_ratio(mixer, seen))

    def changes_output(self, parts: frozenset[str]) -> bool:
        """As in MixerKind: `scale` changes out_proj, which otherwise is a copy of o_proj."""
        return "scale" in parts

    def vectors(self, mixer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in MixerKind: lets `replace` verify the conversion."""
        xBC = mixer.project(inputs)
        mixer.A_log.fill_(-torch.inf)
        return (*xBC.chunk(3, -1), mixer.scan(xBC, backend="torch")[0] / STEP)


register_kind(RetentionKind())


# --8<-- [end:kind]
# --8<-- [start:family]
class OtterConfig(LlamaConfig):
    model_type = "otter"


class OtterModel(LlamaModel):
    config_class = OtterConfig


class OtterForCausalLM(LlamaForCausalLM):
    config_class = OtterConfig


AutoConfig.register("otter", OtterConfig)
AutoModel.register(OtterConfig, OtterModel)
AutoModelForCausalLM.register(OtterConfig, OtterForCausalLM)
register_family(FamilySpec("otter"))


# --8<-- [end:family]
# --8<-- [start:format]
class PlainFormat(Format):
    """Weights and config under the same names, for a runtime that has hybridize installed."""

    name = "plain"

    def check(self, source: CheckpointReader, name: str) -> None:
        check_hybrid(source, name)

    def write(
        self, source: CheckpointReader, plan: None, path: Path, name: str, lineage: Manifest, outtype: str | None
    ) -> Path:
        writer = CheckpointWriter(path)
        for tensor_name, tensor in source.tensors():
            writer.add(tensor_name, tensor)
        writer.close(source.config, lineage, carry_from=source.path)
        return path

    def use(self, plan: None, made: Path) -> str:
        return "`import hybridize.modeling`, then `AutoModelForCausalLM.from_pretrained`."

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        model: Any = load_model(made, device, torch.float32)
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0] for ids in wanted.sequences]
        tokens = [sequence[len(prompt) :] for prompt, sequence in zip(wanted.prompts, wanted.sequences, strict=True)]
        return judge("hybridize", wanted, logits, tokens, BOUND, exact=True)


register_format(PlainFormat())


# --8<-- [end:format]
# --8<-- [start:scorer]
@dataclass(frozen=True)
class DepthSettings:
    """Flags of `hybridize score-depth`."""

    downwards: bool = option(False, "Convert the lowest layers first.")


class DepthScorer(Scorer):
    """The score is the layer's place: a baseline to compare other scorers with."""

    kind = "depth"
    summary = "Rank layers by their depth alone."
    settings = DepthSettings

    def score(self, setup: Setup, settings: DepthSettings) -> Ranking:
        sign = 1 if settings.downwards else -1
        scores = [LayerScore(layer, float(sign * layer)) for layer in setup.contract.attention_layers]
        return Ranking(scores, "depth", "by depth", {"downwards": settings.downwards})


register_scorer(DepthScorer())


# --8<-- [end:scorer]
# --8<-- [start:loss]
def squared(log_q: Tensor, log_p: Tensor) -> Terms:
    """(p - q)^2 / 2 per token of the vocabulary, and q times its derivative to q."""
    q, p = log_q.exp(), log_p.exp()
    return (p - q).square() / 2, q * (q - p)


DIVERGENCES["squared"] = squared
# --8<-- [end:loss]
