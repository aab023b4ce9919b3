"""Rivals in this process: transformers' own caches, the flat copy, and this package."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import DynamicCache, StaticCache

from defensivekv.bench.caches import filled_evicting, filled_static, filled_stock
from defensivekv.bench.plan import OURS
from defensivekv.bench.rivals import flat_copy
from defensivekv.bench.rivals.host import Host
from defensivekv.bench.rivals.rival import Filling, Prompt, Rival
from defensivekv.budget import Budget
from defensivekv.errors import RivalError
from defensivekv.integrations.transformers import EvictingCache, enable


class _LocalStepper:
    """A cache, and what has to be switched before each of its steps; the clock runs for the step alone."""

    note = ""

    def __init__(
        self,
        host: Host,
        cache: Any,
        batch: int,
        held: int,
        switched: Callable[[], AbstractContextManager[None] | None],
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self._host, self._cache, self._batch = host, cache, batch
        self._switched, self._forward = switched, forward
        self.held_bytes = held

    def step(self) -> float:
        """One token of each sequence."""
        with self._switched() or nullcontext():
            return self._host.step(self._cache, self._batch, self._forward)

    def close(self) -> None:
        """Forgets the cache, and what was compiled."""
        if self._forward is not None:
            self._host.release_compiled()
        self._cache = self._forward = None


class _Local(Rival):
    """What the rivals of this process have in common."""

    family, fills, reads = "", True, True

    def __init__(self, host: Host) -> None:
        self._host = host
        self.family = self.family or self.name

    def missing(self, batch: int = 1) -> str | None:
        """Nothing has to be installed."""
        return None

    def start(self) -> None:
        """Loads the model."""
        _ = self._host.facts

    def _entries(self, filling: Filling) -> int:
        return filling.batch * filling.kept * self._host.facts.token_bytes

    def needs(self, filling: Filling) -> int:
        """The cache, and of one layer a copy."""
        return self._entries(filling) * (self._host.facts.layers + 1) // self._host.facts.layers

    def read_bytes(self, held: int) -> int | None:
        """All weights that a token passes, and the cache."""
        weights = self._host.facts.read_bytes
        return None if weights is None else weights + held

    def describe(self) -> dict[str, object]:
        """As the run itself."""
        return {}


class Stock(_Local):
    """transformers' DynamicCache with SDPA."""

    name, takes_budget = "stock", False

    def fill(self, filling: Filling) -> _LocalStepper:
        """All entries."""
        cache = filled_stock(self._host.model, filling.tokens, self._host.generator(filling.seed), filling.batch)
        return _LocalStepper(self._host, cache, filling.batch, _held(cache), self._host.attention)

    def read(self, prompt: Prompt) -> float:
        """The stock prefill."""
        with self._host.attention():
            return self._host.read(DynamicCache(config=self._host.model.config), prompt.tokens, prompt.seed)


class Static(_Local):
    """transformers' StaticCache with SDPA, allocated for what is generated."""

    name, takes_budget = "static", False

    def fill(self, filling: Filling) -> _LocalStepper:
        """All entries."""
        cache = _static(self._host, filling)
        return _LocalStepper(self._host, cache, filling.batch, _held(cache), self._host.attention)

    def read(self, prompt: Prompt) -> float:
        """The prefill into it; allocating it is not timed."""
        cache = StaticCache(config=self._host.model.config, max_cache_len=prompt.tokens)
        with self._host.attention():
            return self._host.read(cache, prompt.tokens, prompt.seed)


class Evicting(_Local):
    """Of this package, `EvictingCache`."""

    name, takes_budget = OURS, True

    def fill(self, filling: Filling) -> _LocalStepper:
        """The budget's entries, unevenly over the heads."""
        cache = _evicted(self._host, filling)
        return _LocalStepper(self._host, cache, filling.batch, cache.nbytes, lambda: enable(self._host.model))

    def read(self, prompt: Prompt) -> float:
        """The prefill, with scoring and compaction."""
        enable(self._host.model)
        cache = EvictingCache(self._host.model, prompt.policy, Budget.parse(prompt.share or 1.0))
        return self._host.read(cache, prompt.tokens, prompt.seed)


def _held(cache: DynamicCache | StaticCache) -> int:
    """Bytes of keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _static(host: Host, filling: Filling) -> StaticCache:
    return filled_static(host.model, filling.tokens, filling.room, host.generator(filling.seed), filling.batch)


def _evicted(host: Host, filling: Filling, static_tokens: int | None = None) -> EvictingCache:
    enable(host.model)
    share = 1.0 if filling.share is None else float(filling.share)
    generator = host.generator(filling.seed)
    return filled_evicting(
        host.model, filling.tokens, share, filling.tokens, generator, filling.batch, static_tokens=static_tokens
    )


class _Compiled(_Local):
    """Whose steps are compiled; the first of them takes as long as that does."""

    reads = False

    def needs(self, filling: Filling) -> int:
        """On a CPU, packed weights too."""
        packed = self._host.facts.weight_bytes if self._host.device.type == "cpu" else 0
        return super().needs(filling) + packed

    def read(self, prompt: Prompt) -> float:
        """Not measured."""
        raise RivalError("compiled steps are measured in decoding alone")


class CompiledEvicting(_Compiled):
    """Of this package, `EvictingCache` with static tokens."""

    name, family, takes_budget = f"{OURS} compiled", "compiled", True

    def fill(self, filling: Filling) -> _LocalStepper:
        """The budget's entries, unevenly over the heads."""
        cache = _evicted(self._host, filling, static_tokens=filling.room)
        switched = lambda: enable(self._host.model)  # noqa: E731
        forward = self._host.compiled_forward()
        return _LocalStepper(self._host, cache, filling.batch, cache.nbytes, switched, forward)


class CompiledStatic(_Compiled):
    """transformers' StaticCache with SDPA."""

    name, family, takes_budget = "static compiled", "static-compiled", False

    def fill(self, filling: Filling) -> _LocalStepper:
        """All entries."""
        cache, forward = _static(self._host, filling), self._host.compiled_forward()
        return _LocalStepper(self._host, cache, filling.batch, _held(cache), self._host.attention, forward)


class FlatCopy(_Local):
    """The scheme of the authors' code: a flat ragged cache that is copied whole with every token."""

    name, takes_budget, reads = "flat-copy", True, False

    def fill(self, filling: Filling) -> _LocalStepper:
        """The same entries as `Evicting`."""
        cache = flat_copy.FlatCopyCache.of(_evicted(self._host, filling))
        flat_copy.register()
        switched = lambda: self._host.attention(flat_copy.ATTENTION_NAME)  # noqa: E731
        return _LocalStepper(self._host, cache, filling.batch, cache.nbytes, switched)

    def read(self, prompt: Prompt) -> float:
        """Not measured."""
        raise RivalError("the flat copy is measured in decoding alone")
