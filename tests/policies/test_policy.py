import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import defensivekv as dkv
from defensivekv.policies.aggregation import Mean
from defensivekv.policies.scoring import Part
from tests.policies import oracle
from tests.policies.cases import (
    GENERIC,
    Shape,
    normal,
    observation,
    observation_for,
    padded,
    policy_of,
    seeds,
    shapes,
    showing,
)

ATTENTION_POLICIES = ["snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv"]
WINDOW_POLICIES = [name for name in GENERIC if dkv.policy(name, 1.0).scorer.has_window and name != "chunkkv"]
"""ChunkKV's window shares chunks with what comes before it."""

INDIFFERENT = ["random", "streaming-llm", "lagkv", "knorm", "keydiff", "chunkkv"]
"""Where louder keys and values change no order, or hardly any."""


def _decide(name: str, layers: list[dkv.Observation], share: Fraction, protect: bool) -> tuple[Tensor, int]:
    """Scores (l, h, t) of one row by the loops, and how many entries stay in all."""
    scored = []
    for layer in layers:
        window, n = layer.queries.shape[2], layer.num_tokens - layer.queries.shape[2]
        importance = oracle.window_attention(layer.queries[0], layer.keys[0], layer.softmax_scaling)
        means = [oracle.mean(head, 1) for head in importance]
        if "defensivekv" in name:
            scores = [oracle.defensive(head, 5) for head in importance]
        else:
            scores = [oracle.mean(head, 5) for head in importance]
        if "defensivekv" in name or name == "criticalkv":
            assert layer.output_projection is not None
            norms = oracle.value_norms(layer.values[0], layer.output_projection)
            if name == "criticalkv":
                scores = oracle.two_stage_critical(scores, norms, share)
            else:
                scores, margin = oracle.two_stage_value_norm(scores, means, norms, share)
                assume(margin > 1e-5)
        top = oracle.INFINITY if protect else max(max(row) for row in scores)
        assert len(scores[0]) == n
        scored.append([row + [top] * window for row in scores])
    result = torch.tensor(scored)
    h, t = result.shape[1:]
    per_layer = floor(t * share) * h if name in ("snapkv", "criticalkv") else floor(t * share * h)
    return result, floor(result.numel() * share) if name == "layer-defensivekv" else per_layer * len(layers)


def _assert_decided_alike(kept: Tensor, scores: Tensor, count: int) -> None:
    """Of one competition: `count` entries stay, none of them clearly below the threshold of the oracle's scores."""
    assert int(kept.sum()) == count
    if 0 < count < scores.numel():
        threshold = float(scores.flatten().topk(count).values[-1])
        assert bool(kept[scores > threshold * (1 + 1e-3)].all())
        assert not bool(kept[scores < threshold * (1 - 1e-3)].any())


@pytest.mark.parametrize("protect", [True, False], ids=["protected", "parity"])
@pytest.mark.parametrize("name", ATTENTION_POLICIES)
@settings(max_examples=15)
@given(shape=shapes(max_tokens=24, min_surplus=4), layers=st.integers(1, 3), seed=seeds(), percent=st.integers(1, 99))
def test_the_whole_method_equals_the_loops(
    name: str, protect: bool, shape: Shape, layers: int, seed: int, percent: int
) -> None:
    share = max(Fraction(percent, 100), Fraction(shape.w, shape.t))
    observations = [observation(shape, seed + layer) for layer in range(layers)]
    policy = dkv.policy(name, share, window_size=shape.w, protect_window=protect)
    kept = torch.stack(policy.select(observations))[:, 0]
    scores, count = _decide(name, observations, share, protect)
    if name == "layer-defensivekv":
        _assert_decided_alike(kept, scores, count)
    elif name in ("defensivekv", "adakv"):
        assert int(kept.sum()) == count
        if name == "defensivekv":
            for layer_kept, layer_scores in zip(kept, scores, strict=True):
                _assert_decided_alike(layer_kept, layer_scores, count // layers)
        else:
            _assert_safeguarded(kept, scores, share)
    else:
        for head_kept, head_scores in zip(kept.flatten(0, 1), scores.flatten(0, 1), strict=True):
            _assert_decided_alike(head_kept, head_scores, floor(shape.t * share))


def _assert_safeguarded(kept: Tensor, scores: Tensor, share: Fraction) -> None:
    h, t = scores.shape[1:]
    for layer_kept, layer_scores in zip(kept, scores, strict=True):
        safe = layer_scores.clone()
        guarded = floor(floor(t * share) / 5)
        safe.scatter_(-1, layer_scores.topk(guarded, dim=-1).indices, oracle.INFINITY)
        _assert_decided_alike(layer_kept, safe, floor(t * share * h))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[dkv.Observation], Tensor, Shape]:
    """Prompts of one layer of different lengths and where they lie in a batch: pads left, right and between."""
    shape = draw(shapes())
    lengths = draw(st.lists(st.integers(1, 60), min_size=2, max_size=4))
    width = max(lengths) + draw(st.integers(0, 5))
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        order = draw(st.sampled_from(["left", "right", "scattered"]))
        if order == "scattered":
            generator = torch.Generator().manual_seed(draw(seeds()))
            valid[row, torch.randperm(width, generator=generator)[:length]] = True
        else:
            valid[row, slice(width - length, None) if order == "left" else slice(length)] = True
    seed = draw(seeds())
    projection = observation(shape, seed).output_projection
    rows = [
        replace(observation(replace(shape, t=length, w=min(shape.w, length)), seed + row), output_projection=projection)
        for row, length in enumerate(lengths)
    ]
    return rows, valid, shape


