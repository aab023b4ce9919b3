"""Streaming through the layers decides what seeing all of them at once decides."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import Budget, Policy
from defensivekv.integrations.competition import Competition, compacted_scores
from defensivekv.policies.aggregation import Max, MeanAndVariance
from defensivekv.policies.allocation import AcrossLayers, Allocation, ByPreference, PerLayer
from defensivekv.policies.preference import DispersionAndShift
from defensivekv.policies.scored import ScoredLayer
from defensivekv.policies.scoring import WindowAttention
from tests.policies.cases import seeds

WINDOW = 2


def _policy(allocation: Allocation) -> Policy:
    aggregation = MeanAndVariance() if isinstance(allocation, ByPreference) else Max()
    parts = (WindowAttention(), allocation, aggregation)
    return Policy("streamed", Budget.parse(0.5), *parts, window_size=WINDOW)


@dataclass(frozen=True)
class _Case:
    """A batch of prompts: rows of different lengths behind pads, some layers scoring far above others."""

    heads: int
    tokens: list[int]
    scales: list[float]
    preferences: list[tuple[float, ...]]
    seed: int

    def layers(self) -> list[ScoredLayer]:
        """No two scores alike but for the window's."""
        (h, b), t, count = (self.heads, len(self.tokens)), max(self.tokens), len(self.scales)
        generator = torch.Generator().manual_seed(self.seed)
        ranks = torch.randperm(count * b * h * t, generator=generator).float().view(count, b, h, t)
        scores = (ranks + 1) * torch.tensor(self.scales)[:, None, None, None]
        # Where scales bring two scores together, which of them stays is open: every score is made one of its kind.
        order = scores.flatten().argsort(stable=True).argsort(stable=True).float().view_as(scores)
        order[..., t - WINDOW :] = float("inf")
        for row, length in enumerate(self.tokens):
            order[:, row, :, : t - length] = float("-inf")
        return [
            ScoredLayer(order[index], tuple(self.tokens), self.preferences[index], index, count)
            for index in range(count)
        ]


@st.composite
def cases(draw: st.DrawFn) -> _Case:
    count, b = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    scales = [draw(st.sampled_from([0.01, 1.0, 50.0])) for _ in range(count)]
    preferences = [tuple(draw(st.floats(0, 10)) for _ in range(b)) for _ in range(count)]
    tokens = [draw(st.integers(WINDOW + 1, 24)) for _ in range(b)]
    return _Case(draw(st.integers(1, 4)), tokens, scales, preferences, draw(seeds()))


def _streamed(policy: Policy, layers: list[ScoredLayer], shares: list[Fraction]) -> tuple[list[set[float]], list[int]]:
    """For each layer, the scores of what stays, but for the window's; and the entries held when each arrived."""
    competition = Competition(policy, tuple(range(len(layers))))
    held: dict[int, Tensor] = {}
    peaks = []
    for index, layer in enumerate(layers):
        held[index] = layer.scores
        peaks.append(sum(_count(scores) for scores in held.values()))
        for number, kept in competition.add(index, layer, shares).items():
            held[number] = compacted_scores(held[number], kept)
    assert not competition.is_underway
    return [_entries(held[index]) for index in range(len(layers))], peaks


def _count(scores: Tensor) -> int:
    return int((scores > float("-inf")).sum())


def _entries(scores: Tensor) -> set[float]:
    return set(scores[torch.isfinite(scores)].tolist())


def _at_once(policy: Policy, layers: list[ScoredLayer], shares: list[Fraction]) -> list[set[float]]:
    kept = policy.keep(layers, shares)
    return [_entries(layer.scores[mask]) for layer, mask in zip(layers, kept, strict=True)]


def _shares(layers: list[ScoredLayer], share: Fraction) -> list[Fraction]:
    return [max(share, Fraction(WINDOW, tokens)) for tokens in layers[0].num_tokens]


SHARES = st.integers(1, 100).map(lambda percent: Fraction(percent, 100))


@settings(max_examples=150)
@given(case=cases(), share=SHARES)
def test_across_layers_what_streams_is_what_two_passes_keep_and_the_peak_is_the_budget_and_one_layer(
    case: _Case, share: Fraction
) -> None:
    layers = case.layers()
    policy, shares = _policy(AcrossLayers()), _shares(layers, share)
    kept, peaks = _streamed(policy, layers, shares)
    assert kept == _at_once(policy, layers, shares)
    heads = layers[0].scores.shape[1] * len(layers)
    budget = sum(int(tokens * part * heads) for tokens, part in zip(layers[0].num_tokens, shares, strict=True))
    assert max(peaks) <= budget + _count(layers[0].scores)


@settings(max_examples=150)
@given(case=cases(), share=SHARES)
def test_by_preference_too_and_the_peak_is_an_entry_for_each_head_more(case: _Case, share: Fraction) -> None:
    layers = case.layers()
    policy, shares = _policy(ByPreference(DispersionAndShift())), _shares(layers, share)
    kept, peaks = _streamed(policy, layers, shares)
    assert kept == _at_once(policy, layers, shares)
    b, h, _ = layers[0].scores.shape
    heads = h * len(layers)
    budget = sum(int(tokens * part * heads) for tokens, part in zip(layers[0].num_tokens, shares, strict=True))
    assert max(peaks) <= budget + b * heads + _count(layers[0].scores)


@given(case=cases(), share=SHARES)
def test_without_streaming_all_goes_after_the_last_layer(case: _Case, share: Fraction) -> None:
    layers = case.layers()
    policy, shares = _policy(AcrossLayers()), _shares(layers, share)
    competition = Competition(policy, tuple(range(len(layers))))
    for index, layer in enumerate(layers[:-1]):
        assert competition.add(index, layer, shares, streams=False) == {}
    kept = competition.add(len(layers) - 1, layers[-1], shares, streams=False)
    assert [_entries(layer.scores[kept[index]]) for index, layer in enumerate(layers)] == _at_once(
        policy, layers, shares
    )


@given(case=cases(), share=SHARES)
def test_where_layers_do_not_compete_each_is_decided_at_once(case: _Case, share: Fraction) -> None:
    layers = case.layers()
    policy, shares = _policy(PerLayer()), _shares(layers, share)
    competition = Competition(policy, tuple(range(len(layers))))
    for index, layer in enumerate(layers):
        assert list(competition.add(index, layer, shares)) == [index]
        assert not competition.is_underway
