"""How the budget is split over heads and layers."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.policies.selection import keep_highest, keep_highest_per_head

RowScores = Float[Tensor, "h t"]
RowKept = Bool[Tensor, "h t"]


@runtime_checkable
class Allocation(Protocol):
    """Scores of one row, a tensor (h, t) per layer, and the share to keep, to the kept sets."""

    def __call__(self, scores: list[RowScores], share: Fraction) -> list[RowKept]: ...

    @property
    def spans_layers(self) -> bool:
        """Whether layers compete for one budget, so that all must be seen before any is decided."""
        ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...


@dataclass(frozen=True)
class PerHead:
    """Every head keeps its `floor(t * share)` highest scores."""

    spans_layers = False
    description = "the same for every head"

    def __call__(self, scores: list[RowScores], share: Fraction) -> list[RowKept]:
        return [keep_highest_per_head(layer, floor(layer.shape[-1] * share)) for layer in scores]


@dataclass(frozen=True)
class PerLayer:
    """The heads of a layer compete for `floor(t * share * h)` entries (AdaKV, arXiv 2407.11550).

    safeguard: the share of an even split that every head keeps whatever the others score.
    """

    safeguard: Fraction = Fraction(0)
    spans_layers = False
    description = "heads of a layer compete"

    def __call__(self, scores: list[RowScores], share: Fraction) -> list[RowKept]:
        kept = []
        for layer in scores:
            h, t = layer.shape
            guarded = keep_highest_per_head(layer, floor(floor(t * share) * self.safeguard))
            safe = layer.masked_fill(guarded, float("inf"))
            kept.extend(keep_highest([safe], floor(t * share * h)))
        return kept


@dataclass(frozen=True)
class AcrossLayers:
    """All heads of all layers compete for `floor(t * share * h * l)` entries (arXiv 2510.13334, section 4.3)."""

    spans_layers = True
    description = "heads of all layers compete"

    def __call__(self, scores: list[RowScores], share: Fraction) -> list[RowKept]:
        return keep_highest(scores, floor(sum(layer.numel() for layer in scores) * share))


def count_kept(kept: list[RowKept]) -> int:
    """Entries kept, over all layers and heads."""
    return int(torch.stack([layer.sum() for layer in kept]).sum())
