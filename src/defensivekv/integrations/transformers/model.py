"""What this package needs to know of a transformers model: which layers can be evicted, and how to switch attention."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.transformers.attention import attention_forward, attention_mask

ATTENTION_NAME = "defensivekv"

_OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")
_previous: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LayerPlan:
    """How the cache of one model layer is kept.

    kind: transformers' layer type ("full_attention", "sliding_attention", ...). evicted: whether this package
    keeps it. options: arguments of the stock cache layer.
    """

    kind: str
    evicted: bool
    options: dict[str, object]


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def plan_layers(model: PreTrainedModel) -> list[LayerPlan]:
    """Which layers are evicted: full attention with keys and values of its own, except latent attention."""
    config = text_config(model)
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    kinds, options = get_layer_types_and_kwargs(config)
    return [
        LayerPlan("latent_attention" if is_latent else kind, kind == "full_attention" and not is_latent, option)
        for kind, option in zip(kinds, options, strict=True)
    ]


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has, as far as its configuration says; stretched rotary positions counted."""
    config = text_config(model)
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


def enable(model: PreTrainedModel) -> None:
    """Switches the model's attention to one that can read an `EvictingCache`.

    Without such a cache the model computes what it did before. `disable` undoes it. Registers one attention
    function and one mask function through transformers' public interfaces; nothing is patched.

    Raises UnsupportedModelError, naming the model and the reason.
    """
    check_supported(model)
    if is_enabled(model):
        return
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
    _previous[model] = text_config(model)._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    if not is_enabled(model):
        raise UnsupportedModelError(f"{_name(model)} did not take the attention implementation {ATTENTION_NAME!r}")


def disable(model: PreTrainedModel) -> None:
    """Gives the model its own attention back. Caches made for it refuse to go on until it is enabled again."""
    if is_enabled(model):
        model.set_attn_implementation(_previous.pop(model, "sdpa"))


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
            f"{name} computes its attention itself and cannot be switched to another implementation "
            "(falcon, bloom, gptj and mpt are such): use a model built on transformers' AttentionInterface"
        )
    plans = plan_layers(model)
    if not any(plan.evicted for plan in plans):
        kinds = ", ".join(sorted({plan.kind for plan in plans}))
        raise UnsupportedModelError(f"{name} has no full-attention layer to evict from: its layers are {kinds}")
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"{name} is split over devices by tensor parallelism, which is not supported yet: load it without tp_plan"
        )


def output_projection(module: nn.Module, num_columns: int) -> Tensor:
    """The weight (hidden, num_columns) that maps the attention's heads to the residual stream, detached.

    Raises UnsupportedModelError where it is missing, quantised, or offloaded.
    """
    advice = "use a policy without value weighting, such as 'snapkv'"
    for name in _OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        weight: Tensor | None = getattr(projection, "weight", None)
        if weight is None:
            continue
        if weight.device.type == "meta":
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} is offloaded, so its weight cannot be read: "
                f"load the model onto one device, or {advice}"
            )
        if not torch.is_floating_point(weight) or weight.dim() != 2 or num_columns not in weight.shape:
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} holds its weight as {weight.dtype} {tuple(weight.shape)}, not as "
                f"(hidden, {num_columns}) floats (quantised?): {advice}"
            )
        transposed = type(projection).__name__ == "Conv1D" or weight.shape[1] != num_columns
        return (weight.mT if transposed else weight).detach()
    raise UnsupportedModelError(f"{type(module).__name__} has no output projection that is known: {advice}")


def _name(model: object) -> str:
    return type(model).__name__
