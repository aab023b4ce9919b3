"""vLLM's attention backend: its names, and one layer's part of a step."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from defensivekv.attention import attend_pages
from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.vllm.reading import LayerTokens
from defensivekv.integrations.vllm.step import EvictingMetadataBuilder, PagedQueries, StepMetadata


class EvictingBackend(AttentionBackend):
    """Names the parts. The cache is written in the layers' forward pass, once it is known what stays."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """As vLLM logs it."""
        return "DEFENSIVEKV"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each layer's pages by themselves."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type["EvictingImpl"]:
        """Of the layers."""
        return EvictingImpl

    @staticmethod
    def get_builder_cls() -> type["EvictingMetadataBuilder"]:
        """Of steps."""
        return EvictingMetadataBuilder


class EvictingImpl(AttentionImpl[StepMetadata]):
    """One layer's attention.

    number: of the layer. dtype: of its tokens. projection: its output projection's module, where the policy asks for
    its weight.
    """

    supports_quant_query_input: ClassVar[bool] = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        number: int,
        dtype: torch.dtype,
        projection: nn.Module | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.number = number
        self.dtype = dtype
        self.sliding_window = None
        self._projection = projection
        self._weight: Float[Tensor, "hidden qd"] | None = None

    @classmethod
    def of(cls, layer: Attention, number: int, projection: nn.Module | None) -> "EvictingImpl":
        """In place of the layer's own. Raises UnsupportedModelError for attention of another kind."""
        stock = layer.impl
        extras = {
            "a sliding window": layer.sliding_window is not None,
            "sinks": getattr(stock, "sinks", None) is not None,
            "a soft cap": bool(getattr(stock, "logits_soft_cap", 0)),
            "ALiBi": getattr(stock, "alibi_slopes", None) is not None,
            "another layer's keys": layer.kv_sharing_target_layer_name is not None,
            f"{layer.attn_type} attention": layer.attn_type != "decoder",
            "keys and values of different sizes": layer.head_size != layer.head_size_v,
        }
        found = [what for what, is_there in extras.items() if is_there]
        if found:
            raise UnsupportedModelError(
                f"layer {layer.layer_name} has {' and '.join(found)}: models with such layers cannot be served with "
                "DefensiveKV"
            )
        return cls(layer.num_heads, layer.head_size, stock.scale, layer.num_kv_heads, number, layer.dtype, projection)

    def forward(
        self,
        layer: Any,
        query: Float[Tensor, "x q d"],
        key: Float[Tensor, "x h d"],
        value: Float[Tensor, "x h d"],
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Float[Tensor, "x q d"],
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Reads prompts, each by itself, then all that follows prompts in one call."""
        if attn_metadata is None:
            # vLLM looks how much memory it needs.
            return output
        tokens = LayerTokens(self.number, query, key, value, output, self.scale, self._output_projection())
        for part in attn_metadata.prompts:
            part.read(tokens.part(part.tokens))
        if attn_metadata.paged is not None:
            self._read_paged(attn_metadata, attn_metadata.paged, tokens)
        return output

    def _read_paged(self, step: StepMetadata, paged: PagedQueries, tokens: LayerTokens) -> None:
        store, number = step.store, self.number
        decided = {part.state for part in step.prompts}
        for place, state in enumerate(paged.states):
            if state in decided:
                paged.starts[number, place] = state.starts[number].to(paged.starts.device)
        where = paged.tokens
        store.write(paged.writes + number * store.layout.layer_stride, tokens.keys[where], tokens.values[where])
        tokens.output[where] = attend_pages(
            tokens.queries[where],
            store.rows,
            store.layout,
            number,
            paged.table,
            paged.starts[number],
            scaling=self.scale,
        )

    def _output_projection(self) -> Float[Tensor, "hidden qd"] | None:
        """The weight: as it is, or where vLLM packed it away, what it makes of each unit vector."""
        if self._projection is None:
            return None
        if self._weight is None:
            size = self.num_heads * self.head_size
            weight: Tensor | None = getattr(self._projection, "weight", None)
            if weight is not None and weight.is_floating_point() and weight.dim() == 2 and weight.shape[1] == size:
                self._weight = weight.detach()
            else:
                self._weight = self._unpacked(size)
        return self._weight

    def _unpacked(self, size: int) -> Float[Tensor, "hidden qd"]:
        projection: Any = self._projection
        first = next(iter((*projection.parameters(), *projection.buffers())), None)
        unit = torch.eye(size, dtype=self.dtype, device=None if first is None else first.device)
        made: Tensor = projection.quant_method.apply(projection, unit, None)
        return made.T.contiguous()
