"""Queries turned back to what they were before the model rotated them, on every architecture."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.rotary import ModelRotary
from defensivekv.policies import Policy
from defensivekv.policies.scored import ScoredLayer
from tests.integrations.transformers.models import ARCHITECTURES, feed, prompt, tiny_model


def _before_rotation(model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """The queries that each layer gives to its rotation; layers that do not rotate are left out."""
    seen: dict[int, Tensor] = {}
    current: list[int] = []
    attentions = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    file = sys.modules[type(attentions[0]).__module__]
    rotate = file.apply_rotary_pos_emb

    def watching(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[current[-1]] = q
        return rotate(q, k, *args, **kwargs)

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        current.append(module.layer_idx)

    hooks = [module.register_forward_pre_hook(entering, with_kwargs=True) for module in attentions]
    with monkeypatch.context() as patch:
        patch.setattr(file, "apply_rotary_pos_emb", watching)
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def _observed(model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[dkv.Observation]:
    observations: list[dkv.Observation] = []
    score = Policy.score

    def watching(self: Policy, observation: dkv.Observation, **kwargs: Any) -> ScoredLayer:
        observations.append(observation)
        return score(self, observation, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "score", watching)
        feed(model, dkv.EvictingCache(model, "expected-attention", 0.5), ids)
    return observations


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_unrotated_queries_are_those_before_the_rotation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(name), prompt(60, rows=2)
    before = _before_rotation(model, ids, monkeypatch)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "expected-attention", 0.5)
    observations = _observed(model, ids, monkeypatch)
    assert len(observations) == len(cache.evicted_layers)
    for layer, observation in zip(cache.evicted_layers, observations, strict=True):
        rotary = observation.rotary
        assert isinstance(rotary, ModelRotary)
        assert rotary.row(1, None).positions.tolist() == list(range(60))
        for row in range(2):
            alone = rotary.row(row, None)
            unrotated = alone.unrotate(observation.queries[row], alone.positions)
            expected = before.get(layer, observation.queries)[row]
            torch.testing.assert_close(unrotated, expected, rtol=1e-4, atol=1e-5)
            again = torch.stack(
                [alone.rotate_mean(unrotated[:, [place]], alone.positions[[place]]) for place in (0, 7, 59)], 1
            )[:, :, 0]
            torch.testing.assert_close(again, observation.queries[row][:, [0, 7, 59]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_mean_rotation_is_the_mean_of_the_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    rotary = _observed(model, prompt(40), monkeypatch)[0].rotary
    assert isinstance(rotary, ModelRotary)
    vectors, positions = torch.randn(3, 5, 16), torch.arange(40, 52)
    each = torch.stack([rotary.rotate_mean(vectors, position[None]) for position in positions])
    torch.testing.assert_close(rotary.rotate_mean(vectors, positions), each.mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_leave_the_pads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), prompt(60, rows=2)
    dkv.enable(model)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    observations: list[dkv.Observation] = []
    score = Policy.score

    def watching(self: Policy, observation: dkv.Observation, **kwargs: Any) -> ScoredLayer:
        observations.append(observation)
        return score(self, observation, **kwargs)

    cache = dkv.EvictingCache(model, "expected-attention", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "score", watching)
        feed(model, cache, ids, attention_mask=mask, position_ids=places)
    rows = list(observations[0].rows())
    assert rows[0].rotary is not None
    assert rows[1].rotary is not None
    assert rows[0].rotary.positions.tolist() == list(range(60))
    assert rows[1].rotary.positions.tolist() == list(range(40))
    alone = dkv.EvictingCache(model, "expected-attention", 0.5)
    feed(model, alone, ids[1:, 20:])
    for layer in range(3):
        for head in range(2):
            kept = cache.kept_positions(layer, 1, head) - 20
            assert torch.equal(kept, alone.kept_positions(layer, 0, head))


def test_a_model_that_rotates_in_its_own_way_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    monkeypatch.delattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb")
    attention = model.model.layers[0].self_attn
    rotary = ModelRotary(model, attention, "full_attention", torch.arange(5)[None])
    with pytest.raises(dkv.UnsupportedModelError, match="LlamaAttention rotates its queries in a way of its own"):
        rotary.unrotate(torch.randn(2, 5, 16), torch.arange(5))


@torch.no_grad()
def test_positions_in_several_dimensions_have_no_rotation_and_h2o_asks_for_none() -> None:
    model, ids = tiny_model("llama"), prompt(60)
    dkv.enable(model)
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def with_axes(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **(kwargs | {"position_ids": torch.arange(60).expand(3, 1, 60)}))

    attention.forward = with_axes
    cache = dkv.EvictingCache(model, "h2o", 0.5)
    feed(model, cache, ids)
    assert int(cache.lengths.sum()) == 3 * 2 * 30
    with pytest.raises(dkv.InvalidInputError, match="positions in one dimension"):
        feed(model, dkv.EvictingCache(model, "expected-attention", 0.5), ids)
