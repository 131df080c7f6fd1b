"""The interface of a kind of mixer for surgery, and the registry of kinds. Each kind subclasses
`MixerKind` in its own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridize.errors import InputError, setting
from hybridize.extensions import VARIABLE, register
from hybridize.modeling import MIXERS, HybridConfig, Mixer
from hybridize.surgery.mapping import Rows, Source, Target, source_of
from hybridize.surgery.observe import LayerObservation
from hybridize.surgery.teacher import Teacher

DEFAULT_MIXER = "mamba2"
KINDS: dict[str, MixerKind] = {}


class MixerKind:
    """How mixers of one kind are created from attention layers. Names and shapes are those of its
    class in hybridize.modeling.

    kind: the name of that class's kind. parts: what `calibrate` can set, in that order;
    default_parts: what it sets by default. Subclasses must define `targets`; without `vectors`,
    conversions cannot be verified, which is reported.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    default_parts: ClassVar[tuple[str, ...]] = ()

    @property
    def mixer(self) -> type[Mixer]:
        """The class of these mixers. Raises InputError if none is registered."""
        if self.kind not in MIXERS:
            raise InputError(f"the mixer kind {self.kind!r} has rules, but no class with @register_mixer")
        return MIXERS[self.kind]

    def shape(self, teacher: Teacher, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config's `mixer` entry for this teacher. overrides: values that replace the
        defaults. Raises InputError if one does not fit."""
        for key in overrides:
            if key not in (*self.mixer.sizes, *self.mixer.choices):
                raise InputError(f"{setting(key)} has no use with {setting('mixer')} {self.kind}")
        shape: dict[str, Any] = {"kind": self.kind, "d_inner": teacher.inner, "d_conv": 4} | dict(overrides) | teacher.carried
        if not 2 <= shape["d_conv"] <= 4:
            raise InputError(f"{setting('d_conv')} {shape['d_conv']} is outside 2..4, the range that the kernels support")
        return self.completed(teacher, shape)

    def completed(self, teacher: Teacher, shape: dict[str, Any]) -> dict[str, Any]:
        """Returns `shape` completed with the defaults of this kind: here, the head size as state
        size. Raises InputError if it does not fit the teacher."""
        if shape.setdefault("d_state", teacher.head_dim) != teacher.head_dim:
            size = shape["d_state"]
            raise InputError(
                f"{setting('d_state')} {size}: the state size of {self.kind} mixers is the head size, {teacher.head_dim}"
            )
        return shape

    def check_targets(self, config: HybridConfig, layer: int, targets: Sequence[Target]) -> None:
        """Raises InputError unless `targets` are the parameters of this kind's class. config: that
        of the result."""
        with torch.device("meta"):
            wanted = {name: tuple(p.shape) for name, p in self.mixer(config, layer).named_parameters()}  # type: ignore[call-arg, arg-type]
        made = {target.parameter: target.shape for target in targets}
        for name in sorted({*wanted, *made}):
            if wanted.get(name) != made.get(name):
                raise InputError(
                    f"the rules of the mixer kind {self.kind!r} make {name} of shape {made.get(name)}, its class has "
                    f"{wanted.get(name)}"
                )

    def targets(self, teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
        """Returns all tensors of the mixer of layer `layer`, with the rows each is made of. mixer:
        the result of `shape`."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(
        self, config: HybridConfig, layer: int, plain: Mapping[str, Tensor], seen: LayerObservation, parts: frozenset[str]
    ) -> Mixer:
        """Returns a mixer with the parameters `plain`, in which `parts` are then set from the
        observed attention.

        In float32, on the device of `seen`. config: that of the result.
        """
        mixer = self.mixer(config, layer)  # type: ignore[call-arg, arg-type]
        mixer.load_state_dict({name: value.float() for name, value in plain.items()})
        mixer = mixer.to(seen.inputs.device).float().eval()
        for part in self.parts:
            if part in parts:
                self.set_part(part, mixer, seen, plain)
        return mixer

    def set_part(self, part: str, mixer: Any, seen: LayerObservation, plain: Mapping[str, Tensor]) -> None:
        """Sets one of `parts` of the mixer, in place.

        plain: all parameters as they were before calibration, in the checkpoint's types. What has a
        source in the attention must stay as it is, out_proj excepted where `changes_output` says
        so.
        """
        raise NotImplementedError

    def changes_output(self, parts: frozenset[str]) -> bool:
        """Returns whether calibrating these parts changes out_proj, which otherwise equals o_proj
        bit for bit."""
        return "out" in parts

    def can_verify(self, mixer: dict[str, Any]) -> bool:
        """Returns whether `vectors` can be compared with the attention for this `mixer` config."""
        return type(self).vectors is not MixerKind.vectors

    def vectors(self, mixer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x, B and C before the convolution, with KV heads repeated per query head, and the
        output of the scan on them, all [W, T, I], for inputs [W, T, D].

        The scan runs with step sizes of one and without decay, gate and skip. May change the mixer.
        """
        raise NotImplementedError

    def kept_bytes(self, mixer: dict[str, Any], inner: int, kv: int, plain: bool) -> float:
        """Returns the bytes that the mixer keeps per token for backward, its input excluded: under
        bfloat16 autocast on a GPU, or, if `plain`, in float32 on a CPU. inner, kv: heads x head
        size of queries and of keys."""
        return (4 if plain else 2) * 17 * inner


def register_kind(kind: MixerKind) -> MixerKind:
    """Registers a kind, so that `replace` can create its mixers, and returns it. Its class must be
    registered with hybridize.modeling.

    Raises TypeError for anything but an instance of MixerKind, and ValueError if the name is taken
    or `default_parts` are not all among `parts`.
    """
    if not isinstance(kind, MixerKind):
        raise TypeError(f"{kind!r} is no instance of MixerKind")
    unknown = set(kind.default_parts) - set(kind.parts)
    if unknown:
        raise ValueError(f"default_parts of the mixer kind {kind.kind!r} has {sorted(unknown)}, which parts lacks")
    return register(KINDS, kind.kind, kind)


def kind_of(name: str) -> MixerKind:
    """Returns the kind called `name`. Raises InputError if it is not registered."""
    if name not in KINDS:
        raise InputError(
            f"{setting('mixer')} {name} is unknown; use {' or '.join(KINDS)}, "
            f"or name the extension that defines it in {VARIABLE}"
        )
    return KINDS[name]


def attention_rows(teacher: Teacher, layer: int, what: str, expanded: bool) -> dict[str, Rows]:
    """Returns the row blocks of in_proj that come from v (x), k (B) and q (C). what: weight or
    bias.

    An attention scale other than head_dim^-1/2 is folded into C, unless queries are normalised.
    expanded: KV heads are repeated per query head.
    """
    scale = teacher.scale if teacher.norm_bc is None else 1.0
    of = {part: source_of(teacher, layer, part, what, scale if part == "q" else 1.0) for part in "qkv"}
    count, head = (teacher.inner, teacher.head_dim) if expanded else (teacher.kv, None)
    return {
        "x": Rows("x", count, of["v"], head if of["v"] else None),
        "B": Rows("B", count, of["k"], head if of["k"] else None),
        "C": Rows("C", teacher.inner, of["q"]),
    }


def output_targets(teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
    """Returns the targets of out_proj, which copy o_proj."""
    base, rows = f"model.layers.{layer}.mixer", teacher.hidden
    made = [Target(f"{base}.out_proj.weight", (rows, teacher.inner), (Rows("o", rows, source_of(teacher, layer, "o")),))]
    if mixer.get("out_bias"):
        o = Rows("o", rows, source_of(teacher, layer, "o", "bias"))
        made.append(Target(f"{base}.out_proj.bias", (rows,), (o,)))
    return made


def norm_targets(teacher: Teacher, layer: int, expanded: bool) -> list[Target]:
    """Returns the targets of B_norm and C_norm, which copy the norms of keys and queries; empty if
    the attention has no such norms."""
    if teacher.norm_bc is None:
        return []
    attention, offset = f"model.layers.{layer}.self_attn.", teacher.norm_bc["offset"]
    repeated = teacher.norm_bc["over"] == "all" and expanded
    keys, queries = (teacher.tensors[f"{part}_norm.weight"][0] for part in "kq")
    k = Rows("k", teacher.inner if repeated else keys, Source(f"{attention}k_norm.weight"), teacher.head_dim)
    q = Rows("q", queries, Source(f"{attention}q_norm.weight", scale=teacher.scale, offset=offset))
    base = f"model.layers.{layer}.mixer"
    return [Target(f"{base}.{name}_norm.weight", (part.count,), (part,)) for name, part in (("B", k), ("C", q))]
