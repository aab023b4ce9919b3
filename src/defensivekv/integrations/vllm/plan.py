"""How much stays of a prompt: what the scheduler counts by, and the workers store by."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, floor

from defensivekv.errors import BudgetError
from defensivekv.policies import Policy
from defensivekv.policies.allocation import PerHead, PerLayer, PerPosition

_EVEN = (PerHead, PerLayer, PerPosition)
"""Allocations that give every layer as much."""

_NO_BYTES = 1
"""Of a token: no budget that is served counts them."""


@dataclass(frozen=True)
class EvictionPlan:
    """A policy on a rank's part of a model.

    layers: evicted ones. heads: key-value heads of a layer on this rank. groups: of these heads, each of which
    competes for itself.
    whole_up_to: prompts of so many tokens are read in one pass, so that nothing is stored of them but what stays.
    """

    policy: Policy
    layers: int
    heads: int
    groups: int
    whole_up_to: int

    @cached_property
    def packs_layers(self) -> bool:
        """Whether layers keep different amounts, so that they share the rows of each other's pages."""
        return not isinstance(self.policy.allocation, _EVEN)

    def share(self, num_tokens: int) -> Fraction:
        """The share that stays of a prompt. Where a budget is less than what always stays, that stays: a server
        answers where `Policy.row_share` raises.
        """
        try:
            return self.policy.row_share(num_tokens, _NO_BYTES)
        except BudgetError:
            return Fraction(self.policy.num_staying, num_tokens)

    def slots(self, num_tokens: int) -> int:
        """Slots for what stays of a prompt: entries per head, on average, rounded up."""
        share = self.share(num_tokens)
        if share >= 1:
            return num_tokens
        layers = self.layers if self.packs_layers else 1
        kept = self.groups * floor(num_tokens * share * (self.heads // self.groups) * layers)
        return ceil(Fraction(kept, self.heads * layers))

    def reads_whole(self, num_tokens: int) -> bool:
        """Whether a prompt is read in one pass."""
        return num_tokens <= self.whole_up_to
