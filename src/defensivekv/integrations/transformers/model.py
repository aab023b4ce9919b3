"""What this package needs to know of a transformers model: which layers can be evicted, and how to switch attention."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.projections import OUTPUT_PROJECTIONS
from defensivekv.integrations.transformers.attention import attention_forward, attention_mask

ATTENTION_NAME = "defensivekv"

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_previous: "weakref.WeakKeyDictionary[PreTrainedModel, list[tuple[PreTrainedConfig, str | None]]]" = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class LayerPlan:
    """How the cache of one model layer is kept.

    kind: transformers' layer type ("full_attention", "sliding_attention", ...). evicted: whether this package
    keeps it.
    """

    kind: str
    evicted: bool


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def plan_layers(config: PreTrainedConfig) -> list[LayerPlan]:
    """Which layers are evicted: full attention with keys and values of its own, except latent attention.

    config: of the text decoder. The plans are those of the layers that transformers' own cache has; where layers
    read the keys of earlier ones, some releases leave them out and others call them "dummy".
    """
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    plans = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        kind = _kind(config, index, layer)
        is_full = kind == "full_attention" and type(layer) is DynamicLayer
        plans.append(LayerPlan("latent_attention" if is_full and is_latent else kind, is_full and not is_latent))
    return plans


def _kind(config: PreTrainedConfig, index: int, layer: CacheLayerMixin) -> str:
    if type(layer).__name__ == "DummyLayer":
        return "dummy"
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[index]
    if getattr(layer, "is_sliding", False):
        is_chunked = getattr(config, "sliding_window", None) is None
        return "chunked_attention" if is_chunked else "sliding_attention"
    return "full_attention" if type(layer) is DynamicLayer else type(layer).__name__


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has, as far as its configuration says; stretched rotary positions counted."""
    return config_positions(text_config(model))


def config_positions(config: PreTrainedConfig) -> int | None:
    """The same, without a model. config: of the text decoder."""
    stated: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if stated is None or not isinstance(rope, dict):
        return stated
    stretched = [stated]
    # Some models have parameters for each kind of layer.
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("factor"):
            original = parameters.get("original_max_position_embeddings") or stated
            stretched.append(int(original * parameters["factor"]))
    return max(stretched)


def num_query_heads(config: PreTrainedConfig) -> int:
    """Query heads of a layer. config: of the text decoder."""
    return int(config.num_attention_heads)


def has_dynamic_rotation(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies change with the longest position that was asked for (dynamic NTK), for good."""
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return any("dynamic" in (kind.values() if isinstance(kind, dict) else (kind,)) for kind in kinds)


def enable(model: PreTrainedModel) -> None:
    """Switches the model's attention to one that can read an `EvictingCache`.

    Without such a cache the model computes what it did before. `disable` undoes it. Registers one attention
    function and one mask function through transformers' public interfaces; nothing is patched. Where the model
    is enabled already, nothing happens.

    Raises UnsupportedModelError, naming the model and the reason; the model is then as it was.
    """
    check_supported(model)
    if is_enabled(model):
        return
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
    _previous[model] = [(config, config._attn_implementation) for config in _configs(model)]
    model.set_attn_implementation(ATTENTION_NAME)
    if not is_enabled(model):
        _restore(model)
        raise UnsupportedModelError(f"{_name(model)} did not take the attention implementation {ATTENTION_NAME!r}")


def disable(model: PreTrainedModel) -> None:
    """Gives the model, and each model inside it, its own attention back; nothing happens where it is not enabled.

    Caches made for the model refuse to go on until it is enabled again.
    """
    if is_enabled(model):
        _restore(model)


def _restore(model: PreTrainedModel) -> None:
    """Through the configurations: `set_attn_implementation` cannot name each of several nested ones in all releases."""
    # A copy of an enabled model was never enabled itself.
    for config, implementation in _previous.pop(model, [(model.config, "sdpa")]):
        config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of the model and of all models inside it, outer ones first, as setting one sets its parts."""
    found: dict[int, PreTrainedConfig] = {}

    def visit(config: PreTrainedConfig) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                part = getattr(config, name, None)
                if part is not None:
                    visit(part)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's attention is ours."""
    return bool(text_config(model)._attn_implementation == ATTENTION_NAME)


def check_supported(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError where entries could not be evicted correctly."""
    name = _name(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers PreTrainedModel: load it with AutoModelForCausalLM")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: only decoder-only models can be evicted from")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} computes its attention itself and cannot be switched to another implementation: "
            "use a model that transformers builds on its AttentionInterface"
        )
    plans = plan_layers(text_config(model))
    if not any(plan.evicted for plan in plans):
        kinds = ", ".join(sorted({plan.kind for plan in plans}))
        raise UnsupportedModelError(
            f"{name} has no full-attention layer to evict from: its layers are {kinds}, which are not "
            "supported; use it with its stock cache"
        )
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 and getattr(text_config(model), "num_kv_shared_layers", None):
        raise UnsupportedModelError(
            f"{name} has layers that read the keys of other layers and is split over {len(devices)} devices, on whose "
            "way the cache loses sight of the keys: load it onto one device"
        )
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{name} is split over devices by tensor parallelism, which is not supported yet: load it without tp_plan"
        )


def output_projection(module: nn.Module, num_columns: int) -> Tensor:
    """The weight (hidden, num_columns) that maps the attention's heads to the residual stream, detached.

    Raises UnsupportedModelError where it is missing, quantised, or offloaded.
    """
    advice = "use a policy without value weighting, such as 'snapkv'"
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        weight: Tensor | None = getattr(projection, "weight", None)
        if weight is None:
            continue
        if weight.device.type == "meta":
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} is offloaded, so its weight cannot be read: "
                f"load the model onto one device, or {advice}"
            )
        # Quantised weights are integers, or floats of 8 bits beside scales, or a kind of tensor of their own.
        is_plain = type(weight.detach()) is Tensor and weight.dtype in _WEIGHT_DTYPES
        if not is_plain or weight.dim() != 2 or num_columns not in weight.shape:
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} holds its weight as {weight.dtype} {tuple(weight.shape)}, not as "
                f"(hidden, {num_columns}) floats (quantised?): {advice}"
            )
        transposed = type(projection).__name__ == "Conv1D" or weight.shape[1] != num_columns
        return (weight.mT if transposed else weight).detach()
    raise UnsupportedModelError(f"{type(module).__name__} has no output projection that is known: {advice}")


def _name(model: object) -> str:
    return type(model).__name__
