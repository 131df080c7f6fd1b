"""The hybrid causal LM: a teacher's own layers, some with a mixer in place of attention.

It has its own backbone forward because mixers need inputs that attention layers do not get: the 2-D
padding mask, the packing boundaries, and a position count that does not come from a KV cache.
Independent of training and files.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, GenerationMixin, PreTrainedModel

from .configuration_hybridize import MIXER_LAYER, HybridConfig
from .mamba import MambaMixer  # noqa: F401  (the import registers the kind)
from .mamba2 import Mamba2Mixer  # noqa: F401
from .mixer import FLOAT32, Mixer, mixer_class
from .stock import (
    CACHE,
    BaseModelOutputWithPast,
    Cache,
    CausalLMOutputWithPast,
    DynamicCache,
    can_return_tuple,
    create_causal_mask,
    create_sliding_window_causal_mask,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


@functools.cache
def _hybrid_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    class HybridLayer(layer_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: HybridConfig, index: int) -> None:
            super().__init__(config, index)
            del self.self_attn
            assert config.mixer is not None
            self.mixer = mixer_class(config.mixer)(config, index)

        @property
        def self_attn(self) -> nn.Module:
            return self.mixer

        @self_attn.deleter
        def self_attn(self) -> None:
            del self._modules["self_attn"]

    return HybridLayer


def converted_layer(layer_class: type[nn.Module], config: HybridConfig, index: int) -> nn.Module:
    """Returns a layer of the teacher's own class, with its norms, MLP and residuals, whose
    `self_attn` is a mixer."""
    return _hybrid_class(layer_class)(config, index)  # type: ignore[arg-type]


class HybridCache(DynamicCache):
    """The cache of a hybrid with attention layers. Masks are sized by its first sliding-window and
    its first full-attention layer; transformers before 5.23 would take a mixer's entry for either.
    """

    @property
    def is_sliding(self) -> list[bool | None]:
        return [None if hasattr(layer, "recurrent_states") else layer.is_sliding for layer in self.layers]


class StateCache(DynamicCache):
    """The cache of a hybrid without attention layers, whose tokens transformers' own cache cannot
    count."""

    hybrid_seen_tokens = 0
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.hybrid_seen_tokens if self.has_previous_state() else 0


def new_cache(config: HybridConfig) -> DynamicCache:
    """Returns an empty cache for the layout: keys and values for attention layers, window and state
    for mixers."""
    stateful = set(config.layer_types) == {MIXER_LAYER}
    return StateCache(config=config) if stateful else HybridCache(config=config)


@functools.cache
def _loaded_as(family: str, model_class: Any) -> Any:
    """Returns the class itself, or a subclass named after the family if the family's tensors have
    other names on disk than in memory (mixtures of experts): transformers looks up the conversion
    by class name."""
    mapping = get_checkpoint_conversion_mapping(family)
    if not mapping or model_class.__name__.startswith(f"{family}_"):
        return model_class
    name = f"{family}_{model_class.__name__}"  # transformers recognises a causal LM by the end of its class name
    register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    return type(name, (model_class,), {"__module__": model_class.__module__})


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = frozenset(FLOAT32)
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back, so generation must not crop the cache
    _can_compile_fullgraph = False
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.__class__ = _loaded_as(config.base_model_type, type(self))  # type: ignore[arg-type]

    @property
    def _family(self) -> Any:
        """The backbone class of the teacher's family."""
        return MODEL_MAPPING[CONFIG_MAPPING[self.config.base_model_type]]

    @property
    def _supports_sdpa(self) -> bool:  # type: ignore[override]
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None  # sdpa silently ignores the cap
        return bool(self._family._supports_sdpa) and not capped

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]
        return bool(self._family._can_set_experts_implementation())

    @property
    def _supports_flash_attn(self) -> bool:  # type: ignore[override]
        return bool(self._family._supports_flash_attn)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The family's rule also fills buffers that no checkpoint holds; it must be called on an
        # instance of the family's class.
        family = self._family.__new__(self._family)
        nn.Module.__init__(family)
        family.config = self.config
        family._init_weights(module)
        if isinstance(module, Mixer):
            module.reset_parameters()


