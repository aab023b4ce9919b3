"""Layers whose entries are scored, on their way to the allocation."""

from dataclasses import dataclass
from fractions import Fraction

from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.types import HeadScores, LayerScores

LayerKept = Bool[Tensor, "b _ _"]
"""As `Kept`, of a layer among others that may hold more or less."""


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's entries, scored.

    scores: (b, h, t) float32; the higher, the more worth keeping; pads and slots without an entry score -inf, rows
    that are kept whole inf. num_tokens: of each row's text, pads left out. preferences: of each row.
    index: of the layer among the `num_layers` evicted ones. needed: of each row, entries that an adaptive budget asks
    for, over the heads.
    """

    scores: LayerScores
    num_tokens: tuple[int, ...]
    preferences: tuple[float, ...]
    index: int
    num_layers: int
    needed: tuple[int, ...]


@dataclass(frozen=True)
class ScoredRow:
    """One row of a `ScoredLayer`."""

    scores: Float[Tensor, "h t"]
    preference: float
    needed: int


def entries_of_mass(importance: HeadScores, mass: Fraction) -> int:
    """Entries that hold `mass` of the importance, (h, n) not negative: of each head the fewest that do, summed up."""
    if importance.shape[-1] == 0:
        return 0
    ranked = importance.double().sort(dim=-1, descending=True).values
    cumulative = ranked.cumsum(-1)
    # A hair less, since sums are rounded; all entries hold all of it.
    asked = cumulative[:, -1:] * (float(mass) - 1e-12)
    counts = (cumulative < asked).sum(-1) + 1
    return int(counts.clamp_max(importance.shape[-1]).sum())
