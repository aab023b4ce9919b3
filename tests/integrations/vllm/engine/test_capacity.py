"""Memory is really free: what is not kept takes no block, so more requests run at once."""

from tests.integrations.vllm.engine.conftest import Run
from tests.integrations.vllm.engine.prompts import prompts

POOL = {"max_num_seqs": 32, "max_num_batched_tokens": 2100, "num_gpu_blocks_override": 33}
"""Thirty-two blocks of 128 tokens."""


def test_at_a_fifth_four_times_as_many_long_requests_run_at_once(run: Run) -> None:
    given = prompts([1600] * 24, max_tokens=20)
    stock = run({"engine": POOL, "prompts": given})
    evicting = run({"engine": POOL, "prompts": given, "options": {"policy": "defensivekv", "budget": 0.2}})
    assert stock["most_running"] == 2
    # Of 1,600 tokens, 320 stay: with those that are generated, in 3 blocks.
    assert evicting["most_running"] == 32 // 3
    assert evicting["preempted"] == 0
    assert evicting["most_used"] == 30
    assert "32 blocks of 128 tokens hold, at once, prompts of 2,048: 8 (1)" in evicting["log"]
