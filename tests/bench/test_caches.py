import pytest
import torch

from defensivekv.bench.caches import filled_evicting, filled_static, filled_stock, ragged_lengths
from defensivekv.bench.shapes import shape_config
from defensivekv.bench.workers.random_model import random_model
from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.transformers import enable


@pytest.mark.parametrize(("heads", "tokens", "budget"), [(8, 32768, 0.2), (2, 8, 1.0), (3, 100, 0.9), (5, 10, 0.1)])
def test_ragged_lengths_are_the_budget(heads: int, tokens: int, budget: float) -> None:
    lengths = ragged_lengths(heads, tokens, budget, torch.Generator().manual_seed(0))
    assert sum(lengths) == int(tokens * budget * heads)
    assert all(0 <= length <= tokens for length in lengths)


def test_every_cache_is_filled_and_goes_on_for_every_row() -> None:
    model = random_model(shape_config("tiny"), torch.float32, torch.device("cpu"), seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones(3, 1, dtype=torch.long)
    with torch.inference_mode():
        stock = filled_stock(model, 100, generator, batch=3)
        static = filled_static(model, 100, 4, generator, batch=3)
        assert stock.layers[0].keys.shape == (3, 2, 100, 16)
        assert static.layers[1].keys.shape == (3, 2, 104, 16)
        for cache in (stock, static):
            assert torch.isfinite(model(ids, cache=cache).logits).all()
            assert int(cache.get_seq_length()) == 101
        enable(model)
        ours = filled_evicting(model, 400, 0.25, 400, generator, batch=3)
        assert ours.lengths.shape == (2, 3, 2)
        assert (ours.lengths.sum(-1) == 200).all()
        assert len(ours.lengths[0].unique()) > 2, "heads hold different numbers"
        assert torch.isfinite(model(ids, cache=ours).logits).all()
        assert ours.get_seq_length() == 401


def test_layers_of_other_kinds_cannot_be_filled() -> None:
    config = shape_config("tiny")
    config.sliding_window, config.layer_types = 8, ["full_attention", "sliding_attention"]
    model = random_model(config, torch.float32, torch.device("cpu"), seed=0)
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        filled_stock(model, 10, torch.Generator())
