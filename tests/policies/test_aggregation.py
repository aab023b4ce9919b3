import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import InvalidInputError
from defensivekv.policies.aggregation import Aggregation, Defensive, Mean
from tests.policies import oracle
from tests.policies.cases import aggregate, seeds


@st.composite
def importances(draw: st.DrawFn) -> Tensor:
    """(h, g, w, n), rows that sum to less than one, some of them peaked, some entries exactly zero."""
    shape = [draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8])), draw(st.integers(1, 6))]
    n = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(seeds()))
    logits = torch.randn(*shape, n + 1, generator=generator) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    weights = logits.softmax(-1)[..., :-1]
    return weights * (torch.rand(weights.shape, generator=generator) > draw(st.sampled_from([0.0, 0.5])))


KERNELS = st.sampled_from([1, 3, 5, 7])


@given(importance=importances(), kernel_size=KERNELS)
def test_defensive_aggregation_equals_the_loops(importance: Tensor, kernel_size: int) -> None:
    expected = torch.tensor([oracle.defensive(head, kernel_size) for head in importance.tolist()])
    # The package guards its division by 1e-12, which shows in rows of hardly any mass.
    torch.testing.assert_close(aggregate(Defensive(kernel_size), importance), expected, rtol=1e-4, atol=1e-9)


@given(importance=importances(), kernel_size=KERNELS)
def test_mean_aggregation_equals_the_loops(importance: Tensor, kernel_size: int) -> None:
    expected = torch.tensor([oracle.mean(head, kernel_size) for head in importance.tolist()])
    torch.testing.assert_close(aggregate(Mean(kernel_size), importance), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("aggregation", [Defensive(), Defensive(1), Mean(), Mean(1)])
@given(importance=importances())
def test_the_importances_are_left_as_they_were(aggregation: Aggregation, importance: Tensor) -> None:
    before = importance.clone()
    aggregate(aggregation, importance)
    assert torch.equal(importance, before)


@pytest.mark.parametrize("aggregation", [Defensive(), Mean()])
@given(importance=importances())
def test_heads_do_not_influence_each_other(aggregation: Aggregation, importance: Tensor) -> None:
    alone = torch.cat([aggregate(aggregation, head[None]) for head in importance])
    torch.testing.assert_close(aggregate(aggregation, importance), alone, rtol=1e-6, atol=0)


@given(importance=importances())
def test_a_further_query_only_raises_defensive_scores(importance: Tensor) -> None:
    if importance.shape[2] == 1:
        importance = importance.repeat(1, 1, 2, 1)
    fewer = aggregate(Defensive(), importance[:, :, 1:])
    assert bool((aggregate(Defensive(), importance) >= fewer * (1 - 1e-5)).all())


@given(importance=importances())
def test_no_defensive_score_is_below_the_mean_of_the_worst_cases(importance: Tensor) -> None:
    scores = aggregate(Defensive(1), importance)
    floor = importance.amax(dim=(1, 2)).mean(-1, keepdim=True)
    assert bool((scores >= floor * (1 - 1e-5)).all())


def test_one_query_that_needs_an_entry_is_enough_for_the_worst_case_but_not_for_the_mean() -> None:
    importance = torch.full((1, 2, 16, 30), 1e-4)
    importance[0, 1, 3, 20] = 0.9  # needed by one query of one head
    importance[0, :, :, 10] = 0.1  # needed a little by all
    assert int(aggregate(Defensive(1), importance)[0].argmax()) == 20
    assert int(aggregate(Mean(1), importance)[0].argmax()) == 10


@pytest.mark.parametrize("kind", [Mean, Defensive])
@pytest.mark.parametrize("kernel_size", [0, -1, 2, 4])
def test_a_filter_without_a_middle_is_refused(kind: type[Mean | Defensive], kernel_size: int) -> None:
    with pytest.raises(InvalidInputError, match="odd"):
        kind(kernel_size)
