"""How the budget is split over heads and layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.preference import Preference
from defensivekv.policies.selection import keep_highest, keep_highest_per_head

RowScores = Float[Tensor, "h t"]
RowKept = Bool[Tensor, "_ _"]


@dataclass(frozen=True)
class Contender:
    """One layer of one row, as it comes to the allocation.

    scores: (h, t); -inf in slots that hold no entry. index: of the layer among the `num_layers` evicted ones.
    preference: what the layer asks for relative to others, where a `Preference` measured it. window: entries at the
    end that stay. num_tokens: of the text, evicted ones counted; 0: as many as there are slots.
    """

    scores: RowScores
    index: int = 0
    num_layers: int = 1
    preference: float = 1.0
    window: int = 0
    num_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the text, of which a share is kept."""
        return self.num_tokens or int(self.scores.shape[-1])


@runtime_checkable
class Allocation(Protocol):
    """Layers of one row, and the share to keep of them, to the kept sets.

    An allocation that spans layers may be asked before it has seen all of them: it then keeps, of those that it has
    seen, whatever it might keep in the end, and no more than the whole budget (by preference: an entry per head more).
    """

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]: ...

    @property
    def spans_layers(self) -> bool:
        """Whether layers compete for one budget, so that all must be seen before any is decided."""
        ...

    @property
    def preference(self) -> Preference | None:
        """What is measured of each layer beside its scores; None: nothing."""
        ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What the scorer must give; see `scoring.Scorer.gives`."""
        ...


@dataclass(frozen=True)
class PerHead:
    """Every head keeps its `floor(t * share)` highest scores."""

    spans_layers = False
    preference = None
    description = "the same for every head"
    needs: frozenset[str] = frozenset()

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        return [keep_highest_per_head(layer.scores, floor(layer.tokens * share)) for layer in layers]


@dataclass(frozen=True)
class PerLayer:
    """The heads of a layer compete for `floor(t * share * h)` entries (AdaKV, arXiv 2407.11550).

    safeguard: the share of an even split that every head keeps whatever the others score.
    """

    safeguard: Fraction = Fraction(0)
    spans_layers = False
    preference = None
    description = "heads of a layer compete"
    needs: frozenset[str] = frozenset({"levels"})

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        kept = []
        for layer in layers:
            h, t = len(layer.scores), layer.tokens
            guarded = keep_highest_per_head(layer.scores, floor(floor(t * share) * self.safeguard))
            safe = layer.scores.masked_fill(guarded, float("inf"))
            kept.extend(keep_highest([safe], floor(t * share * h)))
        return kept


@dataclass(frozen=True)
class AcrossLayers:
    """All heads of all layers compete for `floor(t * share * h * l)` entries (arXiv 2510.13334, section 4.3)."""

    spans_layers = True
    preference = None
    description = "heads of all layers compete"
    needs: frozenset[str] = frozenset({"levels"})

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        heads = [len(layer.scores) for layer in layers]
        # Layers that are still to come have as many heads as the last one.
        total = sum(heads) + heads[-1] * (layers[-1].num_layers - len(layers))
        return keep_highest([layer.scores for layer in layers], floor(layers[-1].tokens * total * share))


@dataclass(frozen=True)
class PerPosition:
    """All heads of a layer keep the same `floor(t * share)` positions, by their mean score over heads.

    chunk_size: positions that stay or go together, by the mean score of the chunk (ChunkKV, arXiv 2502.00299; TOVA,
    arXiv 2401.06104, has chunks of one). Chunks are taken whole, the best first; of the one that the budget does not
    hold whole, the best positions.
    """

    chunk_size: int = 1
    spans_layers = False
    preference = None
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise InvalidInputError(f"chunk_size {self.chunk_size} must be at least 1")

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        return "the same positions in every head" if self.chunk_size == 1 else "the same chunks in every head"

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        kept = []
        for layer in layers:
            mean = layer.scores.mean(0)
            rank = mean if self.chunk_size == 1 else self._by_chunk(mean)
            chosen = keep_highest([rank[None]], floor(layer.tokens * share))[0]
            kept.append(chosen.expand(layer.scores.shape).clone())
        return kept

    def _by_chunk(self, mean: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
        """Ranks of the positions: those of a better chunk are all higher."""
        t = len(mean)
        chunks = -(-t // self.chunk_size)
        padding = chunks * self.chunk_size - t
        sizes = torch.full((chunks,), self.chunk_size, device=mean.device)
        sizes[-1] -= padding
        sums = torch.nn.functional.pad(mean, (0, padding)).view(chunks, -1).sum(1)
        chunk_rank = (sums / sizes).argsort().argsort().repeat_interleave(sizes)
        return (chunk_rank * t + mean.argsort().argsort()).double()


@dataclass(frozen=True)
class Pyramid:
    """Lower layers keep more, in equal steps; all heads of a layer the same (PyramidKV, arXiv 2406.02069).

    The first layer gets `2 * mean - mean / beta` entries per head and the last `mean / beta`, as in the authors' code;
    where that is more than the prompt or less than the window, every layer gets the same. In all, `floor` of the
    budget.
    """

    beta: int = 20
    spans_layers = False
    preference = None
    description = "more to lower layers"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise InvalidInputError(f"beta {self.beta} must be at least 1")

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        return [keep_highest_per_head(layer.scores, self.entries_per_head(layer, share)) for layer in layers]

    def entries_per_head(self, layer: Contender, share: Fraction) -> int:
        """What each head of the layer keeps."""
        t, last = layer.tokens, layer.num_layers - 1
        mean = t * share
        low = mean / self.beta
        high = 2 * mean - low
        if high >= t - layer.window:
            high = Fraction(t - layer.window)
            low = 2 * mean - high
        if last == 0 or not t >= high >= low >= layer.window:
            return floor(mean)
        step = (high - low) / last

        def through(count: int) -> int:
            return floor(count * high - step * Fraction(count * (count - 1), 2))

        return through(layer.index + 1) - through(layer.index)


@dataclass(frozen=True)
class ByPreference:
    """Layers share the budget in proportion to their preference; all heads of a layer the same (CAKE, arXiv
    2503.12491, section 4.2). No layer gets more than its prompt or less than the window; what one cannot take, the
    others get.
    """

    preference: Preference
    spans_layers = True
    description = "layers by dispersion and shift"
    needs: frozenset[str] = frozenset({"queries", "masses", "one part"})

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        t, window, num_layers = layers[0].tokens, layers[0].window, layers[0].num_layers
        total = floor(t * share * num_layers) - window * num_layers
        counts = _proportional([layer.preference for layer in layers], total, t - window)
        if len(layers) < num_layers:
            # What a layer gets only falls as others come, but for the entry by which it is rounded.
            counts = [min(count + 1, t - window) for count in counts]
        return [
            keep_highest_per_head(layer.scores, window + count) for layer, count in zip(layers, counts, strict=True)
        ]


@dataclass(frozen=True)
class ByProfile:
    """Retrieval heads keep the whole prompt, streaming heads their first and latest entries (DuoAttention, arXiv
    2410.10819).

    heads: heads[layer][kv head], the higher, the more a retrieval head; of all evicted layers. As many heads are
    retrieval heads as the budget allows when the others keep `num_sinks + num_recent` entries; the next one gets what
    is left. A budget below that makes all heads streaming heads of an even share.
    """

    heads: tuple[tuple[float, ...], ...]
    num_sinks: int = 64
    num_recent: int = 256
    spans_layers = False
    preference = None
    description = "whole or streaming, by profile"
    needs: frozenset[str] = frozenset()

    def __call__(self, layers: Sequence[Contender], share: Fraction) -> list[RowKept]:
        kept = []
        for layer in layers:
            h, t = len(layer.scores), layer.tokens
            if len(self.heads) != layer.num_layers or len(self.heads[layer.index]) != h:
                raise InvalidInputError(
                    f"the profile has {len(self.heads)} layers of {len(self.heads[0])} heads, the model "
                    f"{layer.num_layers} evicted layers of {h}: make one for this model with `defensivekv profile`"
                )
            counts = self._entries_per_head(layer.index, t, share)
            rank = layer.scores.argsort(-1, descending=True).argsort(-1)
            chosen = rank < torch.tensor(counts, device=rank.device)[:, None]
            kept.append(chosen & (layer.scores > float("-inf")))
        return kept

    def _entries_per_head(self, index: int, t: int, share: Fraction) -> list[int]:
        flat = [weight for layer in self.heads for weight in layer]
        total, streaming = floor(len(flat) * t * share), min(t, self.num_sinks + self.num_recent)
        if len(flat) * streaming > total:
            return [floor(t * share)] * len(self.heads[index])
        surplus = total - len(flat) * streaming
        counts = [streaming] * len(flat)
        for head in sorted(range(len(flat)), key=lambda head: -flat[head]):
            more = min(t - streaming, surplus)
            counts[head] += more
            surplus -= more
        before = sum(len(layer) for layer in self.heads[:index])
        return counts[before : before + len(self.heads[index])]


def _proportional(preferences: list[float], total: int, most: int) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `preferences`, none above `most`."""
    counts = [0] * len(preferences)
    open_layers = list(range(len(preferences)))
    left = min(total, most * len(preferences))
    while left and open_layers:
        # Preferences of zero, all of them, are no preference at all.
        weight = sum(preferences[layer] for layer in open_layers)
        shares = {
            layer: left * (preferences[layer] / weight if weight > 0 else 1 / len(open_layers)) for layer in open_layers
        }
        full = [layer for layer in open_layers if shares[layer] >= most]
        if not full:
            for layer in open_layers:
                counts[layer] = floor(shares[layer])
            remainders = sorted(open_layers, key=lambda layer: counts[layer] - shares[layer])
            for layer in remainders[: left - sum(counts[layer] for layer in open_layers)]:
                counts[layer] += 1
            break
        for layer in full:
            counts[layer] = most
        left -= most * len(full)
        open_layers = [layer for layer in open_layers if layer not in full]
    return counts
