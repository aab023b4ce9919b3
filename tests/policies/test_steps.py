"""One step at the level of a layer: heads that hold different entries are scored as each would be alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv import Observation
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.layout import ABSENT, Layout
from defensivekv.policies.steps import Stepper, check_evicts_in_steps
from tests.policies.cases import Shape, normal, observation, seeds, shapes

METHODS = ["defensivekv", "layer-defensivekv", "snapkv", "criticalkv", "adakv", "h2o"]


def _stepper(name: str, window: int) -> Stepper:
    return Stepper(replace(dkv.policy(name, 0.5), window_size=window))


def _ragged(layer: Observation, held: torch.Tensor, seed: int) -> Observation:
    """The layer's row as heads that hold `held` (h, t) of its tokens have it: to the right, junk in empty slots."""
    h, t = held.shape
    longest = int(held.sum(-1).max())
    keys = 9 * normal(seed, 1, h, longest, layer.keys.shape[3])
    values = 9 * normal(seed + 1, 1, h, longest, layer.values.shape[3])
    positions = torch.full((h, longest), ABSENT)
    for head in range(h):
        places = held[head].nonzero().flatten()
        keys[0, head, longest - len(places) :] = layer.keys[0, head, places]
        values[0, head, longest - len(places) :] = layer.values[0, head, places]
        positions[head, longest - len(places) :] = places
    return replace(layer, keys=keys, values=values, layout=Layout(longest, t, positions))


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), seed=seeds(), name=st.sampled_from(METHODS), share=st.sampled_from([0.2, 0.6, 1.0]))
def test_a_head_among_longer_ones_hears_what_it_hears_alone(shape: Shape, seed: int, name: str, share: float) -> None:
    layer, stepper = observation(shape, seed), _stepper(name, shape.w)
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(shape.h, shape.t, generator=generator) < share
    held[:, -shape.w :] = True
    together = _ragged(layer, held, seed)
    slots = together.num_tokens
    facts = torch.rand(shape.h, slots, stepper.num_facts, generator=generator)
    evidence = stepper.hear(together, facts)
    assert together.layout is not None
    alone = []
    for head in range(shape.h):
        count = int(held[head].sum())
        one = _ragged(layer.heads(head, head + 1), held[head : head + 1], seed)
        heard = stepper.hear(one, facts[head : head + 1, slots - count :])
        n = evidence.num_scored - (slots - count)
        torch.testing.assert_close(heard.reduced[0], evidence.reduced[head, evidence.num_scored - n :])
        if heard.sums is not None and evidence.sums is not None:
            torch.testing.assert_close(heard.sums[0], evidence.sums[head, evidence.num_scored - n :])
        assert bool((evidence.reduced[head, : evidence.num_scored - n] >= 0).all())
        alone.append(heard)
    if all(int(count) == slots for count in held.sum(-1)):
        torch.testing.assert_close(Evidence.of_heads(alone).reduced, evidence.reduced)


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=seeds(), name=st.sampled_from(METHODS))
def test_one_step_over_a_whole_prompt_scores_what_one_reading_does(shape: Shape, seed: int, name: str) -> None:
    stepper = _stepper(name, shape.w)
    layer = observation(shape, seed)
    if name == "h2o":
        layer = replace(layer, queries=normal(seed, 1, shape.h * shape.g, shape.t, shape.d))
    share = stepper.policy.budget.amount
    facts = stepper.arrive(layer, 0)
    evidence = stepper.hear(layer, facts)
    stepper.record(evidence, facts)
    scores = stepper.rate(evidence, facts, layer.row_layout, share)
    expected = stepper.policy.score(layer).scores[0]
    expected[:, -shape.w :] = float("inf")  # in steps the latest tokens stay, whatever the method says
    whole = bool(torch.isinf(expected).all())  # a prompt that is kept whole is not scored at all
    assert whole or torch.equal(scores, expected)


def test_what_was_heard_before_counts_where_the_method_remembers() -> None:
    shape = Shape(h=1, g=1, w=2, t=12, d=3, v=3)
    for name, remembers in (("defensivekv", True), ("snapkv", True), ("tova", False)):
        stepper = _stepper(name, 2)
        assert stepper.remembers == remembers
        layer = observation(shape, 0)
        facts = stepper.arrive(layer, 0)
        first = stepper.hear(layer, facts)
        stepper.record(first, facts)
        later = replace(layer, queries=3 * normal(5, *layer.queries.shape))
        second, fresh = stepper.hear(later, facts), stepper.hear(later, torch.zeros_like(facts))
        changed = not torch.equal(second.reduced, fresh.reduced)
        assert changed == remembers
        if name == "defensivekv":
            assert torch.equal(second.reduced, torch.maximum(first.reduced, fresh.reduced))


def test_an_empty_slot_never_scores() -> None:
    stepper, shape = _stepper("layer-defensivekv", 2), Shape(h=2, g=1, w=2, t=12, d=3, v=3)
    held = torch.ones(2, 12, dtype=torch.bool)
    held[1, :8] = False
    layer = _ragged(observation(shape, 0), held, 0)
    facts = torch.zeros(2, 12, stepper.num_facts)
    assert layer.layout is not None
    scores = stepper.rate(stepper.hear(layer, facts), facts, layer.layout, stepper.policy.budget.amount)
    assert layer.layout.absent is not None
    assert torch.equal(scores == float("-inf"), layer.layout.absent)
    assert bool((scores[:, -2:] == float("inf")).all())


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (dkv.policy("kvzip", 0.5), "wants the whole prompt"),
        (dkv.policy("expected-attention", 0.5), "wants the whole prompt"),
        (dkv.policy("cake", 0.5), "needs all queries at once"),
        (dkv.policy("snapkv", 0.5, protect_window=False), "parity mode"),
        (dkv.policy("snapkv", "auto:0.9"), "is found once the whole prompt was seen"),
    ],
)
def test_policies_that_decide_once_say_why(policy: dkv.Policy, reason: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=f"cannot evict in steps.*{reason}.*such as 'layer-defensivekv'"):
        check_evicts_in_steps(policy)


def test_all_others_evict_in_steps() -> None:
    for name in dkv.policies():
        if name not in ("kvzip", "expected-attention", "cake", "duo-attention", "full"):
            check_evicts_in_steps(dkv.policy(name, 0.5))
