"""The oracle: the stock model and a stock cache, with the evicted entries masked in dense float32 attention.

It shares with the integration the kept positions only. It is registered under a name of its own.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from defensivekv import EvictingCache
from defensivekv.attention import masked_attention
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

_NAME = "masked_oracle"


@contextmanager
def switched(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """With the attention function of that name."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class MaskedModel:
    """Runs a model on its own whole cache; after the prompt, only what `cache` kept of it may be read.

    model: not enabled. cache: an evicting cache that has read the same prompt. Its kept positions are copied.
    num_tokens: of the prompt, pads counted. sources: layers that read the keys of another layer, and which one's.
    Batches may hold each prompt several times in a row, as beams and samples do.
    """

    def __init__(
        self, model: PreTrainedModel, cache: EvictingCache, num_tokens: int, sources: Mapping[int, int] | None = None
    ) -> None:
        self.model = model
        self.num_tokens = num_tokens
        self.sources = sources or {}
        self.kept = {number: _kept_mask(cache, index, num_tokens) for index, number in enumerate(cache.evicted_layers)}
        self.cache = DynamicCache(config=model.config)
        AttentionInterface.register(_NAME, self._attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)

    def __call__(self, ids: Tensor, **inputs: Any) -> Tensor:
        """Logits of the next tokens."""
        with switched(self.model, _NAME), torch.no_grad():
            logits: Tensor = self.model(ids, use_cache=True, **{CACHE_ARGUMENT: self.cache}, **inputs).logits
        return logits

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """What the model's own `generate()` makes of it."""
        with switched(self.model, _NAME):
            sequences: Tensor = self.model.generate(ids, **{CACHE_ARGUMENT: self.cache}, **options)
        return sequences

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        b, h, t = key.shape[:3]
        x = query.shape[2]
        if attention_mask is None:
            visible = torch.ones(x, t, dtype=torch.bool, device=key.device).tril(t - x).expand(b, h, x, t).clone()
        else:
            assert attention_mask.dtype == torch.bool
            visible = attention_mask.expand(b, h, x, t).clone()
        index = getattr(module, "layer_idx", -1)
        if index < 0:  # an encoder of images: every patch sees every other
            visible.fill_(True)
        kept = self.kept.get(self.sources.get(index, index))
        if kept is not None and t > self.num_tokens:
            visible[..., : self.num_tokens] &= kept.repeat_interleave(b // len(kept), 0)[:, :, None].to(key.device)
        assert scaling is not None
        output = masked_attention(query, key, value, visible, scaling, softcap, s_aux)
        return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _kept_mask(cache: EvictingCache, layer: int, num_tokens: int) -> Tensor:
    _, rows, heads = cache.lengths.shape
    kept = torch.zeros(rows, heads, num_tokens, dtype=torch.bool)
    for row in range(rows):
        for head in range(heads):
            kept[row, head, cache.kept_positions(layer, row, head).long().cpu()] = True
    return kept
