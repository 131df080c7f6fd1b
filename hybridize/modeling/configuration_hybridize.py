"""The configuration of a hybrid: the teacher's own keys, which layers are mixers (`layer_types`),
and the mixer's shape."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MIXER_LAYER = "linear_attention"  # transformers' name for a layer whose cache is a convolution window and a state
# Keys of the config's `mixer` that are set where the teacher's attention has the same: biases of
# in_proj and out_proj, and the RMSNorm of B and C as {over: head|all, offset: a constant added to
# the weight}. They come in addition to the keys of the mixer's kind.
CARRIED_KEYS = ("in_bias", "out_bias", "norm_bc")


class HybridConfig(PreTrainedConfig):
    """The teacher's config with the layout of the hybrid added.

    base_model_type: the teacher's `model_type`. layer_types: one entry per layer,
    `linear_attention` for a mixer, otherwise the teacher's own kind of attention. mixer: {kind, and
    the shape keys of that kind}, or None if no layer is converted. Raises ValueError if layout and
    mixer contradict each other; the kind itself is checked by the model.
    """

    model_type = "hybridize"

    def __init__(
        self,
        base_model_type: str = "llama",
        layer_types: list[str] | None = None,
        mixer: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The family's config class fills in its defaults and translates legacy keys (rope_theta,
        # rope_scaling).
        kinds = layer_types
        attention = kwargs.pop("attn_implementation", None)
        own = {key: value for key, value in kwargs.items() if key not in ("model_type", "transformers_version")}
        family = CONFIG_MAPPING[base_model_type](**own)
        values = {k: v for k, v in vars(family).items() if not k.startswith("_")} | {
            k: v for k, v in own.items() if k.startswith("_") or k in ("auto_map", "architectures")
        }
        values |= {alias: getattr(family, name) for alias, name in family.attribute_map.items() if hasattr(family, name)}
        values.pop("layer_types", None)
        rope = values.pop("rope_parameters", None)  # the family's class has normalised it, also one set per kind of layer
        super().__init__(attn_implementation=attention, **values)
        for key, value in values.items():  # the base class drops what it treats as generation settings, such as use_cache
            if key not in vars(self):
                setattr(self, key, value)
        if rope is not None:
            self.rope_parameters = rope
        count = self.num_hidden_layers
        windowed = getattr(self, "sliding_window", None) is not None
        every = ["sliding_attention" if windowed else "full_attention"] * count
        self.layer_types = list(kinds or getattr(family, "layer_types", None) or every)
        self.base_model_type, self.mixer = base_model_type, mixer
        self._check_layout()

    def _check_layout(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
            )
        if MIXER_LAYER in self.layer_types and self.mixer is None:
            raise ValueError("layer_types contains mixers, but the config has no `mixer`")
        if self.mixer is None:
            return
        if not isinstance(self.mixer, dict) or not isinstance(self.mixer.get("kind"), str):
            raise ValueError(f"the config's `mixer` is {self.mixer!r}, not an object with a `kind`")
        norm = self.mixer.get("norm_bc")
        if norm is not None and not (isinstance(norm, dict) and norm.get("over") in ("head", "all") and "offset" in norm):
            raise ValueError(f"the config's `mixer` has norm_bc {norm!r}; it must have `over` (head or all) and `offset`")

    @property
    def mixer_layers(self) -> list[int]:
        """The indices of the mixer layers."""
        return [i for i, kind in enumerate(self.layer_types) if kind == MIXER_LAYER]

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns all keys, not only those that differ from the defaults: the defaults of this
        class are Llama's, and the family's may differ."""
        return self.to_dict()


def hybrid_config(raw: dict[str, Any]) -> HybridConfig:
    """Returns the HybridConfig of a checkpoint's config.json, a teacher's or a hybrid's."""
    keys = {key: value for key, value in raw.items() if key not in ("model_type", "base_model_type", "auto_map")}
    return HybridConfig(base_model_type=raw.get("base_model_type", raw["model_type"]), **keys)
