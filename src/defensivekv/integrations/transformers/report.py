"""What a cache was asked for, what it kept, and what that takes."""

from dataclasses import dataclass
from typing import Any

from defensivekv.budget import format_bytes
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.model import LayerPlan
from defensivekv.integrations.transformers.stock import layer_bytes

_REASONS = {
    "sliding_attention": "reads a window only",
    "chunked_attention": "reads a chunk only",
    "linear_attention": "holds a state of fixed size",
    "conv": "holds a state of fixed size",
    "latent_attention": "holds one latent vector per token for all heads",
}
_WITHOUT_ENTRIES = ("dummy", "moe", "mlp")


@dataclass(frozen=True)
class LayerReport:
    """One layer of the model.

    kind: transformers' layer type. can_evict: whether the package keeps this layer. evicted: whether it has.
    lengths: stored entries of the prefix, lengths[row][head]. nbytes: bytes held.
    """

    index: int
    kind: str
    can_evict: bool
    evicted: bool
    lengths: tuple[tuple[int, ...], ...]
    nbytes: int

    @classmethod
    def of(cls, index: int, plan: LayerPlan, layer: Any) -> "LayerReport":
        """Of a layer of a cache, ours or transformers' own."""
        view = layer.store.view if isinstance(layer, EvictedLayer) else None
        lengths = () if view is None else tuple(view.prefix.lengths[row] for row in view.rows)
        return cls(index, plan.kind, plan.evicted, bool(lengths), lengths, layer_bytes(layer))

    @property
    def reason(self) -> str:
        """Why nothing is evicted from this layer; empty where something is."""
        if self.can_evict:
            return "" if self.evicted else "no prompt has been read yet"
        if self.kind in _WITHOUT_ENTRIES:
            return "has no entries of its own"
        return f"{_REASONS.get(self.kind, 'is not full attention')}, kept by transformers' own cache"


@dataclass(frozen=True)
class CacheReport:
    """A cache at one moment.

    bound: what may be held at any moment; empty without one.
    prompt_tokens: tokens of each prompt, pads left out; under a bound, of all text up to the last eviction.
    shares: of its entries that each of them may keep: the budget, or what an adaptive one came to.
    full_bytes: what the prompts' entries of the evicted layers would take if all were kept.
    """

    policy: str
    budget: str
    bound: str
    layers: tuple[LayerReport, ...]
    prompt_tokens: tuple[int, ...]
    shares: tuple[float, ...]
    full_bytes: int

    @property
    def kept_whole(self) -> tuple[bool, ...]:
        """Which prompts were not evicted from."""
        return tuple(share >= 1 for share in self.shares)

    @property
    def asked(self) -> str:
        """The budget, what an adaptive one came to for each prompt, and the bound."""
        chosen = ", ".join(f"{share:.2%}" for share in self.shares)
        came_to = f" (came to {chosen})" if self.budget.startswith("auto") and chosen else ""
        return self.budget + came_to + (f", at most {self.bound}" if self.bound else "")

    @property
    def entries_kept(self) -> int:
        """Entries of all prefixes."""
        return sum(sum(row) for layer in self.layers for row in layer.lengths)

    @property
    def entries_seen(self) -> int:
        """Entries that the prompts of the evicted layers had."""
        return sum(
            tokens * len(row)
            for layer in self.layers
            if layer.evicted
            for row, tokens in zip(layer.lengths, self.prompt_tokens, strict=True)
        )

    @property
    def achieved(self) -> float:
        """The share of the prompts' entries that was kept; 1.0 before any prompt."""
        return self.entries_kept / self.entries_seen if self.entries_seen else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def evicted_nbytes(self) -> int:
        """Bytes held by the layers that are evicted, which a budget in bytes and `full_bytes` are about."""
        return sum(layer.nbytes for layer in self.layers if layer.can_evict)

    def __str__(self) -> str:
        held, full = format_bytes(self.evicted_nbytes), format_bytes(self.full_bytes)
        lines = [
            f"policy {self.policy}, budget {self.asked}: kept {self.entries_kept} of {self.entries_seen} entries "
            f"({self.achieved:.2%}), {held} held, prompt in full {full}"
        ]
        if others := self.nbytes - self.evicted_nbytes:
            lines.append(f"{format_bytes(others)} more in layers that are not evicted")
        whole = sum(self.kept_whole)
        if whole:
            lines.append(f"{whole} of {len(self.kept_whole)} prompts kept whole")
        for layer in self.layers:
            if layer.evicted:
                heads = [length for row in layer.lengths for length in row]
                state = f"evicted, {min(heads)} to {max(heads)} entries per head"
            else:
                state = f"not evicted: {layer.reason}"
            lines.append(f"layer {layer.index:3d}  {layer.kind:20s} {state}")
        return "\n".join(lines)
