"""Where an entry stands among the others, so that less can be kept later, without the prompt.

A smaller budget keeps a part of what a larger one kept. Which part, two numbers tell beside each entry that was kept:

    score   by which it competes
    rank    its place among those of its head that come first, as many as the budget has room for; where any do

Of every layer and row, two more: what those that come first score, and the preference of the layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.types import HeadScores, SlotScores


@dataclass(frozen=True)
class Staged:
    """Scores in two stages: some of each head's entries come first, the others compete by their scores.

    scores: (h, n). ranks: (h, n) float32 place among those that may come first, infinite where an entry never does;
    None: none does. top: what those score that come first.
    """

    scores: HeadScores
    ranks: HeadScores | None = None
    top: float | Float[Tensor, ""] = 0.0

    @classmethod
    def of(
        cls,
        scores: HeadScores,
        order: Int[Tensor, "h k"],
        top: float | Float[Tensor, ""],
        may: Bool[Tensor, "h k"] | None = None,
    ) -> "Staged":
        """With the entries of `order` first, in that order. may: whether each of them may; None: all."""
        places = torch.arange(order.shape[-1], device=scores.device, dtype=torch.float32).expand(order.shape)
        if may is not None:
            places = places.masked_fill(~may, float("inf"))
        ranks = torch.full(scores.shape, float("inf"), device=scores.device)
        return cls(scores, ranks.scatter_(-1, order, places), top)

    def with_first(self, count: int) -> HeadScores:
        """The scores where `count` of each head come first."""
        if self.ranks is None or not count:
            return self.scores
        top = torch.as_tensor(self.top, dtype=self.scores.dtype, device=self.scores.device)
        return torch.where(self.ranks < count, top, self.scores)


@dataclass(frozen=True)
class Standing:
    """All slots of one row of one layer. As `Staged`; what always stays scores the most, and comes never first."""

    scores: SlotScores
    ranks: SlotScores | None
    top: float

    @property
    def facts(self) -> Float[Tensor, "h m f"]:
        """What is worth keeping beside each entry: (h, m, 1), or (h, m, 2) where some come first. float32."""
        parts = [self.scores] if self.ranks is None else [self.scores, self.ranks]
        return torch.stack([part.float() for part in parts], dim=-1)


@dataclass(frozen=True)
class LayerStanding:
    """What is kept of a layer beside its entries, of each row: what those that come first score; its preference."""

    tops: tuple[float, ...]
    preferences: tuple[float, ...]

    def select_rows(self, index: Sequence[int]) -> "LayerStanding":
        """Of the batch of these rows, which may repeat."""
        return LayerStanding(tuple(self.tops[row] for row in index), tuple(self.preferences[row] for row in index))


def scores_from(facts: Float[Tensor, "h m f"], top: float, count: int) -> SlotScores:
    """The scores of entries, where `count` of each head come first."""
    ranks = facts[..., 1] if facts.shape[-1] > 1 else None
    return Staged(facts[..., 0], ranks, top).with_first(count)
