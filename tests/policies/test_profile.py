import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv.policies.allocation import ByProfile, Contender
from defensivekv.policies.profile import HeadProfile, retrieval_shares
from tests.policies import oracle
from tests.policies.cases import Shape, normal, observation, seeds

PROFILE = HeadProfile(((0.9, 0.1), (0.4, 0.6)), num_sinks=2, num_recent=6, model="tiny", method="by hand")


def test_a_saved_profile_is_read_back(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert HeadProfile.load(tmp_path / "profile.json") == PROFILE


def test_a_folder_as_duo_attention_publishes_them_is_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t1.4\n-0.2\t0.6\n")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    profile = HeadProfile.load(tmp_path)
    assert profile.heads == ((0.9, 1.0), (0.0, 0.6))
    assert (profile.num_sinks, profile.num_recent) == (128, 256)


SPANS = '"num_sinks": 1, "num_recent": 1'


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[1]", '{"format": 2, "heads": [[1.0]]}'),
        f'{{"format": 1, "heads": [[]], {SPANS}}}',
        f'{{"format": 1, "heads": [[1.0], [1.0, 2.0]], {SPANS}}}',
        f'{{"format": 1, "heads": [["x"]], {SPANS}}}',
        '{"format": 1, "heads": [[1.0]], "num_sinks": -1, "num_recent": 1}',
        '{"format": 1, "heads": [[1.0]], "num_sinks": 1.5, "num_recent": 1}',
        '{"format": 1, "heads": [[1.0]], "num_sinks": 1, "num_recent": true}',
        f'{{"format": 1, "heads": [[NaN]], {SPANS}}}',
    ],
)
def test_anything_else_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(dkv.InvalidInputError, match=r"profile\.json is no profile of heads"):
        HeadProfile.load(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dkv.InvalidInputError, match="is no profile of heads"):
        dkv.policy("duo-attention", 0.5, profile=tmp_path / "none.json")


def test_the_profile_belongs_to_duo_attention_alone() -> None:
    with pytest.raises(dkv.InvalidInputError, match="needs profile=FILE"):
        dkv.policy("duo-attention", 0.5)
    with pytest.raises(dkv.InvalidInputError, match="'snapkv' takes no profile"):
        dkv.policy("snapkv", 0.5, profile=PROFILE)
    with pytest.raises(dkv.UnknownPolicyError, match="unknown policy 'duo'"):
        dkv.policy("duo", 0.5, profile=PROFILE)


def test_retrieval_heads_stay_whole_and_streaming_heads_keep_both_ends() -> None:
    layers = [observation(Shape(2, 2, 4, 40, 5, 5), seed) for seed in range(2)]
    # Two whole heads and two of eight entries.
    kept = torch.stack(dkv.policy("duo-attention", Fraction(96, 160), profile=PROFILE).select(layers))[:, 0]
    assert kept.sum(-1).tolist() == [[40, 8], [8, 40]]
    assert kept[0, 1].nonzero().squeeze(-1).tolist() == [0, 1, *range(34, 40)]


@given(share=st.integers(5, 100).map(lambda percent: Fraction(percent, 100)), t=st.integers(1, 60), seed=seeds())
def test_the_budget_holds_and_better_heads_never_keep_less(share: Fraction, t: int, seed: int) -> None:
    weights = normal(seed, 3, 4).tolist()
    allocation = ByProfile(tuple(map(tuple, weights)), num_sinks=2, num_recent=6)
    layers = [Contender(torch.arange(float(t)).expand(4, t), index, 3) for index in range(3)]
    kept = torch.stack(allocation(layers, share))
    counts = kept.sum(-1).flatten()
    order = torch.tensor(weights).flatten().argsort()
    assert bool((counts[order].diff() >= 0).all())
    assert int(t * share) * 12 <= int(kept.sum()) <= int(12 * t * share)
    apart = torch.stack([allocation([layer], share)[0] for layer in layers])
    assert torch.equal(kept, apart)


def test_a_profile_of_another_model_is_refused() -> None:
    layers = [observation(Shape(2, 2, 4, 40, 5, 5), seed) for seed in range(3)]
    with pytest.raises(dkv.InvalidInputError, match="the profile has 2 layers of 2 heads, the model 3 evicted layers"):
        dkv.policy("duo-attention", 0.5, profile=PROFILE).select(layers)


def test_what_streaming_loses_equals_the_loops() -> None:
    shape = Shape(h=2, g=3, w=12, t=12, d=4, v=4)
    row = observation(shape, 3)
    sinks, recent = 2, 4
    lost = []
    for head in range(2):
        of_group = []
        for query_head in range(3):
            total = 0.0
            for place in range(12):
                one = row.queries[0, head * 3 + query_head, place : place + 1]
                weights = oracle.window_attention(one[None], row.keys[0, head : head + 1, : place + 1], 0.5)[0][0][0]
                total += sum(weights[sinks : max(sinks, place - recent + 1)])
            of_group.append(total / (12 - 6))
        lost.append(max(of_group))
    torch.testing.assert_close(retrieval_shares(row, sinks, recent), torch.tensor(lost), rtol=1e-4, atol=1e-6)


def test_a_text_that_shows_nothing_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="a text of 12 tokens shows nothing"):
        retrieval_shares(observation(Shape(1, 1, 12, 12, 4, 4), 0), 4, 8)
