"""What surgery must know of a kind of mixer, and the registry of kinds. A kind subclasses
`MixerKind` in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridize.errors import InputError, setting
from hybridize.modeling import MIXERS, HybridConfig, Mixer
from hybridize.surgery.mapping import Rows, Source, Target, source_of
from hybridize.surgery.observe import LayerObservation
from hybridize.surgery.teacher import Teacher

DEFAULT_MIXER = "mamba2"
KINDS: dict[str, MixerKind] = {}


class MixerKind:
    """How mixers of one kind come out of attention layers. Names and shapes are those of its class
    in hybridize.modeling.

    kind: as in the class. parts: what `calibrate` can set, in the order in which it does;
    default_parts: those that it does unasked. Only `targets` has no default here; without `vectors`
    a conversion cannot be verified, and says so.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    default_parts: ClassVar[tuple[str, ...]] = ()

    @property
    def mixer(self) -> type[Mixer]:
        return MIXERS[self.kind]

    def shape(self, teacher: Teacher, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The config's `mixer` entry for this teacher. `asked` overrides the defaults. InputError
        where it does not fit."""
        for key in asked:
            if key not in (*self.mixer.sizes, *self.mixer.choices):
                raise InputError(f"{setting(key)} has no use with {setting('mixer')} {self.kind}")
        shape: dict[str, Any] = {"kind": self.kind, "d_inner": teacher.inner, "d_conv": 4} | dict(asked) | teacher.carried
        if not 2 <= shape["d_conv"] <= 4:
            raise InputError(f"{setting('d_conv')} {shape['d_conv']} is outside 2..4, which the kernels support")
        return self.completed(teacher, shape)

    def completed(self, teacher: Teacher, shape: dict[str, Any]) -> dict[str, Any]:
        """`shape` with the defaults of this kind. InputError where it does not fit the teacher."""
        return {**shape, "d_state": shape.get("d_state", teacher.head_dim)}

    def targets(self, teacher: Teacher, mixer: dict[str, Any], layer: int) -> list[Target]:
        """Every tensor of layer `layer`'s mixer, and the rows that it is made of. mixer: what
        `shape` returned."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(
        self, config: HybridConfig, layer: int, plain: Mapping[str, Tensor], seen: LayerObservation, parts: frozenset[str]
    ) -> Mixer:
        """The mixer that starts from the parameters `plain`, with `parts` of it set by what the
        attention does.

        In float32, on the device of `seen`. config: the result's.
        """
        mixer = self.mixer(config, layer)  # type: ignore[call-arg, arg-type]
        mixer.load_state_dict({name: value.float() for name, value in plain.items()})
        mixer = mixer.to(seen.inputs.device).float().eval()
        for part in self.parts:
            if part in parts:
                self.set_part(part, mixer, seen, plain)
        return mixer

    def set_part(self, part: str, mixer: Any, seen: LayerObservation, plain: Mapping[str, Tensor]) -> None:
        """Sets one of `parts`, in place."""
        raise NotImplementedError

    def changes_output(self, parts: frozenset[str]) -> bool:
        """Whether calibrating these parts sets out_proj, which is else o_proj bit for bit."""
        return "out" in parts

    def can_verify(self, mixer: dict[str, Any]) -> bool:
        """Whether `vectors` can be compared with the attention's for this shape."""
        return type(self).vectors is not MixerKind.vectors

    def vectors(self, mixer: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, B and C before the convolution, KV heads repeated per query head, and what the scan
        makes of them.

        All [W, T, I], of inputs [W, T, D]. The scan has steps of one and no decay, gate or skip.
        May change the mixer.
        """
        raise NotImplementedError

    def kept_bytes(self, mixer: dict[str, Any], inner: int, kv: int, plain: bool) -> float:
        """Bytes that the mixer keeps of a token for backward, its input excluded: under bfloat16
        autocast on a GPU, or, if `plain`, in float32 on a CPU. inner, kv: heads x head size of
        queries, and of keys."""
        return (4 if plain else 2) * 17 * inner


def register_kind(kind: MixerKind) -> MixerKind:
    """From here on `replace` can make mixers of this kind; its class must be registered with
    hybridize.modeling."""
    KINDS[kind.kind] = kind
    return kind


def kind_of(name: str) -> MixerKind:
    """InputError for a kind that nobody has registered."""
    if name not in KINDS:
        raise InputError(f"{setting('mixer')} {name} is unknown; use {' or '.join(KINDS)}")
    return KINDS[name]


def attention_rows(teacher: Teacher, layer: int, what: str, expanded: bool) -> dict[str, Rows]:
    """The rows of in_proj that come from q (C), k (B) and v (x), those of the weight or of the
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
    """out_proj, which is o_proj."""
    base, rows = f"model.layers.{layer}.mixer", teacher.hidden
    made = [Target(f"{base}.out_proj.weight", (rows, teacher.inner), (Rows("o", rows, source_of(teacher, layer, "o")),))]
    if mixer.get("out_bias"):
        o = Rows("o", rows, source_of(teacher, layer, "o", "bias"))
        made.append(Target(f"{base}.out_proj.bias", (rows,), (o,)))
    return made


def norm_targets(teacher: Teacher, layer: int, expanded: bool) -> list[Target]:
    """B_norm and C_norm, which are the norms of keys and queries; none where the attention has
    none."""
    if teacher.norm_bc is None:
        return []
    attention, offset = f"model.layers.{layer}.self_attn.", teacher.norm_bc["offset"]
    repeated = teacher.norm_bc["over"] == "all" and expanded
    keys, queries = (teacher.tensors[f"{part}_norm.weight"][0] for part in "kq")
    k = Rows("k", teacher.inner if repeated else keys, Source(f"{attention}k_norm.weight"), teacher.head_dim)
    q = Rows("q", queries, Source(f"{attention}q_norm.weight", scale=teacher.scale, offset=offset))
    base = f"model.layers.{layer}.mixer"
    return [Target(f"{base}.{name}_norm.weight", (part.count,), (part,)) for name, part in (("B", k), ("C", q))]
