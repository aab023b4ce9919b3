"""Answers of the evicting server, against stock vLLM's and against this package's own engine."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import defensivekv as dkv
from tests.integrations.vllm.serving.asking import TOLERANCE, complete, document, questions, without_end
from tests.integrations.vllm.serving.conftest import BUDGET
from tests.integrations.vllm.serving.server import Server

SHORT = ["a guest warns", "special number bitter kettle 03 46 . question one bitter kettle answer", "the loud scholar"]
"""No longer than the observation window, which stays."""

DIFFERENCE = 100 * TOLERANCE


def _scores(server: Server, prompt: str, **options: Any) -> tuple[str, list[float]]:
    with server.connect() as client:
        (choice,) = complete(client, prompt, logprobs=0, **options).choices
    return choice.text, choice.logprobs.token_logprobs


@pytest.mark.parametrize("prompt", SHORT)
def test_prompts_too_short_to_evict_from_are_answered_as_by_stock(stock: Server, evicting: Server, prompt: str) -> None:
    text, scores = _scores(evicting, prompt, **without_end(200))
    expected, expected_scores = _scores(stock, prompt, **without_end(200))
    assert text == expected
    assert scores == pytest.approx(expected_scores, abs=TOLERANCE)


@pytest.mark.parametrize("num_tokens", [300, 768, 1536])
def test_a_prompt_is_read_as_by_stock_and_evicted_after_it(stock: Server, evicting: Server, num_tokens: int) -> None:
    prompt = document(num_tokens)
    scores = [_scores(server, prompt, echo=True, **without_end(24))[1] for server in (evicting, stock)]
    # Of the prompt, whose first token has none, and of the first that is generated.
    read, expected = (given[1 : num_tokens + 1] for given in scores)
    assert read == pytest.approx(expected, abs=TOLERANCE)
    later, stock_later = (given[num_tokens + 1 :] for given in scores)
    assert later != pytest.approx(stock_later, abs=DIFFERENCE)


def test_questions_are_answered_as_by_the_transformers_engine(evicting: Server) -> None:
    model = AutoModelForCausalLM.from_pretrained(dkv.demo_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(dkv.demo_model())
    dkv.enable(model)
    for prompt, _ in [pair for length in (512, 1200) for pair in questions(length, seed=5, count=4)]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        cache = dkv.EvictingCache(model, "defensivekv", BUDGET)
        output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert _scores(evicting, prompt)[0].strip() == expected.strip()
