from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defensivekv import InvalidInputError
from defensivekv.policies.scoring import Recency, UniformRandom, WindowAttention
from tests.policies import oracle
from tests.policies.cases import Shape, importances, normal, observation, seeds, shapes


@settings(max_examples=40)
@given(
    shape=shapes(max_tokens=20),
    seed=seeds(),
    scaling=st.sampled_from([None, 0.3, 2.0]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    with_sinks=st.booleans(),
)
def test_window_attention_equals_the_loops(
    shape: Shape, seed: int, scaling: float | None, softcap: float | None, with_sinks: bool
) -> None:
    sinks = normal(seed + 1, shape.h * shape.g) if with_sinks else None
    row = replace(observation(shape, seed), scaling=scaling, softcap=softcap, sinks=sinks)
    expected = oracle.window_attention(
        row.queries[0], row.keys[0], shape.d**-0.5 if scaling is None else scaling, softcap, sinks
    )
    torch.testing.assert_close(
        importances(WindowAttention(), row, shape.w), torch.tensor(expected), rtol=1e-4, atol=1e-7
    )


@given(shape=shapes(), seed=seeds())
def test_only_the_last_window_of_the_queries_is_looked_at(shape: Shape, seed: int) -> None:
    row = observation(shape, seed)
    more = replace(row, queries=torch.cat((normal(seed, 1, shape.h * shape.g, 1, shape.d), row.queries), dim=2))
    assert torch.equal(importances(WindowAttention(), more, shape.w), importances(WindowAttention(), row, shape.w))


def test_importances_are_rounded_to_the_models_dtype() -> None:
    row = observation(Shape(1, 1, 2, 30, 8, 8), 0)
    half = replace(row, queries=row.queries.bfloat16(), keys=row.keys.bfloat16(), values=row.values.bfloat16())
    scores = importances(WindowAttention(), half, 2)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, importances(WindowAttention(), row, 2), rtol=0.1, atol=1e-3)


def test_large_keys_do_not_overflow_float16_where_the_scaled_logits_do_not() -> None:
    row = observation(Shape(1, 1, 2, 30, 64, 8), 0)
    large = replace(row, queries=row.queries.sign() * 40, keys=row.keys.sign() * 40)
    assert float((large.queries @ large.keys.mT).max()) < 65504 < 64 * 40 * 40
    large.keys[0, 0, 7] = large.queries[0, 0, 0]
    half = replace(large, queries=large.queries.half(), keys=large.keys.half(), values=large.values.half())
    torch.testing.assert_close(importances(WindowAttention(), half, 2), importances(WindowAttention(), large, 2))


def test_the_observation_is_left_as_it_was() -> None:
    row = observation(Shape(2, 2, 3, 20, 4, 4), 0)
    before = (row.queries.clone(), row.keys.clone())
    importances(WindowAttention(), row, 3)
    assert torch.equal(row.queries, before[0])
    assert torch.equal(row.keys, before[1])


def test_fewer_queries_than_the_window_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="3 queries do not fill the observation window of 4"):
        importances(WindowAttention(), observation(Shape(1, 1, 3, 20, 4, 4), 0), 4)


@pytest.mark.parametrize("scorer", [WindowAttention(), Recency(), UniformRandom()])
def test_every_scorer_gives_float32_over_the_first_tokens(scorer: WindowAttention | Recency | UniformRandom) -> None:
    importance = importances(scorer, observation(Shape(3, 2, 4, 20, 5, 5), 0), 4)
    assert importance.dtype == torch.float32
    assert importance.shape[0] == 3
    assert importance.shape[3] in (16, 20)
    assert bool((importance >= 0).all())


def test_recency_puts_the_latest_first() -> None:
    scores = importances(Recency(), observation(Shape(2, 1, 4, 10, 3, 3), 0), 4)
    assert all(head.topk(3).indices.tolist() == [9, 8, 7] for head in scores[:, 0, 0])


def test_chance_repeats_for_the_same_prompt_and_differs_between_prompts_and_seeds() -> None:
    shape = Shape(2, 1, 4, 40, 3, 3)
    one, other = observation(shape, 0), observation(shape, 1)
    assert torch.equal(importances(UniformRandom(), one, 4), importances(UniformRandom(), one, 4))
    assert not torch.equal(importances(UniformRandom(), one, 4), importances(UniformRandom(), other, 4))
    assert not torch.equal(importances(UniformRandom(seed=1), one, 4), importances(UniformRandom(), one, 4))


def test_chance_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    importances(UniformRandom(), observation(Shape(2, 1, 4, 40, 3, 3), 0), 4)
    assert torch.equal(torch.rand(3), expected)


def test_chance_is_the_same_for_a_prompt_whose_keys_are_rounded_otherwise() -> None:
    row = observation(Shape(2, 1, 4, 40, 3, 3), 0)
    rounded = replace(row, keys=row.keys * (1 + 1e-6))
    assert torch.equal(importances(UniformRandom(), rounded, 4), importances(UniformRandom(), row, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [33, 64, 500])
def test_weights_are_made_in_float32_and_rounded_to_the_dtype(dtype: torch.dtype, tokens: int) -> None:
    layer = observation(Shape(2, 3, 4, tokens, 16, 4), 0)
    row = replace(layer, queries=layer.queries.to(dtype), keys=layer.keys.to(dtype), values=layer.values.to(dtype))
    grouped = (row.queries[0] * row.softmax_scaling).view(2, 12, 16)
    logits = (grouped @ row.keys[0].mT).float().view(2, 3, 4, tokens)
    logits[..., -4:].masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))
    expected = logits.softmax(-1)[..., :-4].to(dtype).float()
    found = importances(WindowAttention(), row, 4)
    # Where it lies between two numbers of the dtype, the order in which a row was added up decides.
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert (found == expected).float().mean() > 0.998
