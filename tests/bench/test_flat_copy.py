import copy

import pytest
import torch

from defensivekv.bench.caches import filled_evicting
from defensivekv.bench.rivals import flat_copy
from defensivekv.bench.rivals.host import Host
from defensivekv.bench.subject import Subject
from defensivekv.errors import RivalError
from defensivekv.integrations.transformers import EvictingCache, enable


@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_its_logits_are_the_evicting_caches(batch: int) -> None:
    host = Host(Subject(None, "tiny", None, "float32", "cpu", 0))
    enable(host.model)
    ours = filled_evicting(host.model, 300, 0.4, 300, host.generator(0), batch)
    flat = flat_copy.FlatCopyCache.of(ours)
    flat_copy.register()
    before = flat.nbytes
    for step in range(3):
        ids = torch.full((batch, 1), step + 1)
        enable(host.model)
        expected = host.model(ids, cache=ours).logits
        with host.attention(flat_copy.ATTENTION_NAME):
            stored = flat.layers[0].keys
            logits = host.model(ids, cache=flat).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        assert flat.layers[0].keys.data_ptr() != stored.data_ptr(), "the scheme copies everything"
        assert len(flat.layers[0].keys) == len(stored) + 2 * batch
    assert flat.nbytes == before + 3 * 2 * batch * 2 * 2 * 16 * 4
    assert flat.get_seq_length() == 303


@torch.inference_mode()
def test_it_takes_over_what_a_prompt_left() -> None:
    host = Host(Subject(None, None, None, "auto", "cpu", 0))
    enable(host.model)
    ours = EvictingCache(host.model, "layer-defensivekv", 0.3)
    host.read(ours, 400, seed=0)
    flat = flat_copy.FlatCopyCache.of(copy.copy(ours))
    flat_copy.register()
    ids = torch.tensor([[5]])
    expected = host.model(ids, cache=ours).logits
    with host.attention(flat_copy.ATTENTION_NAME):
        torch.testing.assert_close(host.model(ids, cache=flat).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RivalError, match="just evicted"):
        flat_copy.FlatCopyCache.of(ours)
    with pytest.raises(RivalError, match="one token"), host.attention(flat_copy.ATTENTION_NAME):
        host.model(torch.tensor([[5, 6]]), cache=flat)
