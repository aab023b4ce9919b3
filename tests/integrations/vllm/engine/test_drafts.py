"""Speculative decoding: drafts that are verified, and taken back, over evicted prompts."""

from tests.integrations.vllm.engine.conftest import Run
from tests.integrations.vllm.engine.prompts import check_same, prompts

NGRAMS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}


def test_drafts_from_the_prompt_change_no_answer(run: Run) -> None:
    given = prompts([700, 333, 901, 20], max_tokens=60)
    for one in given:
        # Something to look up.
        one["tokens"] = one["tokens"][: len(one["tokens"]) // 2] * 2
    for options in ({"policy": "defensivekv", "budget": 0.2}, {"policy": "layer-defensivekv", "budget": 0.3}):
        plain = run({"options": options, "prompts": given})
        drafted = run({"options": options, "prompts": given, "engine": NGRAMS})
        assert drafted["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0
        assert drafted["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
        check_same(drafted["outputs"], plain["outputs"])
        assert drafted["free"] == drafted["blocks"]
