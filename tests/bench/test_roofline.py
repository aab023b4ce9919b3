import pytest
import torch

from defensivekv.bench.roofline import ReadProbe, floor_seconds, measure_roofline, prefill_flops


def test_floors_are_bytes_over_speed() -> None:
    assert floor_seconds(3 * 10**9, 20e9) == pytest.approx(0.15)
    assert floor_seconds(None, 20e9) is None


def test_a_prompts_operations_are_two_for_each_weight_and_token_and_causal_attention() -> None:
    # 100 weights of which 20 are embeddings, 10 tokens, 3 layers of 4 heads of 2: each token attends to 5 on average,
    # with two products of two operations for each of 8 elements.
    assert prefill_flops(100, 20, 10, 3, 8) == 2 * 80 * 10 + 3 * 10 * 5 * 2 * 2 * 8


def test_speeds_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defensivekv.bench.roofline._BUFFER", {"cpu": 2**22})
    monkeypatch.setattr("defensivekv.bench.roofline._MATRIX", {"cpu": 128})
    roofline = measure_roofline(torch.device("cpu"), torch.float32)
    assert min(roofline.read, roofline.copy, roofline.matmul) > 1e6
    probe = ReadProbe(torch.device("cpu"))
    assert probe.nbytes == 2**22
    assert 0 < probe.nbytes / probe.speed() < 1
