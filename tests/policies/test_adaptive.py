"""Budgets that a prompt decides by itself: as many entries as hold a share of the worst-case importance."""

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv import Budget, Observation
from defensivekv.policies.scored import entries_of_mass
from tests.policies import oracle
from tests.policies.cases import Shape, count_kept, observation, observation_for, policy_of, seeds

SHAPE = Shape(h=2, g=2, w=4, t=90, d=6, v=5)


def _needed(layer: Observation, window: int, mass: float) -> int:
    """In plain loops: of each head, the fewest entries that hold `mass` of its worst cases; and the window."""
    importance = oracle.window_attention(layer.queries[0], layer.keys[0], layer.queries.shape[-1] ** -0.5)
    needed = 0
    for head in importance:
        smoothed = []
        for row in (row for group in head for row in group):
            smooth = oracle.mean_filter(row, 5)
            smoothed.append([value * sum(row) / sum(smooth) for value in smooth])
        worst = sorted((max(column) for column in zip(*smoothed, strict=True)), reverse=True)
        held, count = 0.0, 0
        while held < mass * sum(worst):
            held, count = held + worst[count], count + 1
        needed += count + window
    return needed


@settings(max_examples=30, deadline=None)
@given(seed=seeds(), mass=st.sampled_from([0.3, 0.5, 0.8, 0.95]), sharpness=st.sampled_from([0.3, 1.0, 4.0]))
@pytest.mark.parametrize("name", ["defensivekv", "layer-defensivekv"])
def test_the_budget_is_the_smallest_that_holds_the_mass_of_every_head(
    name: str, seed: int, mass: float, sharpness: float
) -> None:
    layers = [observation(SHAPE, seed + number) for number in range(3)]
    layers = [replace(layer, queries=layer.queries * sharpness) for layer in layers]
    policy = dkv.policy(name, f"auto:{mass}", window_size=4)
    needed = sum(_needed(layer, 4, mass) for layer in layers)
    kept = count_kept(policy.select(layers))
    # What each layer rounds down; and an entry on the edge of the mass, for each head.
    assert needed - 3 - 6 <= kept <= needed + 6


@settings(max_examples=30, deadline=None)
@given(seed=seeds(), mass=st.sampled_from([0.3, 0.6, 0.9]))
@pytest.mark.parametrize("name", ["defensivekv", "layer-defensivekv", "ada-criticalkv", "cake", "h2o", "pyramidkv"])
def test_what_stays_is_what_a_fixed_budget_of_that_size_keeps(name: str, seed: int, mass: float) -> None:
    layers = [observation_for(name, SHAPE, seed + number) for number in range(3)]
    policy = policy_of(name, f"auto:{mass}")
    scored = [policy.score(layer, index=index, num_layers=3) for index, layer in enumerate(layers)]
    _, (share,) = policy.settle(scored, [Fraction(1)])
    fixed = replace(policy, budget=Budget("share", share))
    pairs = zip(policy.select(layers), fixed.select(layers), strict=True)
    assert share == 1 or all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_prompt_with_few_important_entries_keeps_less_than_one_with_many() -> None:
    policy = dkv.policy("layer-defensivekv", "auto:0.8", window_size=4)
    flat, sharp = observation(SHAPE, 0), observation(SHAPE, 0)
    sharp = replace(sharp, queries=sharp.queries * 5)
    assert count_kept(policy.select([sharp])) < 0.75 * count_kept(policy.select([flat]))


@pytest.mark.parametrize(("budget", "share"), [("auto:0.9,max=0.3", 0.3), ("auto:0.01,min=0.4", 0.4), ("auto:1", 1.0)])
def test_it_stays_between_its_limits(budget: str, share: float) -> None:
    for name in ("defensivekv", "layer-defensivekv", "snapkv", "adakv", "tova"):
        window = {} if name == "tova" else {"window_size": 4}
        kept = count_kept(dkv.policy(name, budget, **window).select([observation(SHAPE, 0)]))  # type: ignore[arg-type]
        # One query's attention may lie on so few entries that the maximum is not reached.
        assert kept <= share * 180
        assert kept >= share * 180 - 2 or name == "tova"


def test_the_window_stays_however_little_mass_is_asked_for() -> None:
    kept = dkv.policy("snapkv", "auto:0.0001", window_size=4).select([observation(SHAPE, 0)])[0]
    assert bool(kept[:, :, -4:].all())


def test_rows_choose_for_themselves() -> None:
    policy = dkv.policy("layer-defensivekv", "auto:0.8", window_size=4)
    rows = [observation(SHAPE, 0), replace(observation(SHAPE, 1), queries=5 * observation(SHAPE, 1).queries)]
    both = replace(
        rows[0],
        queries=torch.cat([row.queries for row in rows]),
        keys=torch.cat([row.keys for row in rows]),
        values=torch.cat([row.values for row in rows]),
    )
    rows[1] = replace(rows[1], output_projection=rows[0].output_projection)
    (kept,) = policy.select([both])
    for number, row in enumerate(rows):
        assert torch.equal(kept[number], policy.select([row])[0][0])


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 100).map(lambda percent: Fraction(percent, 100)),
)
def test_entries_of_mass_are_the_fewest_that_hold_it(heads: list[list[int]], mass: Fraction) -> None:
    fewest = 0
    for head in heads:
        ranked = sorted(head, reverse=True)
        fewest += next(count for count in range(1, 7) if sum(ranked[:count]) >= mass * sum(head))
    assert entries_of_mass(torch.tensor(heads).float(), mass) == fewest


@pytest.mark.parametrize("name", ["knorm", "streaming-llm", "lagkv", "random"])
def test_scores_that_are_no_mass_cannot_be_shared_out(name: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=r"asks for a share of the importance's mass"):
        dkv.policy(name, "auto:0.9")


def test_the_share_asked_for_is_what_is_read_of_a_prompt_before_it_is_known() -> None:
    policy = dkv.policy("layer-defensivekv", "auto:0.9,max=0.25")
    assert policy.row_share(1000, 1) == Fraction(1, 4)
    assert floor(policy.row_share(1000, 1) * 1000) == 250
