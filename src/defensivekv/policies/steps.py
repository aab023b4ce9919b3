"""One step of eviction as a text grows: new queries are heard, old and new entries compete by one rule.

The same step serves the chunks of a prefill and blocks of generated tokens. Worst cases are maxima and means are sums
over counts, so that what was seen of an entry is a few numbers beside it, and new queries add to them:

    facts   reduced   what the aggregation made of all importances so far     where the scorer remembers
            counts    queries and query heads that saw the entry
            sums      of the importances                                      where values are weighted
            measured  what the weighting measured of the entry, once          where it measures
"""

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.evidence import Evidence, observe
from defensivekv.policies.layout import Layout
from defensivekv.policies.observation import Observation
from defensivekv.policies.policy import Policy
from defensivekv.policies.standing import Standing
from defensivekv.types import SlotScores

Facts = Float[Tensor, "h m f"]

NUM_SINKS = 4
"""First tokens that stay in a text without end, whatever the method says (StreamingLLM, arXiv 2309.17453)."""


def check_evicts_in_steps(policy: Policy) -> None:
    """Raises InvalidInputError, with the reason, for a policy that can only decide on a whole prompt at once."""
    if "steps" not in policy.scorer.gives:
        reason = f"{type(policy.scorer).__name__} ({policy.scorer.description}) wants the whole prompt"
    elif "one part" in policy.aggregation.needs | policy.allocation.needs:
        part = policy.aggregation if "one part" in policy.aggregation.needs else policy.allocation
        reason = f"{type(part).__name__} ({part.description}) needs all queries at once"
    elif not policy.protect_window:
        reason = "parity mode (protect_window=False) is the authors' decision on a whole prompt"
    elif policy.budget.is_adaptive:
        reason = f"budget {policy.budget} is found once the whole prompt was seen"
    else:
        return
    raise InvalidInputError(
        f"policy {policy.name!r} cannot evict in steps, as chunked prefill and a bound on the whole sequence do: "
        f"{reason}; read the prompt at once, without max_entries and with a budget that is a share or a count, or use "
        "another policy, such as 'layer-defensivekv'"
    )


@dataclass(frozen=True)
class Stepper:
    """A policy, as it decides step by step. Of one row of one layer, as all of `policies`."""

    policy: Policy

    @property
    def remembers(self) -> bool:
        """Whether what earlier queries said counts on."""
        return "memory" in self.policy.scorer.gives

    @property
    def num_facts(self) -> int:
        """Numbers, of four bytes, beside each entry."""
        weighted = self.policy.weighting is not None
        return (2 + weighted if self.remembers else 0) + weighted

    @property
    def num_protected(self) -> int:
        """Latest tokens that stay."""
        return self.policy.window_size

    def num_queries(self, interval: int) -> int:
        """Of the latest queries, how many a step wants that comes after `interval` tokens."""
        return {"nothing": 1, "window": self.policy.window_size}.get(self.policy.scorer.sees, interval)

    def arrive(self, tokens: Observation, queries_before: int) -> Facts:
        """Facts of entries that are new: nothing is heard yet.

        tokens: keys and values of the new tokens alone, one row. queries_before: of the text, before them.
        """
        tokens.check_finite()
        h, x = tokens.num_heads, tokens.num_tokens
        facts = tokens.keys.new_zeros(h, x, self.num_facts, dtype=torch.float32)
        if self.remembers and self.policy.scorer.sees == "prompt":
            # Attention that is summed up from the start of the text: what came before an entry paid it none.
            facts[..., 1] = queries_before * tokens.num_groups
        if self.policy.weighting is not None:
            measured = self.policy.weighting.measure(tokens)
            if measured is not None:
                facts[..., -1] = measured
        return facts

    def hear(self, heads: Observation, facts: Facts) -> Evidence:
        """What is known of the entries of some heads, once the observation's queries were heard too.

        heads: one row; its layout tells how its keys stand. facts: of the same slots.
        """
        policy = self.policy
        heard = observe(
            heads,
            policy.window_size,
            scorer=policy.scorer,
            aggregation=policy.aggregation,
            preference=None,
            with_means=policy.weighting is not None,
        )
        counts = heard.counts.expand_as(heard.reduced).float()
        heard = replace(heard, counts=counts)
        return heard.merge(self.recall(facts, heard.num_scored), policy.aggregation) if self.remembers else heard

    def recall(self, facts: Facts, num_scored: int | None = None) -> Evidence:
        """What is known of the first `num_scored` slots without hearing anything new; None: of all but the latest."""
        n = max(0, facts.shape[1] - self.policy.num_window) if num_scored is None else num_scored
        before = facts[:, :n]
        if not self.remembers:
            nothing = before.new_zeros(before.shape[:2])
            return Evidence(nothing, nothing, None if self.policy.weighting is None else nothing, None)
        sums = None if self.policy.weighting is None else before[..., 2]
        return Evidence(before[..., 0], before[..., 1], sums, None)

    def record(self, evidence: Evidence, facts: Facts) -> None:
        """Writes the evidence into the facts."""
        if not self.remembers:
            return
        scored = facts[:, : evidence.num_scored]
        scored[..., 0], scored[..., 1] = evidence.reduced, evidence.counts
        if evidence.sums is not None:
            scored[..., 2] = evidence.sums

    def rate(self, evidence: Evidence, facts: Facts, layout: Layout, share: Fraction) -> SlotScores:
        """Scores of all slots: (h, m), -inf where one is empty. share: of the text's tokens."""
        measured = facts[..., -1] if self.policy.weighting is not None else None
        return self._protected(self.policy.rate(evidence, measured, layout, share), layout)

    def stand(self, evidence: Evidence, facts: Facts, layout: Layout, share: Fraction) -> Standing:
        """Where all slots stand, after the last step; as `Policy.stand`."""
        measured = facts[..., -1] if self.policy.weighting is not None else None
        standing = self.policy.stand(evidence, measured, layout, share)
        ranks = standing.ranks
        if ranks is not None:
            ranks[:, max(0, layout.num_slots - self.num_protected) :] = float("inf")
        return replace(standing, scores=self._protected(standing.scores, layout))

    def _protected(self, scores: SlotScores, layout: Layout) -> SlotScores:
        latest = max(0, layout.num_slots - self.num_protected)
        scores[:, latest:] = float("inf")
        if layout.absent is not None:
            scores.masked_fill_(layout.absent, float("-inf"))
        return scores
