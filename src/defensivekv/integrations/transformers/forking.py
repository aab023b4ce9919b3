"""Caches that go on by themselves from where another one is."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from defensivekv.budget import Budget
from defensivekv.integrations.transformers.bound import bound_of
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.stepping import Stepping

if TYPE_CHECKING:
    from defensivekv.integrations.transformers.cache import EvictingCache


def forked(cache: "EvictingCache") -> "EvictingCache":
    """The same, to go on by itself. The prefix is shared, what came after it is copied."""
    twin = copy.copy(cache)
    twin.decision = cache.decision.fork()
    twin.stepping = None if cache.stepping is None else cache.stepping.fork()
    twin.outstanding = None
    twin.layers = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, EvictedLayer):
            own = EvictedLayer(twin, index)
            own.store = layer.store.fork()
            own.awaits_prompt, own.is_initialized = layer.awaits_prompt, layer.is_initialized
            own.log = None if layer.log is None else layer.log.fork()
            own.refresh_reads()
            twin.layers.append(own)
        else:
            twin.layers.append(copy.deepcopy(layer))
    return twin


def put_under(cache: "EvictingCache", max_entries: int | None, interval: int | None) -> None:
    """A bound from here on, beside those that there are. Raises BudgetError where there is no room for what is held."""
    layers = [cache.layers[index] for index in cache.evicted_layers]
    texts, before, first, bound = cache.texts, cache.stepping, layers[0].store, cache.bound
    is_read = bool(first.seen) and (before is None or not before.is_reading(first.seen))
    # What an adaptive budget came to is known, once the prompt was read.
    is_known = is_read and cache.policy.budget.is_adaptive
    policy = replace(cache.policy, budget=Budget.parse(1.0)) if is_known else cache.policy
    under = bound_of(
        policy,
        max_entries if max_entries is not None or bound is None else bound.max_entries,
        None if bound is None else bound.max_batch_bytes,
        interval if interval is not None or bound is None else bound.given_interval,
    )
    assert under is not None
    cache.bound, cache.keeps_scores = under, False
    cache.stepping = stepping = Stepping(under.stepper.policy, cache.evicted_layers, under)
    stepping.go_on_from(before, texts, first.seen - first.tail_length if bound is None and is_read else 0)
    for layer in layers:
        if bound is None:
            # What was known served no steps.
            layer.store.forget_facts()
        if first.seen and layer.log is None:
            layer.log = stepping.new_log()
    under.check_stored(cache.lengths.tolist(), first.tail_length, is_pinned=bool(stepping.pinned))
