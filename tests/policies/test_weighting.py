from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import InvalidInputError, Observation
from defensivekv.policies import weighting
from defensivekv.policies.weighting import TwoStageCritical, TwoStageValueNorm, Weighting, value_norms
from tests.policies import oracle
from tests.policies.cases import HIDDEN, Shape, observation, seeds, shapes


def _weighted(weighting: Weighting, scores: Tensor, means: Tensor, row: Observation, share: Fraction) -> Tensor:
    return weighting(scores, means, weighting.measure(row), row.row_layout, share)


SHARES = st.integers(1, 99).map(lambda percent: Fraction(percent, 100))


@settings(max_examples=50)
@given(shape=shapes(max_tokens=20), seed=seeds())
def test_value_norms_equal_the_loops(shape: Shape, seed: int) -> None:
    row = observation(shape, seed)
    assert row.output_projection is not None
    expected = torch.tensor(oracle.value_norms(row.values[0], row.output_projection))
    torch.testing.assert_close(value_norms(row), expected, rtol=1e-4, atol=1e-6)


def test_value_norms_are_the_same_in_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    row = observation(Shape(2, 3, 2, 23, 4, 5), 0)
    whole = value_norms(row)
    monkeypatch.setattr(weighting, "_chunk_elements", lambda _: 5 * 3 * HIDDEN)
    torch.testing.assert_close(value_norms(row), whole, rtol=1e-6, atol=0)


def test_a_transposed_projection_is_read_like_any_other() -> None:
    row = observation(Shape(2, 3, 2, 23, 4, 5), 0)
    assert row.output_projection is not None
    transposed = replace(row, output_projection=row.output_projection.T.contiguous().T)
    torch.testing.assert_close(value_norms(transposed), value_norms(row))


def test_value_norms_without_a_projection_are_refused_and_say_what_to_do() -> None:
    with pytest.raises(InvalidInputError, match=r"output_projection=.*snapkv"):
        value_norms(replace(observation(Shape(1, 1, 1, 5, 2, 2), 0), output_projection=None))


@settings(max_examples=60)
@given(shape=shapes(), seed=seeds(), share=SHARES, peak=st.sampled_from([0.3, 2.0, 6.0]))
def test_two_stage_value_norm_equals_the_loops(shape: Shape, seed: int, share: Fraction, peak: float) -> None:
    row = observation(shape, seed)
    assert row.output_projection is not None
    generator = torch.Generator().manual_seed(seed)
    size = (shape.h, shape.t - shape.w)
    scores = torch.rand(size, generator=generator)
    means = 0.9 * (torch.randn(size, generator=generator) * peak).softmax(-1)
    norms = oracle.value_norms(row.values[0], row.output_projection)
    expected, margin = oracle.two_stage_value_norm(scores.tolist(), means.tolist(), norms, share)
    assume(margin > 1e-5)  # nearer than that, rounding decides
    weighted = _weighted(TwoStageValueNorm(), scores, means, row, share)
    torch.testing.assert_close(weighted, torch.tensor(expected), rtol=1e-4, atol=1e-7)


@settings(max_examples=60)
@given(shape=shapes(), seed=seeds(), share=SHARES)
def test_two_stage_critical_equals_the_loops(shape: Shape, seed: int, share: Fraction) -> None:
    row = observation(shape, seed)
    assert row.output_projection is not None
    scores = torch.rand(shape.h, shape.t - shape.w, generator=torch.Generator().manual_seed(seed))
    norms = oracle.value_norms(row.values[0], row.output_projection)
    expected = torch.tensor(oracle.two_stage_critical(scores.tolist(), norms, share))
    weighted = _weighted(TwoStageCritical(), scores, scores, row, share)
    pinned = weighted == torch.finfo(weighted.dtype).max
    torch.testing.assert_close(weighted.masked_fill(pinned, float("inf")), expected, rtol=1e-4, atol=1e-7)


def test_no_more_is_pinned_than_the_budget_less_the_window() -> None:
    row = observation(Shape(2, 2, 4, 104, 4, 4), 0)
    scores = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    even = torch.full((2, 100), 0.008)  # 90 entries carry 90 % of the mass
    for share, pins in ((Fraction(1, 2), 46), (Fraction(1, 10), 6), (Fraction(4, 100), 0), (Fraction(1, 100), 0)):
        weighted = _weighted(TwoStageValueNorm(), scores, even, row, share)
        top = weighted.max()
        assert all(abs(int(count) - pins) <= 1 for count in (weighted == top).sum(-1)), (share, pins)


def test_a_token_whose_values_are_all_zero_scores_zero_and_spoils_nothing() -> None:
    row = observation(Shape(2, 2, 2, 20, 4, 4), 0)
    row.values[:, :, 5] = 0.0
    scores = torch.ones(2, 18)
    means = torch.full((2, 18), 0.05)
    weighted = _weighted(TwoStageValueNorm(), scores, means, row, Fraction(1, 100))
    assert weighted[:, 5].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(weighted).all())
