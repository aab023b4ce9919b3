import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

import defensivekv as dkv
from defensivekv.policies import Policy, summary
from defensivekv.policies.aggregation import Mean, Places
from defensivekv.policies.allocation import PerLayer
from defensivekv.policies.profile import HeadProfile
from defensivekv.policies.scoring import Part, WindowAttention
from defensivekv.types import HeadScores, Importance
from tests.policies.cases import Shape, observation, observation_for, policy_of

SHAPE = Shape(h=2, g=2, w=4, t=60, d=5, v=5)


PROFILE = HeadProfile(((1.0, 0.0), (0.5, 0.2)), num_sinks=2, num_recent=6)

UNIFORM = ["streaming-llm", "random", "snapkv", "criticalkv", "h2o", "tova", "knorm", "keydiff", "lagkv", "chunkkv"]


def _whole(name: str) -> Policy:
    return dkv.policy(name, 1.0, profile=PROFILE if name == "duo-attention" else None)


def _kept(name: str, budget: float, layers: int = 1) -> torch.Tensor:
    observations = [observation_for(name, SHAPE, seed) for seed in range(layers)]
    return torch.stack(policy_of(name, budget).select(observations))[:, 0]


def test_the_names_are_those_of_the_field() -> None:
    assert set(dkv.policies()) >= {
        *("full", "random", "streaming-llm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv"),
    }


@pytest.mark.parametrize("name", dkv.policies())
def test_every_name_has_a_policy_of_that_name_one_line_and_described_parts(name: str) -> None:
    policy = _whole(name)
    assert policy.name == name
    assert re.fullmatch(r"[^\n]{20,100}\.", summary(name))
    descriptions = [policy.scorer.description, policy.aggregation.description, policy.allocation.description]
    if policy.weighting is not None:
        descriptions.append(policy.weighting.description)
    assert all(0 < len(text) < 60 for text in descriptions)
    assert policy.paper.startswith("https://arxiv.org/abs/") or name in ("full", "random")


@pytest.mark.parametrize("name", dkv.policies())
def test_a_policy_is_made_anew_each_time_and_cannot_be_changed(name: str) -> None:
    policy = _whole(name)
    assert policy is not _whole(name)
    assert policy == _whole(name)
    with pytest.raises(FrozenInstanceError):
        policy.window_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("defensive", "'defensivekv'"),
        ("DefensiveKV", "'defensivekv'"),
        ("layer_defensivekv", "'layer-defensivekv'"),
        ("snap-kv", "'snapkv'"),
        ("streamingllm", "'streaming-llm'"),
    ],
)
def test_an_unknown_policy_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(dkv.UnknownPolicyError, match=f"unknown policy '{name}': did you mean .*{near}"):
        dkv.policy(name, 0.2)
    with pytest.raises(dkv.UnknownPolicyError):
        summary(name)


def test_a_name_like_no_other_is_answered_with_all_names() -> None:
    with pytest.raises(dkv.UnknownPolicyError, match="known are full, random, streaming-llm") as error:
        dkv.policy("qqqqq", 0.2)
    assert "did you mean" not in str(error.value)


def test_the_budget_is_needed_by_all_but_full() -> None:
    for name in dkv.policies():
        if name == "full":
            assert dkv.policy(name).budget.is_full
        else:
            with pytest.raises(dkv.BudgetError, match="needs a budget"):
                dkv.policy(name, profile=PROFILE if name == "duo-attention" else None)


@pytest.mark.parametrize("budget", [0.5, 1024, "64MiB"])
def test_full_takes_no_smaller_budget(budget: float | int | str) -> None:
    with pytest.raises(dkv.BudgetError, match="leave the budget out"):
        dkv.policy("full", budget)


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, float("nan"), True, "lots", "64XB"])
def test_a_bad_budget_is_refused_before_any_prompt(budget: float | int | str) -> None:
    with pytest.raises(dkv.BudgetError):
        dkv.policy("snapkv", budget)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("window_size", [True, 32.0, "32"])
