from types import SimpleNamespace

import pytest
import torch

import defensivekv as dkv
from defensivekv.integrations.vllm.plan import EvictionPlan
from defensivekv.integrations.vllm.state import RequestState

PLAN = EvictionPlan(dkv.policy("defensivekv", 0.5, window_size=4), layers=2, heads=3, groups=1, whole_up_to=100)


def test_what_stays_is_remembered_by_bits_and_recalled() -> None:
    state = RequestState(PLAN, 21)
    masks = [torch.rand(3, 21) < 0.5 for _ in range(2)]
    assert state.recall(0) is None
    state.remember(0, masks[0])
    assert not state.is_decided
    state.remember(1, masks[1])
    assert state.is_decided
    for layer, mask in enumerate(masks):
        recalled = state.recall(layer)
        assert recalled is not None
        assert torch.equal(recalled, mask)
    state.begin()
    assert state.is_decided


def test_a_state_lies_on_its_request_and_ends_with_it() -> None:
    request = SimpleNamespace(req_id="a", num_prompt_tokens=21)
    state = RequestState.of(request, PLAN)
    assert RequestState.of(request, PLAN) is state
    again = SimpleNamespace(req_id="a", num_prompt_tokens=21)
    assert RequestState.of(again, PLAN) is not state
    request.num_prompt_tokens = 22
    with pytest.raises(dkv.CacheError, match="grew from 21 to 22"):
        RequestState.of(request, PLAN)
