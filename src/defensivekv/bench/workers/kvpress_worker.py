"""kvpress: per-head eviction as a mask over the full cache, set anew in the keys at every step."""

import time
from importlib.metadata import version
from typing import Any

import torch
from kvpress import CriticalAdaKVPress, SnapKVPress
from transformers import DynamicCache

from .protocol import Answer, Filling, Loading, Reading, serve
from .random_model import model_of

_DRAWN = 2**20


class KVPress:
    """One model and its caches, each with what is masked in every layer."""

    def __init__(self) -> None:
        self._model: Any = None
        self._device = torch.device("cpu")
        self._caches: dict[int, tuple[DynamicCache, list[tuple[torch.Tensor, ...]]]] = {}
        self._made = 0

    def load(self, asked: Loading) -> Answer:
        """The model, which kvpress has patched the attention of."""
        torch.set_num_threads(asked.threads)
        torch.set_grad_enabled(False)
        self._device = torch.device(asked.device)
        dtype = getattr(torch, asked.dtype)
        self._model = model_of(asked.config, asked.model, dtype, self._device, asked.seed)
        return {
            "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
            "weight_bytes": sum(parameter.nbytes for parameter in self._model.parameters()),
            "note": f"{asked.dtype}; a whole cache, in which the keys that were evicted are overwritten at every step",
        }

    def fill(self, asked: Filling) -> Answer:
        """A full cache of random entries, of which each layer masks all but `kept` a head, unevenly over heads."""
        config, generator = self._model.config, torch.Generator().manual_seed(asked.seed)
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache, masked = DynamicCache(), []
        for layer in range(config.num_hidden_layers):
            shape = (asked.batch, heads, asked.tokens, size)
            cache.update(self._random(shape, generator), self._random(shape, generator), layer)
            kept = asked.tokens if asked.kept is None else asked.kept
            masked.append(self._masked(asked.batch, heads, asked.tokens, heads * (asked.tokens - kept), generator))
        self._caches[self._made] = cache, masked
        self._made += 1
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {"handle": self._made - 1, "held_bytes": held, "note": "a full cache of random entries, and its masks"}

    def _random(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        count = torch.Size(shape).numel()
        drawn = torch.randn(min(count, _DRAWN), generator=generator).to(self._model.dtype)
        return drawn.repeat(-(-count // len(drawn)))[:count].view(shape).contiguous().to(self._device)

    def _masked(
        self, batch: int, heads: int, tokens: int, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, ...]:
        """As a press writes them down: rows, heads and positions of what is masked, `count` in every row."""
        # Heads lean towards more or less by as much as the lengths of an uneven prefix do.
        lean = torch.empty(batch, heads, 1).exponential_(generator=generator)
        scores = torch.rand(batch, heads, tokens, generator=generator) * lean
        indices = torch.topk(-scores.reshape(batch, -1), count, dim=1).indices.flatten()
        rows = torch.arange(batch).repeat_interleave(count)
        return tuple(each.to(self._device) for each in (rows, indices // tokens, indices % tokens))

    def step(self, handle: int) -> Answer:
        """One token of each sequence; the masks are set before the clock starts, as they lie there after a prefill."""
        cache, masked = self._caches[handle]
        for layer, indices in zip(self._model.model.layers, masked, strict=True):
            layer.self_attn.masked_key_indices = indices
        token = torch.ones(cache.layers[0].keys.shape[0], 1, dtype=torch.long, device=self._device)
        return {"seconds": self._timed(token, cache)}

    def prefill(self, asked: Reading) -> Answer:
        """Reads a prompt under CriticalAdaKVPress over SnapKVPress."""
        generator = torch.Generator().manual_seed(asked.seed)
        ids = torch.randint(self._model.config.vocab_size, (1, asked.tokens), generator=generator).to(self._device)
        kept = asked.tokens if asked.kept is None else asked.kept
        press = CriticalAdaKVPress(SnapKVPress(1 - kept / asked.tokens, window_size=32))
        with press(self._model):
            return {"seconds": self._timed(ids, DynamicCache())}

    def _timed(self, ids: torch.Tensor, cache: DynamicCache) -> float:
        self._synchronise()
        start = time.perf_counter()
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def drop(self, handle: int) -> Answer:
        """Forgets the cache."""
        del self._caches[handle]
        return {}


def main() -> None:
    """Serves until the input ends."""
    serve(KVPress())
