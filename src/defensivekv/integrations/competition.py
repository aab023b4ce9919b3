"""Layers on their way to a decision: alone, or all of them for one budget.

An entry among the highest of all layers is among the highest of those seen so far. So a decision that spans layers
need not hold them all: after each layer it keeps what may still stay, and what stays in the end is the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from defensivekv.cache import filled_slots
from defensivekv.policies import Policy
from defensivekv.policies.scored import ScoredLayer
from defensivekv.types import Kept, LayerScores


class Competition:
    """The layers of one forward pass.

    layers: numbers of the evicted layers, in order.
    """

    def __init__(self, policy: Policy, layers: tuple[int, ...]) -> None:
        self.policy = policy
        self.layers = layers
        self.shares: list[Fraction] = []
        """What each row keeps, once it is decided."""
        self._held: dict[int, ScoredLayer] = {}
        self._compacted: set[int] = set()

    @property
    def is_underway(self) -> bool:
        """Whether scores wait for those of further layers."""
        return bool(self._held)

    def add(
        self, layer: int, scored: ScoredLayer, shares: Sequence[Fraction], *, streams: bool = True
    ) -> dict[int, Kept]:
        """What stays of the layers from which something goes now, in each layer's slots.

        shares: of each row, at most. streams: whether what cannot stay goes as soon as that is known; otherwise, all
        goes after the last layer.
        """
        if not self.policy.spans_layers:
            self.shares = list(shares)
            return {layer: self.policy.keep([scored], shares)[0]}
        self._held[layer] = scored
        is_last = len(self._held) == len(self.layers)
        # An adaptive budget is what all layers say it is.
        if not is_last and (self.policy.budget.is_adaptive or not streams):
            return {}
        held, self.shares = list(self._held.values()), list(shares)
        if is_last:
            held, self.shares = self.policy.settle(held, shares)
        kept = dict(zip(self._held, self.policy.keep(held, self.shares), strict=True))
        going = {
            number: stays
            for number, stays in kept.items()
            if (is_last and number not in self._compacted)
            or bool((self._held[number].scores > float("-inf")).ne(stays).any())
        }
        if is_last:
            self._held, self._compacted = {}, set()
            return going
        for number, stays in going.items():
            scored = self._held[number]
            self._held[number] = replace(scored, scores=compacted_scores(scored.scores, stays))
            self._compacted.add(number)
        return going


def compacted_scores(scores: LayerScores, kept: Kept) -> LayerScores:
    """The scores of what stays, each head's in the last slots, as a compacted layer has its entries."""
    filled = filled_slots(kept.sum(-1))
    slots = scores.new_full(filled.shape, float("-inf"))
    slots[filled] = scores[kept]
    return slots
