"""What a smaller budget keeps of a prompt that was evicted from already, by the scores that were kept."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from defensivekv.budget import Budget
from defensivekv.errors import BudgetError, CacheError
from defensivekv.integrations.transformers.decision import PromptDecision
from defensivekv.integrations.transformers.forking import forked
from defensivekv.policies import Policy
from defensivekv.policies.scored import ScoredLayer
from defensivekv.policies.standing import scores_from
from defensivekv.types import Kept

if TYPE_CHECKING:
    from defensivekv.integrations.transformers.cache import EvictingCache


def shrunk(cache: "EvictingCache", budget: float | int | str | Budget) -> "EvictingCache":
    """A cache that keeps less of the prompt; see `EvictingCache.shrink`."""
    policy, shares, kept = _smaller(cache, budget)
    twin = forked(cache)
    twin.policy, twin.stepping = policy, None
    twin.decision = PromptDecision(policy, cache.evicted_layers, keeps_scores=True)
    twin.decision.texts = replace(cache.texts, shares=shares)
    twin.decision.standings, twin.decision.bytes_per_token = dict(cache.standings), cache.bytes_per_token
    for index, stays in zip(cache.evicted_layers, kept, strict=True):
        twin.layers[index].narrow(stays)
    return twin


def _smaller(
    cache: "EvictingCache", budget: float | int | str | Budget
) -> tuple[Policy, tuple[Fraction, ...], list[Kept]]:
    """The cache's policy with that budget, the share that each row then keeps, and what stays of each evicted layer, in
    the slots of its prefix.

    Raises CacheError where no scores were kept, and BudgetError where the budget is in bytes, adaptive, below what
    always stays, or more than is held.
    """
    policy, texts = replace(cache.policy, budget=_parse(budget)), cache.texts
    _check(cache)
    shares = tuple(policy.row_share(tokens, cache.bytes_per_token) for tokens in texts.tokens)
    for share, held in zip(shares, texts.shares, strict=True):
        if share > held:
            raise BudgetError(
                f"the cache holds {float(held):.2%} of its prompt and budget {policy.budget} is {float(share):.2%}: "
                "what was evicted is gone; give a smaller budget, or compress the document again"
            )
    layers = [_scored(cache, place, policy, shares) for place in range(len(cache.evicted_layers))]
    if policy.spans_layers:
        return policy, shares, policy.keep(layers, shares)
    return policy, shares, [policy.keep([layer], shares)[0] for layer in layers]


def _parse(budget: float | int | str | Budget) -> Budget:
    parsed = Budget.parse(budget)
    if parsed.is_adaptive or parsed.kind == "bytes":
        raise BudgetError(f"budget {parsed} of a prompt that is gone is not known: give a share or a count of entries")
    return parsed


def _check(cache: "EvictingCache") -> None:
    if cache.is_bounded:
        raise CacheError("a bounded cache evicts as it goes: fork(max_entries=...) puts it under a smaller bound")
    if not cache.lengths.numel():
        raise CacheError("nothing has been evicted yet: run the prompt through the model first")
    if not cache.keeps_scores or len(cache.standings) < len(cache.evicted_layers):
        raise CacheError(
            "no scores were kept by which less could be kept: make the cache with keep_scores=True before its prompt"
        )


def _scored(cache: "EvictingCache", place: int, policy: Policy, shares: Sequence[Fraction]) -> ScoredLayer:
    """A layer's entries in their slots, scored for these shares. place: among the evicted layers."""
    number = cache.evicted_layers[place]
    view, standing, tokens = cache.layers[number].store.view, cache.standings[number], cache.texts.tokens
    facts, slots = view.prefix.facts, view.prefix.slots(view.rows)
    scores = facts.new_full(slots.shape, float("-inf"))
    for row, (row_slots, share) in enumerate(zip(slots, shares, strict=True)):
        count = policy.num_first(tokens[row], share)
        row_scores = scores_from(facts[row_slots.clamp_min(0)], standing.tops[row], count)
        scores[row] = row_scores.masked_fill(row_slots < 0, float("-inf"))
    return ScoredLayer(scores, tokens, standing.preferences, place, len(cache.evicted_layers))
