"""CAKE in plain loops: indicator, preference, and how layers share."""

import math
from fractions import Fraction
from itertools import pairwise
from statistics import variance

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv.policies.aggregation import MeanAndVariance
from defensivekv.policies.allocation import ByPreference, Contender
from defensivekv.policies.preference import DispersionAndShift
from tests.policies import oracle
from tests.policies.cases import Shape, aggregate, observation, seeds, shapes


def _importance(layer: dkv.Observation) -> list[list[oracle.Matrix]]:
    return oracle.window_attention(layer.queries[0], layer.keys[0], layer.softmax_scaling)


def _spread(values: list[float]) -> float:
    return variance(values) if len(values) > 1 else 0.0


@settings(max_examples=30)
@given(shape=shapes(max_tokens=20), seed=seeds())
def test_the_indicator_equals_the_loops(shape: Shape, seed: int) -> None:
    importance = _importance(observation(shape, seed))
    expected = []
    for head in importance:
        rows = [
            [sum(column) / len(column) + 200 * _spread(list(column)) for column in zip(*group, strict=True)]
            for group in head
        ]
        expected.append(oracle.mean_filter([sum(column) / len(column) for column in zip(*rows, strict=True)], 5))
    ours = aggregate(MeanAndVariance(), torch.tensor(importance))
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-3, atol=1e-6)


@settings(max_examples=30)
@given(shape=shapes(max_tokens=20), seed=seeds())
def test_the_preference_equals_the_loops(shape: Shape, seed: int) -> None:
    importance = _importance(observation(shape, seed))
    entropy = -sum(a * math.log(a + 1e-10) for head in importance for group in head for row in group for a in row)
    shift = sum(_spread(list(column)) for head in importance for group in head for column in zip(*group, strict=True))
    measure = DispersionAndShift()
    apart = [measure.measure(torch.tensor([head])) for head in importance]
    expected = max(0.0, entropy) ** (1 / 1.6) * shift ** (1 / 0.6)
    assert math.isclose(measure.finish(torch.stack(apart).sum(0)), expected, rel_tol=1e-3, abs_tol=1e-9)


@given(
    preferences=st.lists(st.floats(0, 10), min_size=1, max_size=5),
    t=st.integers(8, 40),
    window=st.integers(0, 6),
    percent=st.integers(1, 100),
)
def test_layers_share_in_proportion_within_window_and_prompt(
    preferences: list[float], t: int, window: int, percent: int
) -> None:
    share = max(Fraction(percent, 100), Fraction(window, t))
    layers = [
        Contender(torch.arange(float(t)).expand(2, t), index, len(preferences), preference, window)
        for index, preference in enumerate(preferences)
    ]
    counts = [int(kept.sum(-1)[0]) for kept in ByPreference(DispersionAndShift())(layers, share)]
    assert sum(counts) == math.floor(t * share * len(layers))
    assert all(window <= count <= t for count in counts)
    order = sorted(range(len(layers)), key=lambda layer: preferences[layer])
    assert all(counts[a] <= counts[b] + 1 for a, b in pairwise(order))
    open_layers = [layer for layer, count in enumerate(counts) if window < count < t]
    for a in open_layers:
        for b in open_layers:
            if preferences[a] > 0 and preferences[b] > 0 and all(count < t for count in counts):
                wanted = (counts[b] - window) * preferences[a] / preferences[b]
                assert abs(counts[a] - window - wanted) <= 1 + preferences[a] / preferences[b]


def test_a_layer_whose_attention_moves_gets_more() -> None:
    still, moving = observation(Shape(2, 2, 8, 120, 6, 5), 0), observation(Shape(2, 2, 8, 120, 6, 5), 1)
    still.queries[:] = still.queries[:, :, :1]
    kept = dkv.policy("cake", 0.3, window_size=8).select([still, moving])
    assert int(kept[0].sum()) < int(kept[1].sum())
    assert 144 - 2 <= int(kept[0].sum() + kept[1].sum()) <= 144