@pytest.mark.parametrize("name", GENERIC)
@settings(max_examples=25)
@given(batch=batches(), junk=st.sampled_from([0.0, 1e4, float("nan"), float("inf")]), percent=st.integers(30, 100))
def test_a_padded_batch_equals_its_rows(
    name: str, batch: tuple[list[dkv.Observation], Tensor, Shape], junk: float, percent: int
) -> None:
    rows, valid, shape = batch
    rows = [showing(name, row, seed) for seed, row in enumerate(rows)]
    policy = policy_of(name, percent / 100, shape.w)
    # Long enough for the budget, or short enough to be kept whole: no budget is below what always stays.
    least = policy.num_staying
    assume(all(floor(Fraction(percent * row.num_tokens, 100)) >= least or row.num_tokens < 8 * least for row in rows))
    other = [replace(row, keys=row.keys.flip(1), values=row.values.flip(2)) for row in rows]
    together = policy.select([padded(rows, valid, junk), padded(other, valid, junk)])
    for number, row in enumerate(rows):
        alone = policy.select([row, other[number]])
        for kept, expected in zip(together, alone, strict=True):
            assert torch.equal(kept[number][:, valid[number]], expected[0])
            assert not bool(kept[number][:, ~valid[number]].any())


@pytest.mark.parametrize("name", GENERIC)
def test_what_one_row_holds_does_not_change_the_others(name: str) -> None:
    batch = observation_for(name, Shape(2, 2, 4, 60, 5, 5), 0, rows=3)
    policy = policy_of(name, 0.2)
    before = policy.select([batch])[0]
    louder = replace(batch, keys=batch.keys.clone(), values=batch.values.clone())
    louder.keys[1] *= 50
    louder.values[1] *= 50
    after = policy.select([louder])[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    if name not in INDIFFERENT:
        assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", WINDOW_POLICIES)
@given(shape=shapes(min_surplus=1), seed=seeds(), layers=st.integers(1, 3), extra=st.integers(0, 3))
def test_the_window_always_stays(name: str, shape: Shape, seed: int, layers: int, extra: int) -> None:
    observations = [observation(shape, seed + layer) for layer in range(layers)]
    observations[0] = replace(observations[0], values=observations[0].values * 1e-3)
    share = Fraction(min(shape.t, shape.w + extra), shape.t)
    kept = torch.stack(policy_of(name, share, shape.w).select(observations))
    assert bool(kept[..., -shape.w :].all())


def test_in_parity_mode_a_layer_can_lose_its_window() -> None:
    shape = Shape(2, 2, 32, 320, 16, 16)
    layers = [observation(shape, seed) for seed in range(3)]
    layers[1] = replace(layers[1], queries=layers[1].queries * 3)  # more peaked: higher scores
    tight = [dkv.policy("layer-defensivekv", 0.1, protect_window=protect).select(layers) for protect in (True, False)]
    windows = [[bool(kept[..., -32:].all()) for kept in layers_kept] for layers_kept in tight]
    assert windows[0] == [True, True, True]
    assert not all(windows[1])
    assert sum(int(kept.sum()) for kept in tight[0]) == sum(int(kept.sum()) for kept in tight[1]) == 3 * 2 * 32


def test_the_number_of_heads_scored_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = replace(observation(Shape(5, 3, 4, 60, 5, 5), 0, rows=2), sinks=normal(3, 15))
    policy = dkv.policy("defensivekv", 0.2, window_size=4)
    whole = policy.score(batch).scores
    for elements in (1, 2 * 3 * 4 * 60):
        monkeypatch.setattr(sys.modules["defensivekv.policies.evidence"], "_HEAD_CHUNK_ELEMENTS", elements)
        torch.testing.assert_close(policy.score(batch).scores, whole, rtol=1e-5, atol=0)


def test_weights_that_require_gradients_are_read_like_any_others() -> None:
    layer = observation(Shape(2, 2, 4, 60, 5, 5), 0)
    assert layer.output_projection is not None
    learning = replace(
        layer,
        queries=layer.queries.clone().requires_grad_(),
        keys=layer.keys.clone().requires_grad_(),
        values=layer.values.clone().requires_grad_(),
        output_projection=torch.nn.Parameter(layer.output_projection),
    )
    policy = dkv.policy("defensivekv", 0.2, window_size=4)
    assert not policy.score(learning).scores.requires_grad
    assert torch.equal(policy.select([learning])[0], policy.select([layer])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GENERIC)
def test_half_precision_keeps_the_budget(name: str, dtype: torch.dtype) -> None:
    layer = observation_for(name, Shape(2, 2, 4, 60, 5, 5), 0)
    half = replace(layer, queries=layer.queries.to(dtype), keys=layer.keys.to(dtype), values=layer.values.to(dtype))
    assert int(policy_of(name, 0.2).select([half])[0].sum()) == 24


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
@pytest.mark.parametrize("policy", ["full", *GENERIC])
def test_nan_is_refused_before_anything_is_decided(policy: str, name: str) -> None:
    layer = observation_for(policy, Shape(2, 2, 4, 60, 5, 5), 0, rows=2)
    getattr(layer, name)[1, 0, 2, 1] = float("nan")
    chosen = policy_of(policy, 1.0 if policy == "full" else 0.2)
    with pytest.raises(dkv.InvalidInputError, match=f"{name} hold NaN"):
        chosen.select([layer])


def test_nan_in_the_scores_is_refused() -> None:
    layer = observation(Shape(2, 2, 4, 60, 5, 5), 0)
    assert layer.output_projection is not None
    layer.output_projection[0, 0] = float("nan")
    with pytest.raises(dkv.InvalidInputError, match="scores hold NaN"):
        dkv.policy("defensivekv", 0.2, window_size=4).select([layer])


@pytest.mark.usefixtures("unchecked_shapes")
def test_layers_that_are_not_of_one_prompt_are_refused() -> None:
    policy = dkv.policy("snapkv", 0.2, window_size=4)
    layer = observation(Shape(2, 2, 4, 60, 5, 5), 0)
    with pytest.raises(dkv.InvalidInputError, match="no observation"):
        policy.select([])
    for other in (observation(Shape(2, 2, 4, 61, 5, 5), 0), observation(Shape(2, 2, 4, 60, 5, 5), 0, rows=2)):
        with pytest.raises(dkv.InvalidInputError, match="differ in batch or tokens"):
            policy.select([layer, other])


@dataclass(frozen=True)
class _Scored:
    """A scorer of one's own that gives what it is told to."""

    importance: Tensor
    description = "given"
    sees = "nothing"
    has_window = True
    gives = frozenset({"levels"})

    def __call__(self, row: dkv.Observation, window_size: int) -> Iterator[Part]:
        yield Part(self.importance)


def test_minus_infinity_is_a_low_score_and_no_pad() -> None:
    importance = torch.rand(2, 1, 1, 268)
    importance[0, ..., :100] = float("-inf")
    policy = replace(dkv.policy("snapkv", 0.5), scorer=_Scored(importance), aggregation=Mean(1))
    (kept,) = policy.select([observation(Shape(h=2, g=1, w=32, t=300, d=8, v=8), seed=0)])
    assert kept.sum(-1).tolist() == [[150, 150]]


@pytest.mark.parametrize("importance", [torch.rand(3, 1, 1, 268), torch.rand(2, 1, 1, 301)])
def test_scores_of_other_shapes_are_refused(importance: Tensor) -> None:
    policy = replace(dkv.policy("snapkv", 0.5), scorer=_Scored(importance), aggregation=Mean(1))
    with pytest.raises(dkv.InvalidInputError, match="a scorer gives floating"):
        policy.select([observation(Shape(h=2, g=1, w=32, t=300, d=8, v=8), seed=0)])
