"""The attention function and the mask function that transformers calls for an enabled model.

The cache tags the keys and values that it hands out. Tagged ones are read together with the prefix that the
cache held at that moment; without a tag they are ordinary dense attention. A tag is lost when a model computes
new keys or values from those of the cache, whose prefix then says nothing of what the model wants to read.
"""

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from defensivekv.attention import attend
from defensivekv.attention.ragged import causal_mask
from defensivekv.attention.static import StaticReads, attend_static
from defensivekv.cache import PrefixView, StaticTail
from defensivekv.errors import DefensiveKVWarning, InvalidInputError, UnsupportedModelError

_TAG = "_defensivekv"
_HIDDEN = "_defensivekv_hidden"


class StaticHandoff:
    """What a cache attaches to them in compiled code: tensors, of which nobody has to be told anything.

    reads: the prefix. tail: where the keys lie that were handed out with it.
    """

    def __init__(self, reads: StaticReads, tail: StaticTail) -> None:
        self.reads = reads
        self.tail = tail


class Handoff(Protocol):
    """What a cache attaches to the keys and values that it hands out."""

    view: PrefixView | None
    static: StaticHandoff | None

    def check_hidden(self, hidden: Tensor) -> None:
        """Called with the tokens before the tail that the mask hides, (b, t) bool, where there are any."""
        ...

    def consume(self, module: nn.Module) -> None:
        """Called when the keys have arrived at the attention of `module`; checks that it is the right one."""
        ...

    def observe(
        self,
        module: nn.Module,
        queries: Tensor,
        visible: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """Called once the attention is computed: the cache may evict."""
        ...


def tag(states: Tensor, handoff: Handoff | StaticHandoff) -> Tensor:
    """The same keys or values, as a tensor object of its own that carries the hand-off."""
    tagged = states.view(states.shape)
    setattr(tagged, _TAG, handoff)
    return tagged


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Boolean masks, as for SDPA.

    transformers cuts off what a 2-D mask says of the tokens before the tail. At the start of a turn, where that hides
    any, it travels with the mask, for the cache to hold it against the pads that it knows of.
    """
    padding, offset = kwargs.get("attention_mask"), kwargs.get("kv_offset", 0)
    hides = None
    if isinstance(padding, Tensor) and padding.dim() == 2 and isinstance(offset, int) and kwargs.get("q_length", 1) > 1:
        hidden = ~padding[:, :offset].bool()
        hides = hidden if bool(hidden.any()) else None
    if hides is not None:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None and hides is not None:
        setattr(mask, _HIDDEN, hides)
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' signature: query (b, q, x, d), key and value (b, h, t, d); gives (b, x, q, v).

    softcap, s_aux: as models pass them; `s_aux` (q,) are learned attention sinks.
    """
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
    handoff: Handoff | StaticHandoff | None = getattr(key, _TAG, None)
    if handoff is not getattr(value, _TAG, None):
        raise UnsupportedModelError(
            f"{type(module).__name__} computes new keys or values from those that the cache returned, so they cannot "
            "be read from an evicting cache: use another model, or a stock cache after defensivekv.disable(model)"
        )
    if handoff is None:
        _warn_of_stock_cache(module, query, key)
        return _dense(module, query, key, value, attention_mask, dropout, scale, softcap, s_aux, **kwargs), None
    _check_arguments(attention_mask, dropout, kwargs)
    if isinstance(handoff, StaticHandoff):
        return _read_static(handoff, query, attention_mask, scale, softcap, s_aux), None
    handoff.consume(module)
    if handoff.view is None:
        output = _dense(module, query, key, value, attention_mask, dropout, scale, softcap, s_aux, **kwargs)
    else:
        if (hidden := getattr(attention_mask, _HIDDEN, None)) is not None:
            handoff.check_hidden(hidden)
        if handoff.static is not None:
            output = _read_static(handoff.static, query, attention_mask, scale, softcap, s_aux)
        else:
            output = _read(handoff.view, query, key, value, attention_mask, scale, softcap, s_aux)
    handoff.observe(module, query, attention_mask, scale, softcap, s_aux, kwargs.get("position_ids"))
    return output, None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    if softcap is not None or sinks is not None:
        is_plain = dropout == 0 and (mask is None or mask.dtype == torch.bool)
        # Our kernels give no gradient, and compiled code fuses plain operations by itself.
        if not is_plain or torch.compiler.is_compiling() or _needs_gradient(query, key, value, sinks):
            return _differentiable(query, key, value, mask, dropout, scaling, softcap, sinks)
        return _read(None, query, key, value, mask, scaling, softcap, sinks)
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]
    return output


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _differentiable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What models with softcaps or sinks compute by themselves, for training an enabled model without a cache."""
    groups, x = query.shape[1] // key.shape[1], query.shape[2]
    logits = query @ key.repeat_interleave(groups, 1).mT * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        mask = causal_mask(x, key.shape[2], query.device)
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat((logits, sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    weights = logits.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()


def _read(
    view: PrefixView | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    output = attend(query, view, key, value, visible=mask, scaling=scaling, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous()


def _read_static(
    handoff: StaticHandoff,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    output = attend_static(
        query, handoff.reads, handoff.tail, visible=mask, scaling=scaling, softcap=softcap, sinks=sinks
    )
    return output.transpose(1, 2)


def _check_arguments(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise InvalidInputError(f"an evicting cache needs boolean attention masks, not {mask.dtype}: pass a 2-D mask")
    if dropout:
        raise InvalidInputError("an evicting cache is for inference, and attention dropout is on: call model.eval()")
    if kwargs.get("position_bias") is not None:
        raise InvalidInputError("attention with a position bias cannot be read from an evicting cache")


def _warn_of_stock_cache(module: nn.Module, query: Tensor, key: Tensor) -> None:
    """A single query over several tokens is a decoding step: some cache holds them, and it is not ours."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if query.shape[2] != 1 or key.shape[2] == 1 or config is None:
        return
    # Encoders and resamplers may attend with one query too; what decodes is causal and belongs to a layer.
    if index is None or not getattr(module, "is_causal", True):
        return
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "full_attention":
        return
    if getattr(module, "sliding_window", None) is None:
        warnings.warn(
            "the model is enabled for eviction but decodes from a stock cache, so nothing is evicted: "
            "pass generate() an EvictingCache, or call defensivekv.disable(model)",
            DefensiveKVWarning,
            stacklevel=3,
        )
