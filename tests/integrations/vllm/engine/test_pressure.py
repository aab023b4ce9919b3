"""More requests than fit: preempted, recomputed, aborted; each answered as if it were alone."""

import random
from typing import Any

import pytest

from tests.integrations.vllm.engine.conftest import Run
from tests.integrations.vllm.engine.prompts import check_same, prompt, prompts

POLICIES = [{"policy": "defensivekv", "budget": 0.2}, {"policy": "layer-defensivekv", "budget": 0.3}]
SMALL_BLOCKS = {"block_size": 32, "max_num_seqs": 24}
"""Requests outgrow a block often."""

CROWD = {**SMALL_BLOCKS, "max_model_len": 1024, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": 34}
CHUNKS = {"max_num_batched_tokens": 256}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("options", POLICIES)
def test_preempted_requests_go_on_as_if_they_had_not_been(run: Run, options: dict[str, Any], chunks: bool) -> None:
    draw = random.Random(0)
    lengths = [draw.choice((5, 20, 100, 300, 500, 700, 800)) for _ in range(20)]
    given = [
        prompt(length, seed=number, max_tokens=draw.choice((40, 150, 220))) for number, length in enumerate(lengths)
    ]
    engine = {**CROWD, **(CHUNKS if chunks else {})}
    crowd = run({"options": options, "engine": engine, "prompts": given})
    quiet = run({"options": options, "engine": engine, "prompts": given, "quiet": True})
    assert crowd["preempted"] >= 1
    assert quiet["preempted"] == 0
    check_same(crowd["outputs"], quiet["outputs"])
    for result in (crowd, quiet):
        assert (result["free"], result["states"], result["held"]) == (result["blocks"], 0, 0)


@pytest.mark.parametrize("options", POLICIES)
def test_a_soak_of_five_hundred_requests_with_aborts_ends_with_every_block_free(
    run: Run, options: dict[str, Any]
) -> None:
    draw = random.Random(1)
    given = [
        prompt(
            draw.choice((1, 8, 31, 33, 60, 150, 300, 450)),
            seed=number,
            max_tokens=draw.choice((1, 4, 12, 60)),
            abort_after=draw.choice((None, None, None, 1, 3, 9)),
        )
        for number in range(500)
    ]
    engine = {**SMALL_BLOCKS, "max_model_len": 512, "max_num_batched_tokens": 640, "num_gpu_blocks_override": 18}
    crowd = run({"options": options, "engine": engine, "prompts": given})
    quiet = run({"options": options, "engine": engine, "prompts": given, "quiet": True})
    assert crowd["preempted"] >= 10
    assert sum(output.get("finish") is None for output in crowd["outputs"]) >= 50
    check_same(crowd["outputs"], quiet["outputs"], near_ties=10)
    assert (crowd["free"], crowd["states"], crowd["held"]) == (crowd["blocks"], 0, 0)


def test_a_prompt_in_chunks_gives_its_blocks_back_when_it_is_read(run: Run) -> None:
    options = {"policy": "defensivekv", "budget": 0.1}
    given = prompts([1900], max_tokens=140)
    engine = {"max_num_batched_tokens": 256}
    result = run({"options": options, "engine": engine, "prompts": given})
    # Fourteen blocks hold the chunks before the last one; of them, two stay, and one more comes for what is generated.
    assert result["most_used"] == 14
    assert result["least_used_after_prompts"] == 2
    whole = run({"options": options, "prompts": given})
    assert whole["most_used"] == 3
