from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv.integrations.vllm.plan import EvictionPlan

POLICIES = ("snapkv", "adakv", "pyramidkv", "chunkkv", "defensivekv", "layer-defensivekv", "cake", "streaming-llm")


def plan_of(policy: dkv.Policy, *, layers: int = 3, heads: int = 4, groups: int = 1) -> EvictionPlan:
    return EvictionPlan(policy, layers, heads, groups, whole_up_to=100)


@given(
    name=st.sampled_from(POLICIES),
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(40, 400)),
    num_tokens=st.integers(1, 600),
    heads=st.sampled_from([1, 2, 3]),
    layers=st.sampled_from([1, 2, 5]),
)
def test_what_a_policy_keeps_fits_its_slots_and_leaves_less_than_one_empty(
    name: str, budget: float | int, num_tokens: int, heads: int, layers: int
) -> None:
    policy = dkv.policy(name, budget, window_size=None if name == "streaming-llm" else 8)
    plan = plan_of(policy, layers=layers, heads=heads)
    share, slots = plan.share(num_tokens), plan.slots(num_tokens)
    assert 0 < slots <= num_tokens
    torch.manual_seed(num_tokens)
    observations = [
        dkv.Observation(
            queries=torch.randn(1, heads, min(8, num_tokens), 16),
            keys=torch.randn(1, heads, num_tokens, 16),
            values=torch.randn(1, heads, num_tokens, 16),
            output_projection=torch.randn(8, heads * 16),
        )
        for _ in range(layers)
    ]
    scored = [
        policy.score(observation, index=index, num_layers=layers, shares=[share])
        for index, observation in enumerate(observations)
    ]
    together = [scored] if policy.spans_layers else [[layer] for layer in scored]
    kept = [int(mask.sum()) for layers_ in together for mask in policy.keep(layers_, [share])]
    if plan.packs_layers:
        assert sum(kept) <= slots * heads * layers
        assert sum(kept) > (slots - 2) * heads * layers
    else:
        assert max(kept) <= slots * heads
        assert min(kept) > (slots - 2) * heads


def test_a_budget_below_the_window_keeps_the_window_where_the_policy_alone_refuses() -> None:
    policy = dkv.policy("defensivekv", 0.05)
    with pytest.raises(dkv.BudgetError):
        policy.row_share(400, 1)
    plan = plan_of(policy)
    assert plan.share(400) == Fraction(32, 400)
    assert plan.slots(400) == 32
    assert plan.slots(1000) == 50
    assert plan.slots(100) == 100


def test_groups_of_heads_round_down_each_for_itself() -> None:
    policy = dkv.policy("defensivekv", 0.3, window_size=8)
    assert plan_of(policy, groups=1).slots(101) == ceil(int(101 * 0.3 * 4) / 4)
    assert plan_of(policy, groups=2).slots(101) == ceil(2 * int(101 * 0.3 * 2) / 4)
    assert plan_of(policy, groups=4).slots(101) == 30


@pytest.mark.parametrize(("name", "packs"), [("defensivekv", False), ("snapkv", False), ("layer-defensivekv", True)])
def test_layers_share_pages_where_they_keep_different_amounts(name: str, packs: bool) -> None:
    assert plan_of(dkv.policy(name, 0.3)).packs_layers is packs
    assert plan_of(dkv.policy("pyramidkv", 0.3)).packs_layers
    assert plan_of(dkv.policy("layer-defensivekv", 0.3)).reads_whole(100)
    assert not plan_of(dkv.policy("layer-defensivekv", 0.3)).reads_whole(101)