class HybridModel(HybridPreTrainedModel):
    """Embedding, layers, final norm. Weights keep the teacher's names; a converted layer has
    `mixer.*` instead of `self_attn.*`.

    Only for families whose backbone is embedding, layers and norm, without further steps in
    between.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        if config.mixer is not None:
            mixer_class(config.mixer)
        # The family's parts are built from this config, so that one attention setting applies to
        # all. Mixer layers are hidden from them, since no family's rotary embedding knows that
        # kind.
        kinds = config.layer_types
        config.layer_types = ["full_attention" if kind == MIXER_LAYER else kind for kind in kinds]
        teacher = self._family(config)
        config.layer_types = kinds
        self.embed_tokens, self.norm, self.rotary_emb = teacher.embed_tokens, teacher.norm, teacher.rotary_emb
        self.rotary_by_kind = "layer_type" in inspect.signature(type(self.rotary_emb).forward).parameters
        self.embedding_multiplier = getattr(config, "embedding_multiplier", 1.0)
        self.layers = teacher.layers
        for index in config.mixer_layers:
            self.layers[index] = converted_layer(type(self.layers[index]), config, index)
        self._no_split_modules = list({type(layer).__name__ for layer in self.layers})
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns last_hidden_state [B, T, D] and the cache, if one is used.

        input_ids [B, T]; attention_mask [B, past + T], 0 at padding; position_ids [B, T]; the cache
        is accepted under both of its names. Without a mask and a cache, positions that restart mark
        packed documents (transformers' convention): attention, convolution and state then stay
        within each document. cu_seq_lens_q states that they do restart, which saves checking it on
        the host.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        hidden = self._scaled(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and cache is None and not checkpointing:
            cache = new_cache(self.config)
        length = hidden.shape[1]
        past = int(cache.get_seq_length()) if cache is not None else 0
        packed = position_ids is not None  # possibly: finding out makes the host wait for the device
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden.device).unsqueeze(0)

        extra = self.layer_inputs(hidden, attention_mask, position_ids, cache, packed, **kwargs)
        all_hidden = [hidden]
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden = layer(hidden, position_ids=position_ids, use_cache=use_cache, **{CACHE: cache}, **extra[kind])
            all_hidden.append(hidden)
        hidden = self.norm(hidden)
        if isinstance(cache, StateCache):
            cache.hybrid_seen_tokens = past + length
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            **{CACHE: cache if use_cache else None},
            hidden_states=(*all_hidden[:-1], hidden) if output_hidden_states else None,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns the first layer's input [B, T, D] for ids [B, T]."""
        return self._scaled(self.embed_tokens(input_ids))

    def _scaled(self, embeds: Tensor) -> Tensor:
        return embeds if self.embedding_multiplier == 1 else embeds * self.embedding_multiplier

    def layer_inputs(
        self,
        hidden: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor,
        cache: Cache | None = None,
        packed: bool = True,
        kinds: Iterable[str] = (),
        **kwargs: Any,
    ) -> dict[str, dict[str, Any]]:
        """Returns, by kind of layer, the keyword arguments it gets in addition to the hidden states
        [B, T, D]: rotary tables, mask, packing boundaries.

        packed: whether positions may restart. kinds: further kinds besides the model's own; the
        mixer's entry is always included, since any layer may become one.
        """
        length = hidden.shape[1]
        rotary = None if self.rotary_by_kind else self.rotary_emb(hidden, position_ids=position_ids)
        masks = attention_mask if isinstance(attention_mask, dict) else {}
        plain = None if isinstance(attention_mask, dict) else attention_mask
        packed = packed and attention_mask is None and cache is None
        seq_idx = document_index(position_ids, hidden, known="cu_seq_lens_q" in kwargs) if packed else None
        extra: dict[str, dict[str, Any]] = {}
        for kind in {*self.config.layer_types, *kinds, MIXER_LAYER}:
            if kind == MIXER_LAYER:
                mask = masks.get(kind) if masks else padding_mask(plain, length)
                mask = None if mask is None else mask.bool()
                extra[kind] = {"attention_mask": mask, "seq_idx": seq_idx, "position_embeddings": None}
                continue
            make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
            shared = {CACHE: cache, "position_ids": position_ids}
            causal = masks[kind] if masks else make(self.config, inputs_embeds=hidden, attention_mask=plain, **shared)
            tables = rotary or self.rotary_emb(hidden, position_ids=position_ids, layer_type=kind)
            extra[kind] = {"attention_mask": causal, "position_embeddings": tables, **kwargs}
        return extra


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits [B, T or logits_to_keep, vocabulary], as any transformers causal LM;
        labels of -100 have no loss."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=past_key_values if cache is None else cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = out.last_hidden_state if isinstance(keep, int) else out.last_hidden_state[:, keep]
        logits = self.logits(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)})

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] of final hidden states [..., D], with the family's scale and soft
        cap."""
        logits, scaling = self.lm_head(hidden), getattr(self.config, "logits_scaling", 1.0)
        logits = logits if scaling == 1 else logits / scaling
        return soft_capped(logits, getattr(self.config, "final_logit_softcapping", None))

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if given is None and type(model_kwargs.get(CACHE)) is DynamicCache:
            model_kwargs[CACHE] = new_cache(self.config)


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Returns cap * tanh(logits / cap) (Gemma 2, 2408.00118, section 2), or the logits unchanged if
    cap is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Returns the last `length` columns of a 2-D mask as bool, or None if nothing is padded or one
    token is decoded."""
    if attention_mask is None or attention_mask.ndim != 2 or length == 1:
        return None
    mask = attention_mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def document_index(position_ids: Tensor, hidden: Tensor, known: bool = False) -> Tensor | None:
    """Returns [B, T], the index of the packed document each token belongs to, or None if no
    position restarts. known: some are known to restart, so do not check."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not known and not bool(breaks.any()):
        return None
    index = nn.functional.pad(breaks.long().cumsum(1), (1, 0))
    return index.expand(hidden.shape[0], -1)
