"""A smaller budget decided from what was kept beside the entries, against the same budget decided on the prompt."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import defensivekv as dkv
from defensivekv.policies import Policy
from defensivekv.policies.observation import Observation
from defensivekv.policies.policy import bytes_per_token
from defensivekv.policies.scored import ScoredLayer
from defensivekv.policies.standing import LayerStanding, Staged, scores_from
from tests.policies.cases import GENERIC, Shape, observation_for, policy_of, seeds, shapes

ROUNDED = ("chunkkv", "pyramidkv", "cake")
"""What a smaller budget gives a chunk or a layer may be more than a larger one gave it."""

NESTED = [name for name in GENERIC if name not in (*ROUNDED, "ada-criticalkv")]


def shares_of(policy: Policy, layers: list[Observation]) -> list[Fraction]:
    size = sum(bytes_per_token(layer) for layer in layers)
    return [policy.row_share(layers[0].num_tokens, size) for _ in range(layers[0].keys.shape[0])]


def keep(policy: Policy, scored: list[ScoredLayer], shares: list[Fraction]) -> list[Tensor]:
    if policy.spans_layers:
        return policy.keep(*policy.settle(scored, shares))
    return [policy.keep([layer], shares)[0] for layer in scored]


def shrunk(large: Policy, small: Policy, layers: list[Observation]) -> tuple[list[Tensor], list[Tensor]]:
    """What the large budget keeps, and what the small one keeps of that by the facts alone."""
    shares, count = shares_of(large, layers), len(layers)
    scored = [
        large.score(layer, index=index, num_layers=count, shares=shares, with_standing=True)
        for index, layer in enumerate(layers)
    ]
    held, fewer, rescored = keep(large, scored, shares), shares_of(small, layers), []
    for layer, mask in zip(scored, held, strict=True):
        facts, standing = layer.facts(None), layer.standing
        assert facts is not None
        assert standing is not None
        scores = torch.full_like(layer.scores, float("-inf"))
        for row, share in enumerate(fewer):
            first = small.num_first(layer.num_tokens[row], share)
            known = scores_from(facts[row], standing.tops[row], first)
            scores[row] = known.masked_fill(~mask[row], float("-inf"))
        rescored.append(ScoredLayer(scores, layer.num_tokens, standing.preferences, layer.index, count))
    return held, keep(small, rescored, fewer)


def check(name: str, layers: list[Observation], window: int, large: Fraction, small: Fraction) -> bool:
    """Whether the large budget's entries hold the small one's; then those are what is left of them."""
    policies = [policy_of(name, budget, window) for budget in (large, small)]
    held, left = shrunk(policies[0], policies[1], layers)
    expected = policies[1].select(layers)
    shares = shares_of(policies[1], layers)
    scores = [
        policies[1].score(layer, index=index, num_layers=len(layers), shares=shares).scores
        for index, layer in enumerate(layers)
    ]
    for row, _ in enumerate(shares):
        assert all(bool((one[row] <= other[row]).all()) for one, other in zip(left, held, strict=True))
        if name not in ROUNDED:
            assert sum(int(one[row].sum()) for one in left) == sum(int(one[row].sum()) for one in expected)
    is_held = all(bool((one <= other).all()) for one, other in zip(expected, held, strict=True))
    if is_held and name not in ROUNDED:
        # As sorted scores, since of equal ones at the threshold any may stay.
        groups = [range(len(layers))] if policies[1].spans_layers else [[index] for index in range(len(layers))]
        for group in groups:
            ours, theirs = (torch.cat([scores[i][kept[i]] for i in group]).sort().values for kept in (left, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return is_held


budgets = st.tuples(st.integers(30, 100), st.integers(25, 99)).filter(lambda pair: pair[0] > pair[1])


@pytest.mark.parametrize("name", [name for name in GENERIC if name != "ada-criticalkv"])
@settings(max_examples=25)
@given(
    shape=shapes(60, 24),
    seed=seeds(),
    rows=st.integers(1, 2),
    num_layers=st.integers(1, 3),
    percent=budgets,
)
def test_a_smaller_budget_is_decided_from_facts_as_on_the_prompt(
    name: str, shape: Shape, seed: int, rows: int, num_layers: int, percent: tuple[int, int]
) -> None:
    layers = [observation_for(name, shape, seed + index, rows) for index in range(num_layers)]
    large, small = (Fraction(one, 100) for one in percent)
    try:
        check(name, layers, shape.w, large, small)
    except dkv.BudgetError:
        return


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_large_budget_kept_holds_all_that_a_much_smaller_one_keeps(name: str, seed: int) -> None:
    layers = [observation_for(name, Shape(3, 2, 4, 200, 8, 8), 10 * seed + index) for index in range(3)]
    assert check(name, layers, 4, Fraction(1, 2), Fraction(1, 5))
    assert check(name, layers, 4, Fraction(1), Fraction(1, 5)), "kept whole, and scored all the same"


def test_facts_are_two_numbers_where_some_entries_come_first_and_one_elsewhere() -> None:
    layer = observation_for("defensivekv", Shape(2, 2, 4, 50, 8, 8), 0)
    for name, count in [("defensivekv", 2), ("h2o", 2), ("snapkv", 1), ("keydiff", 1), ("expected-attention", 1)]:
        policy = policy_of(name, 0.5)
        shown = observation_for(name, Shape(2, 2, 4, 50, 8, 8), 0)
        facts = policy.score(shown, with_standing=True).facts(None)
        assert facts is not None
        assert facts.shape == (1, 2, 50, count), name
        assert facts.dtype == torch.float32
    assert policy_of("defensivekv", 0.5).score(layer).facts(None) is None


def test_entries_come_first_in_their_order_as_far_as_there_is_room() -> None:
    staged = Staged.of(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[2, 0, 1]]), 9.0)
    assert staged.with_first(0).tolist() == [[1, 2, 3, 4]]
    assert staged.with_first(1).tolist() == [[1, 2, 9, 4]]
    assert staged.with_first(2).tolist() == [[9, 2, 9, 4]]
    assert staged.with_first(7).tolist() == [[9, 9, 9, 4]]
    may = torch.tensor([[True, False, True]])
    assert Staged.of(staged.scores, torch.tensor([[2, 0, 1]]), 9.0, may).with_first(7).tolist() == [[1, 9, 9, 4]]


def test_rows_of_what_is_kept_of_a_layer_are_chosen_and_repeated() -> None:
    standing = LayerStanding((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert standing.select_rows([2, 0, 0]) == LayerStanding((3.0, 1.0, 1.0), (6.0, 4.0, 4.0))


def test_a_weighting_that_looks_at_the_budget_otherwise_is_refused_by_name() -> None:
    with pytest.raises(dkv.InvalidInputError, match=r"'ada-criticalkv' cannot evict further .* compress"):
        dkv.policy("ada-criticalkv", 0.5).check_shrinks()
    for name in GENERIC:
        if name != "ada-criticalkv":
            dkv.policy(name, 0.5).check_shrinks()
