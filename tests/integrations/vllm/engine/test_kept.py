"""The same model, prompts, policy and budget in both engines: the same entries stay, and the same answers come."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.vllm.engine.conftest import Run
from tests.integrations.vllm.engine.prompts import TOLERANCE, Prompt, check_same, prompts

LENGTHS = (700, 333, 512, 901, 20, 1500)
WHOLE: dict[str, Any] = {}
CHUNKS = {"max_num_batched_tokens": 256}
"""Prompts are read in chunks, beside what the others generate."""


NEAR_TIES = 2


def near_ties(kept: list[list[list[int]]], expected: list[list[list[int]]]) -> int:
    """Entries that stay in one and not in the other. As many stay in both."""
    ours, theirs = (
        {
            (layer, head, place)
            for layer, heads in enumerate(layers)
            for head, places in enumerate(heads)
            for place in places
        }
        for layers in (kept, expected)
    )
    assert len(ours) == len(theirs)
    return len(ours - theirs)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(dkv.demo_model(), dtype=torch.float32).eval()
    dkv.enable(loaded)
    return loaded


@pytest.fixture(scope="module")
def given() -> list[Prompt]:
    return prompts(LENGTHS)


@torch.no_grad()
def transformers_engine(model: Any, policy: dkv.Policy, prompt: Prompt, generated: list[int]) -> tuple[Any, Any]:
    """Positions that stay of each head of each layer, and log-probabilities of what vLLM generated."""
    cache = dkv.EvictingCache(model, policy)
    output = model(torch.tensor([prompt["tokens"]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    layers = [layer.store.view.prefix for layer in cache.layers]
    positions = [[prefix.kept_positions(0, head).tolist() for head in range(4)] for prefix in layers]
    scores = []
    for token in generated:
        scores.append(float(output.logits[0, -1].log_softmax(-1)[token]))
        output = model(torch.tensor([[token]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    return positions, scores


CASES = [
    ({"policy": "defensivekv", "budget": 0.2}, WHOLE),
    ({"policy": "defensivekv", "budget": 0.2}, CHUNKS),
    ({"policy": "layer-defensivekv", "budget": 0.3}, WHOLE),
    ({"policy": "layer-defensivekv", "budget": 0.3}, CHUNKS),
    ({"policy": "snapkv", "budget": 120}, CHUNKS),
    ({"policy": "pyramidkv", "budget": "30%", "window_size": 16}, WHOLE),
    ({"policy": "streaming-llm", "budget": 0.2}, CHUNKS),
    ({"policy": "cake", "budget": 0.4}, CHUNKS),
]


@pytest.mark.filterwarnings("ignore::defensivekv.DefensiveKVWarning")
@pytest.mark.parametrize(("options", "engine"), CASES)
def test_what_stays_and_what_is_answered_are_those_of_the_transformers_engine(
    run: Run, model: Any, given: list[Prompt], options: dict[str, Any], engine: dict[str, Any]
) -> None:
    served = run({"options": options, "engine": engine, "prompts": given})
    policy = dkv.policy(options["policy"], options["budget"], window_size=options.get("window_size"))
    swapped = 0
    for prompt, output in zip(given, served["outputs"], strict=True):
        positions, scores = transformers_engine(model, policy, prompt, output["tokens"])
        kept = served["kept"][str(len(prompt["tokens"]))]
        pairs = near_ties([kept[str(layer)] for layer in range(len(positions))], positions)
        swapped += pairs
        assert output["logprobs"] == pytest.approx(scores, abs=0.02 if pairs else TOLERANCE)
    # Of some thousands, two entries whose scores differ in the last bits may change places.
    assert swapped <= NEAR_TIES
    assert served["free"] == served["blocks"]


def test_a_policy_that_keeps_everything_is_stock_vllm(run: Run, given: list[Prompt]) -> None:
    stock = run({"prompts": given})
    for engine in (WHOLE, CHUNKS):
        whole = run({"options": {"policy": "full"}, "engine": engine, "prompts": given})
        check_same(whole["outputs"], stock["outputs"])
    for options in ({"policy": "layer-defensivekv", "budget": 2000}, {"policy": "pyramidkv", "budget": 1.0}):
        # Layers share pages, and earlier chunks are in those of layers that are still to be read.
        check_same(run({"options": options, "engine": CHUNKS, "prompts": given})["outputs"], stock["outputs"])
    evicted = run({"options": {"policy": "defensivekv", "budget": 0.2}, "prompts": given})
    # The comparison tells them apart.
    with pytest.raises(AssertionError):
        check_same(evicted["outputs"], stock["outputs"])
