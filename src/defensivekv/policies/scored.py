"""Layers whose entries are scored, on their way to the allocation."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.policies.evidence import Evidence
from defensivekv.policies.standing import LayerStanding, Standing
from defensivekv.types import HeadScores, LayerScores, SlotScores

LayerKept = Bool[Tensor, "b _ _"]
"""As `Kept`, of a layer among others that may hold more or less."""


@dataclass(frozen=True)
class ScoredRow:
    """One row's entries of one layer, scored.

    scores: (h, t). preference: of the layer. standing: of its entries, where it is wanted. evidence, measured: what the
    scores were made of, where an adaptive budget will have them made again; needed: entries that it asks for, over the
    heads.
    """

    scores: Float[Tensor, "h t"]
    preference: float = 1.0
    standing: Standing | None = None
    evidence: Evidence | None = None
    measured: SlotScores | None = None
    needed: int = 0


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's entries, scored.

    scores: (b, h, t) float32; the higher, the more worth keeping; pads and slots without an entry score -inf, rows
    that are kept whole inf. num_tokens: of each row's text, pads left out. preferences: of each row.
    index: of the layer among the `num_layers` evicted ones. rows: what an adaptive budget decides on, and where the
    entries stand; empty where neither is wanted.
    """

    scores: LayerScores
    num_tokens: tuple[int, ...]
    preferences: tuple[float, ...]
    index: int
    num_layers: int
    rows: tuple[ScoredRow, ...] = ()

    @property
    def standing(self) -> LayerStanding | None:
        """What is kept beside the facts of entries; None where no standing was wanted."""
        rows = [row.standing for row in self.rows]
        if not rows or None in rows:
            return None
        return LayerStanding(tuple(row.top for row in rows if row is not None), self.preferences)

    def facts(self, valid: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b h t f"] | None:
        """What is kept beside each entry; None where no standing was wanted. valid: False at pads."""
        rows = [row.standing.facts for row in self.rows if row.standing is not None]
        if len(rows) < len(self.num_tokens):
            return None
        columns = zip(*(row.unbind(-1) for row in rows), strict=True)
        return torch.stack([place_rows(column, valid) for column in columns], dim=-1)


def place_rows(scores: Sequence[Float[Tensor, "h _"]], valid: Bool[Tensor, "b t"] | None) -> LayerScores:
    """Scores of a batch, (b, h, t), from those of its rows. valid: False at pads, which score -inf."""
    if valid is None:
        return torch.stack(list(scores))
    padded = scores[0].new_full((len(scores), scores[0].shape[0], valid.shape[1]), float("-inf"))
    for row, row_scores in enumerate(scores):
        padded[row][:, valid[row]] = row_scores
    return padded


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
