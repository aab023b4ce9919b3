from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.policies.allocation import AcrossLayers, Allocation, Contender, PerHead, PerLayer
from tests.policies import oracle
from tests.policies.cases import count_kept

SHARES = st.builds(Fraction, st.integers(0, 60), st.just(60)) | st.integers(0, 100).map(lambda p: Fraction(p, 100))
SAFEGUARDS = st.sampled_from([Fraction(0), Fraction(1, 5), Fraction(1, 2), Fraction(1)])


@st.composite
def layers(draw: st.DrawFn) -> list[Tensor]:
    """Scores without ties, every head on a scale of its own, the last tokens infinite in some."""
    count, h, t = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    ranks = torch.randperm(count * h * t, generator=generator).double().view(count, h, t) + 1
    scales = 10.0 ** torch.randint(-2, 3, (count, h, 1), generator=generator)
    return list((ranks * scales * (1 + 1e-7 * ranks)).float())


def _sets(kept: list[Tensor]) -> list[list[set[int]]]:
    return [[set(row.nonzero().squeeze(-1).tolist()) for row in layer] for layer in kept]


def _contenders(scores: list[Tensor]) -> list[Contender]:
    return [Contender(layer, index, len(scores)) for index, layer in enumerate(scores)]


def _lists(scores: list[Tensor]) -> list[list[list[float]]]:
    return [layer.tolist() for layer in scores]


def _has_ties(scores: list[Tensor]) -> bool:
    flat = torch.cat([layer.flatten() for layer in scores])
    return len(flat.unique()) < len(flat)


@given(scores=layers().filter(lambda scores: not _has_ties(scores)), share=SHARES)
def test_per_head_equals_the_loops(scores: list[Tensor], share: Fraction) -> None:
    assert _sets(PerHead()(_contenders(scores), share)) == oracle.per_head(_lists(scores), share)


@given(scores=layers().filter(lambda scores: not _has_ties(scores)), share=SHARES, safeguard=SAFEGUARDS)
def test_per_layer_equals_the_loops(scores: list[Tensor], share: Fraction, safeguard: Fraction) -> None:
    assert _sets(PerLayer(safeguard)(_contenders(scores), share)) == oracle.per_layer(_lists(scores), share, safeguard)


@given(scores=layers().filter(lambda scores: not _has_ties(scores)), share=SHARES)
def test_across_layers_equals_the_loops(scores: list[Tensor], share: Fraction) -> None:
    assert _sets(AcrossLayers()(_contenders(scores), share)) == oracle.across_layers(_lists(scores), share)


ALLOCATIONS: list[Allocation] = [PerHead(), PerLayer(), PerLayer(Fraction(1, 5)), AcrossLayers()]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(scores=layers(), share=SHARES)
def test_exactly_the_budget_is_kept(allocation: Allocation, scores: list[Tensor], share: Fraction) -> None:
    h, t = scores[0].shape
    expected = {
        "PerHead": len(scores) * h * floor(t * share),
        "PerLayer": len(scores) * floor(t * h * share),
        "AcrossLayers": floor(t * h * len(scores) * share),
    }
    assert count_kept(allocation(_contenders(scores), share)) == expected[type(allocation).__name__]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(scores=layers(), share=SHARES)
def test_ties_change_neither_the_count_nor_the_scores(
    allocation: Allocation, scores: list[Tensor], share: Fraction
) -> None:
    tied = [layer.sign() for layer in scores]
    before = [layer.clone() for layer in tied]
    assert count_kept(allocation(_contenders(tied), share)) == count_kept(allocation(_contenders(scores), share))
    assert all(torch.equal(now, then) for now, then in zip(tied, before, strict=True))


def test_only_across_layers_waits_for_all_layers() -> None:
    assert [allocation.spans_layers for allocation in ALLOCATIONS] == [False, False, False, True]


def test_a_layer_of_low_scores_can_lose_everything_across_layers_but_not_within() -> None:
    scores = [torch.full((2, 10), 0.1), torch.full((2, 10), 1.0)]
    assert [int(kept.sum()) for kept in AcrossLayers()(_contenders(scores), Fraction(1, 2))] == [0, 20]
    assert [int(kept.sum()) for kept in PerLayer()(_contenders(scores), Fraction(1, 2))] == [10, 10]


def test_the_safeguard_holds_for_a_head_of_low_scores() -> None:
    scores = [torch.stack((torch.arange(10.0), 100 + torch.arange(10.0)))]
    assert PerLayer()(_contenders(scores), Fraction(1, 2))[0].sum(-1).tolist() == [0, 10]
    assert PerLayer(Fraction(2, 5))(_contenders(scores), Fraction(1, 2))[0].sum(-1).tolist() == [2, 8]
