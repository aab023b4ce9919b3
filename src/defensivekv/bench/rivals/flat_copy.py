"""The scheme of the DefensiveKV authors' code: a flat ragged cache, copied whole with every token.

Of each layer keys and values lie flat, (s, d), row by row and head by head. A token's entry belongs at the end of each
head's part, so that every step makes a new flat tensor of one entry more for each head, and reads that:

    before   a a a a | b b | c c c c c c          one head's part after the other
    after    a a a a A | b b B | c c c c c c C    written anew, whole, by every step

On CUDA it is read by flash-attn's kernel for sequences of different lengths where that is installed, as in their code;
elsewhere head by head, with SDPA. Theirs is in AdaKV's `update_flatten_view` and `flash_attn_varlen_func`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from defensivekv.cache import PrefixView
from defensivekv.errors import RivalError
from defensivekv.integrations.transformers import EvictingCache

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

ATTENTION_NAME = "defensivekv_flat_copy"
_LENGTHS = "_flat_lengths"


class FlatCopyLayer(CacheLayerMixin):
    """One layer. lengths: entries of each head of each row, row by row. seen: tokens that went in."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, lengths: list[int], seen: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.lengths, self.seen = lengths, seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """It comes filled."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One token, (b, h, 1, d); gives the new flat tensors, with the lengths attached."""
        if key_states.shape[2] != 1:
            raise RivalError("the flat copy takes one token at a time")
        self.keys = _inserted(self.keys, key_states, self.lengths)
        self.values = _inserted(self.values, value_states, self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        self.seen += 1
        setattr(self.keys, _LENGTHS, self.lengths)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the tokens seen; the mask is not used."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, from which positions follow."""
        return self.seen

    def get_max_length(self) -> int:
        """There is none."""
        return -1


class FlatCopyCache(Cache):
    """All layers."""

    @classmethod
    def of(cls, source: EvictingCache) -> "FlatCopyCache":
        """What an evicting cache holds, its prefix and nothing later. The tensors are shared, and never written."""
        layers = []
        for index in source.evicted_layers:
            store = source.layers[index].store
            view: PrefixView | None = store.view
            if view is None or not view.is_identity or store.tail_length:
                raise RivalError("only a cache that has just evicted its prompt is taken over")
            prefix = view.prefix
            lengths = [length for row in prefix.lengths for length in row]
            layers.append(FlatCopyLayer(prefix.keys, prefix.values, lengths, store.seen))
        return cls(layers=layers)

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def _inserted(flat: Tensor, new: Tensor, lengths: list[int]) -> Tensor:
    """One entry more at the end of each head's part. flat: (s, d). new: (b, h, 1, d)."""
    parts: list[Tensor] = []
    for part, entry in zip(flat.split(lengths), new.flatten(0, 1), strict=True):
        parts += (part, entry)
    return torch.cat(parts)


def register() -> None:
    """Makes the attention known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """One query sees everything."""


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query: (b, q, 1, d); key and value: flat. Gives (b, 1, q, d)."""
    lengths: list[int] = getattr(key, _LENGTHS)
    rows, heads = query.shape[0], query.shape[1]
    # Query heads of a group are packed as the queries of its key-value head.
    packed = query.view(len(lengths), rows * heads // len(lengths), query.shape[-1])
    if query.is_cuda and flash_attn_varlen_func is not None:
        output = _varlen(packed, key, value, lengths, scaling)
    else:
        output = _head_by_head(packed, key, value, lengths, scaling)
    return output.view(rows, 1, heads, -1), None


def _head_by_head(packed: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    parts = zip(packed, key.split(lengths), value.split(lengths), strict=True)
    outputs = [F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scaling) for q, k, v in parts]
    return torch.cat(outputs)


def _varlen(packed: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    counts = torch.tensor([0, *lengths], dtype=torch.int32, device=key.device)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=key.device)
    # Each head is a sequence with one query of as many heads as are in the group, as in their code.
    output: Tensor = flash_attn_varlen_func(
        packed,
        key[:, None],
        value[:, None],
        starts,
        counts.cumsum(0, dtype=torch.int32),
        1,
        max(lengths),
        softmax_scale=scaling,
        causal=True,
    )
    return output
