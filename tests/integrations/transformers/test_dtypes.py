"""Half precision: entries are stored in the model's dtype, and answers are as exact as the stock model's."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT = 260
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_some = pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])


def _turns() -> list[Tensor]:
    return [prompt(PROMPT), prompt(9, seed=1), *prompt(4, seed=2).split(1, dim=1)]


def _feed(model: PreTrainedModel, cache: object) -> Tensor:
    with torch.no_grad():
        logits = [model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for turn in _turns()]
    return torch.cat(logits[1:], 1)


def _masked(model: PreTrainedModel, cache: dkv.EvictingCache) -> Tensor:
    oracle = MaskedModel(model, cache, PROMPT)
    return torch.cat([oracle(turn) for turn in _turns()][1:], 1)


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits.float() - exact).abs().mean())


@on_some
@in_every_dtype
def test_with_the_full_budget_logits_are_as_exact_as_the_stock_models(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    stock = _feed(model, DynamicCache(config=model.config))
    dkv.enable(model)
    logits = _feed(model, dkv.EvictingCache(model, "defensivekv", 1.0))
    assert logits.dtype == dtype
    dkv.disable(model)
    exact = _feed(model.float(), DynamicCache(config=model.config))
    assert _error(logits, exact) <= 1.3 * _error(stock, exact) + 1e-5


@on_some
@in_every_dtype
def test_with_a_part_logits_are_as_exact_as_the_oracles(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    logits = _feed(model, cache)
    dkv.disable(model)
    assert cache.report().achieved == pytest.approx(0.3, abs=0.002)
    masked = _masked(model, cache)
    exact = _masked(model.float(), cache)
    assert _error(logits, exact) <= 1.3 * _error(masked, exact) + 1e-5


@in_every_dtype
def test_entries_are_stored_in_the_models_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.5)
    with torch.no_grad():
        model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: cache})
    entries = 3 * 2 * PROMPT // 2
    assert cache.nbytes == entries * (2 * 16 * dtype.itemsize + 4)