def test_a_window_size_that_is_no_integer_is_refused(window_size: object) -> None:
    with pytest.raises(dkv.InvalidInputError, match="must be an integer"):
        dkv.policy("snapkv", 0.5, window_size=window_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_policies_keep_as_much_of_every_head(name: str) -> None:
    assert _kept(name, 0.25, layers=2).sum(-1).unique().tolist() == [15]


@pytest.mark.parametrize("name", ["adakv", "defensivekv"])
def test_adaptive_policies_keep_as_much_of_every_layer_but_not_of_every_head(name: str) -> None:
    kept = _kept(name, 0.25, layers=3)
    assert kept.sum((1, 2)).tolist() == [30] * 3
    assert len(kept.sum(-1).unique()) > 1


def test_layer_defensivekv_keeps_the_budget_over_all_layers_only() -> None:
    kept = _kept("layer-defensivekv", 0.3, layers=4)
    assert int(kept.sum()) == 4 * 36
    assert len(kept.sum((1, 2)).unique()) > 1


def test_every_head_keeps_a_fifth_of_its_even_share_in_adakv() -> None:
    layer = observation(SHAPE, 0)
    layer.queries[:, 2:] = 0  # the second head spreads its attention evenly: its scores are low
    layer.queries[:, :2] *= 4
    kept = dkv.policy("adakv", 0.5, window_size=1).select([layer])[0]
    assert int(kept[0, 1].sum()) >= 6
    assert int(kept[0].sum()) == 60


def test_streaming_llm_keeps_the_first_four_and_the_latest() -> None:
    kept = _kept("streaming-llm", 0.25)[0]
    expected = torch.zeros(2, 60, dtype=torch.bool)
    expected[:, :4], expected[:, 49:] = True, True
    assert torch.equal(kept, expected)


def test_defensivekv_keeps_what_one_query_needs_where_snapkv_does_not() -> None:
    shape = Shape(h=1, g=2, w=16, t=216, d=2, v=2)
    layer = observation(shape, 0)
    layer.keys[...] = torch.tensor([0.01, 0.0]) * torch.randn(216, 1, generator=torch.Generator().manual_seed(1))
    layer.keys[0, 0, 20:150] = torch.tensor([2.0, 0.0])  # what every query looks at
    layer.keys[0, 0, 180] = torch.tensor([0.0, 30.0])  # what one query of one head needs
    layer.queries[...] = torch.tensor([2.0, 0.0])
    layer.queries[0, 1, 3] = torch.tensor([0.0, 1.0])
    layer.values[...] = 1.0
    kept = {name: dkv.policy(name, 0.3, window_size=16).select([layer])[0][0, 0] for name in ("snapkv", "defensivekv")}
    assert bool(kept["defensivekv"][180])
    assert not bool(kept["snapkv"][180])


@dataclass(frozen=True)
class SmallKeys:
    """A method of one's own: entries with small keys matter most (after arXiv 2406.11430)."""

    description = "small key norms"
    sees = "nothing"
    has_window = True
    gives = frozenset({"levels"})

    def __call__(self, row: dkv.Observation, window_size: int) -> Iterator[Part]:
        norms: torch.Tensor = row.keys[0, :, : row.num_tokens - window_size].float().norm(dim=-1)
        yield Part(norms.reciprocal()[:, None, None])


def test_a_new_method_is_one_small_class_composed_with_the_parts_that_are_there() -> None:
    budget = dkv.Budget.parse(0.25)
    policy = Policy("small-keys", budget, SmallKeys(), PerLayer(), Mean(kernel_size=1), window_size=4)
    layer = observation(SHAPE, 0, rows=2)
    kept = policy.select([layer])[0]
    for row in range(2):
        assert bool(kept[row, :, -4:].all())
        norms = layer.keys[row, :, :-4].norm(dim=-1)
        expected = torch.zeros_like(norms, dtype=torch.bool).flatten()
        expected[norms.flatten().topk(2 * 15 - 8, largest=False).indices] = True
        assert torch.equal(kept[row, :, :-4].flatten(), expected)


def test_an_aggregation_of_ones_own_is_three_functions() -> None:
    @dataclass(frozen=True)
    class Median:
        description = "median"
        needs: frozenset[str] = frozenset({"queries", "one part"})

        def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
            scores: HeadScores = importance.flatten(1, 2).median(dim=1).values
            return scores

        def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
            raise AssertionError("of one part, there is nothing to merge")

        def finish(self, reduced: HeadScores, counts: torch.Tensor, places: Places | None = None) -> HeadScores:
            return reduced

    policy = Policy("median", dkv.Budget.parse(0.25), WindowAttention(), PerLayer(), Median(), window_size=4)
    assert int(policy.select([observation(SHAPE, 0)])[0].sum()) == 30
