"""What is known of the texts in a batch: how long each is, which tokens are pads, and how much of it may stay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """The rows of a batch, in its order.

    tokens: of each row that were decided on, pads left out. shares: of them that may stay. valid: (b, t) False at
    pads, of the tokens decided on; None: no pads. What lies past its end is no pad. released: rows that were given up.
    """

    tokens: tuple[int, ...] = ()
    shares: tuple[Fraction, ...] = ()
    valid: Bool[Tensor, "b t"] | None = None
    released: frozenset[int] = frozenset()

    def grown(self, seen: int, valid: Bool[Tensor, "b x"] | None, counts: Sequence[int]) -> "Texts":
        """After further tokens: `counts` of each row, which follow `seen` of the batch. valid: False at their pads."""
        tokens = tuple(before + count for before, count in zip(self.tokens or (0,) * len(counts), counts, strict=True))
        if valid is None or bool(valid.all()):
            return replace(self, tokens=tokens)
        known = self.valid
        if known is None:
            known = valid.new_ones(len(counts), 0)
        between = known.new_ones(len(counts), seen - known.shape[1])
        return replace(self, tokens=tokens, valid=torch.cat((known, between, valid.to(known.device)), dim=1))

    def without(self, rows: Sequence[int]) -> "Texts":
        """The same, these rows released too."""
        return replace(self, released=self.released | set(rows))

    def select_rows(self, index: Sequence[int]) -> "Texts":
        """Those of the batch of these rows, which may repeat."""
        if not self.tokens:
            return self
        return Texts(
            tuple(self.tokens[row] for row in index),
            tuple(self.shares[row] for row in index),
            None if self.valid is None else self.valid[list(index)],
            frozenset(number for number, row in enumerate(index) if row in self.released),
        )

    def places(self, row: int, positions: Int[Tensor, "*h n"]) -> Int[Tensor, "*h n"]:
        """Which token of its row each position of the batch is, pads not counted."""
        if self.valid is None:
            return positions
        ranks = self.valid[row].to(positions.device).cumsum(0)
        known = len(ranks)
        inside = ranks[positions.clamp(max=known - 1).long()] - 1
        past = positions - known + ranks[-1]
        return torch.where(positions < known, inside.to(positions.dtype), past.to(positions.dtype))
