import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.policies.selection import keep_highest, keep_highest_per_head

SCORES = st.sampled_from([float("-inf"), -1.0, 0.0, 0.5, 0.5, 1.0, 2.0, float("inf")])


@st.composite
def score_tensors(draw: st.DrawFn) -> list[Tensor]:
    """Layers full of ties."""
    count, h, t = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return list(torch.tensor(draw(st.lists(SCORES, min_size=count * h * t, max_size=count * h * t))).view(count, h, t))


@given(scores=score_tensors(), count=st.integers(0, 200))
def test_nothing_left_out_scores_higher_than_what_stays_over_all_tensors(scores: list[Tensor], count: int) -> None:
    flat, chosen = torch.stack(scores), torch.stack(keep_highest(scores, count))
    entries = int((flat > float("-inf")).sum())
    assert int(chosen.sum()) == min(count, entries)
    if 0 < count < entries:
        assert flat[chosen].min() >= flat[~chosen].max()


@given(scores=score_tensors(), count=st.integers(0, 15))
def test_every_head_keeps_its_own_highest(scores: list[Tensor], count: int) -> None:
    layer = scores[0]
    kept = keep_highest_per_head(layer, count)
    for row, mask in zip(layer, kept, strict=True):
        entries = int((row > float("-inf")).sum())
        assert int(mask.sum()) == min(count, entries)
        if 0 < count < entries:
            assert row[mask].min() >= row[~mask].max()


@given(st.permutations(range(24)), st.integers(0, 24))
def test_without_ties_the_kept_set_is_decided(order: list[int], count: int) -> None:
    scores = torch.tensor(order, dtype=torch.float32).view(2, 3, 4)
    kept = keep_highest(list(scores), count)
    assert torch.equal(torch.stack(kept), scores >= 24 - count)
