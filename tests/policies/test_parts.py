"""Every part by name with every other: either it decides, or the reason why it cannot is said."""

from itertools import product

import pytest
import torch

import defensivekv as dkv
from defensivekv.policies import PARTS
from defensivekv.policies.aggregation import Defensive
from defensivekv.policies.allocation import AcrossLayers
from tests.policies.cases import Shape, Turning, normal, observation

SHAPE = Shape(h=2, g=2, w=4, t=60, d=6, v=5)
ALL = [dict(zip(PARTS, names, strict=True)) for names in product(*(parts.keys() for parts in PARTS.values()))]


def _layer(seed: int, *, with_repeats: bool) -> dkv.Observation:
    layer = observation(SHAPE, seed)
    queries = normal(seed, 1, 4, 60, 6)
    if not with_repeats:
        return dkv.Observation(
            queries=queries,
            keys=layer.keys,
            values=layer.values,
            output_projection=layer.output_projection,
            rotary=Turning(torch.arange(60)),
        )
    return dkv.Observation(
        queries=queries,
        keys=torch.cat((layer.keys, normal(seed + 1, 1, 2, 60, 6)), 2),
        values=torch.cat((layer.values, normal(seed + 2, 1, 2, 60, 5)), 2),
        output_projection=layer.output_projection,
        repeats=(0, 60),
    )


def _composed(parts: dict[str, str]) -> tuple[dkv.Policy | None, str]:
    window = {"window_size": 4} if PARTS["scoring"][parts["scoring"]]().has_window else {}
    try:
        return dkv.policy("snapkv", 0.3, **parts, **window), ""  # type: ignore[arg-type]
    except dkv.InvalidInputError as error:
        return None, str(error)


@pytest.mark.parametrize("scoring", PARTS["scoring"])
def test_parts_that_go_together_decide_and_the_others_say_why_not(scoring: str) -> None:
    together = 0
    for parts in ALL:
        if parts["scoring"] != scoring:
            continue
        policy, reason = _composed(parts)
        if policy is None:
            assert "choose another of either" in reason
            continue
        together += 1
        first = _layer(0, with_repeats=False)
        evidence = None
        if policy.scorer.sees == "reconstruction":
            evidence = policy.observe(_layer(0, with_repeats=True))
        scored = policy.score(first, index=0, num_layers=1, evidence=evidence)
        (kept,) = policy.keep([scored], [policy.row_share(60, 1)])
        assert 36 - 2 <= int(kept.sum()) <= 36, parts
    assert together >= 2


def test_the_paper_gives_two_names_to_one_composition() -> None:
    composed = dkv.policy("snapkv", 0.2, aggregation="defensive", weighting="value-norm", allocation="across-layers")
    layers = [observation(Shape(2, 2, 32, 300, 6, 5), seed) for seed in range(3)]
    pairs = zip(composed.select(layers), dkv.policy("layer-defensivekv", 0.2).select(layers), strict=True)
    assert all(torch.equal(ours, named) for ours, named in pairs)


def test_a_part_may_be_given_as_it_is() -> None:
    policy = dkv.policy("kvzip", 0.2, aggregation=Defensive(3), allocation=AcrossLayers())
    assert policy.aggregation == Defensive(3)
    assert dkv.policy("kvzip", 0.2, aggregation="defensive").aggregation == Defensive()
    assert dkv.policy("criticalkv", 0.2, weighting="none").weighting is None


@pytest.mark.parametrize(
    ("name", "parts", "reason"),
    [
        ("knorm", {"aggregation": "defensive"}, "sets one query against another, and KeyNorm"),
        ("knorm", {"weighting": "critical"}, "takes scores for attention, and those of KeyNorm"),
        ("streaming-llm", {"allocation": "per-layer"}, "lets heads compete, and Recency"),
        ("h2o", {"aggregation": "mean-and-variance"}, "needs all queries at once, and PromptAttention"),
        ("lagkv", {"allocation": "across-layers"}, "lets heads compete, and LagRelative"),
        ("expected-attention", {"aggregation": "defensive"}, "sets one query against another"),
    ],
)
def test_parts_that_cannot_go_together_are_refused_with_the_reason(
    name: str, parts: dict[str, str], reason: str
) -> None:
    with pytest.raises(dkv.InvalidInputError, match=reason):
        dkv.policy(name, 0.2, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [
        ("aggregation", "defensiv", "'defensive'"),
        ("allocation", "across_layer", "'across-layers'"),
        ("scoring", "window", "'window-attention'"),
        ("weighting", "critcal", "'critical'"),
    ],
)
def test_an_unknown_part_is_refused_with_the_nearest_names(kind: str, name: str, near: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=f"unknown {kind} '{name}': did you mean .*{near}"):
        dkv.policy("snapkv", 0.2, **{kind: name})  # type: ignore[arg-type]


def test_a_window_where_there_is_none_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="'knorm' observes no window"):
        dkv.policy("knorm", 0.2, window_size=16)
    assert dkv.policy("knorm", 0.2, scoring="window-attention", window_size=16).window_size == 16


def test_a_composition_is_named_by_its_parts() -> None:
    assert dkv.policy("kvzip", 0.2, aggregation="defensive").name == "kvzip+aggregation=defensive"
    composed = dkv.policy("snapkv", 0.2, allocation=AcrossLayers(), aggregation="defensive")
    assert composed.name == "snapkv+aggregation=defensive+allocation=AcrossLayers"
    assert dkv.policy("snapkv", 0.2, window_size=16).name == "snapkv"


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", ["scoring", "aggregation", "weighting", "allocation"])
@pytest.mark.parametrize("given", [3, True, object(), Defensive])
def test_what_is_no_part_is_refused(kind: str, given: object) -> None:
    with pytest.raises(dkv.InvalidInputError, match=f"^{kind} .* is no part of that kind"):
        dkv.policy("snapkv", 0.2, **{kind: given})  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked_shapes")
def test_options_of_other_types_are_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="protect_window 'no' must be True or False"):
        dkv.policy("snapkv", 0.2, protect_window="no")  # type: ignore[arg-type]
    for size in ("x", 2.5):
        with pytest.raises(dkv.InvalidInputError, match="must be odd"):
            Defensive(size)  # type: ignore[arg-type]
