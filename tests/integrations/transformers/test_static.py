"""Caches whose decoding steps can be compiled. Compiled by "eager" where the graph is what counts; that is fast."""

from typing import Any

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

import defensivekv as dkv
from defensivekv import CacheError, InvalidInputError
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import ARCHITECTURES, feed, prompt, tiny_model
from tests.kernels.native.library import needs_library

# Compilers do not see through the run-time checks of shapes.
pytestmark = [
    needs_library,
    pytest.mark.usefixtures("unchecked_shapes"),
]

PROMPT = 150
QUICK = ("llama", "gemma2", "gpt_oss", "qwen3_next")
"""Plain, soft-capped and sliding, sinks, linear attention."""

OTHERS = ("lfm2", "llama4_text", "gemma4_text", "gemma3n_text", "gpt2", *(set(ARCHITECTURES) - set(QUICK)))


def caches(model: PreTrainedModel, count: int = 2, **options: Any) -> list[dkv.EvictingCache]:
    """A growing one, and static ones."""
    tokens = [None, *([40] * (count - 1))]
    return [dkv.EvictingCache(model, "layer-defensivekv", 0.4, static_tokens=room, **options) for room in tokens]


def step(
    model: PreTrainedModel, cache: dkv.EvictingCache, token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    logits: torch.Tensor = model(token, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    return logits


@pytest.mark.parametrize(
    "architecture", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(OTHERS))]
)
@torch.inference_mode()
def test_a_whole_step_is_one_graph_which_gives_what_a_growing_cache_gives(architecture: str) -> None:
    """Which is made once more, in general, for a second prompt of another length, and never again."""
    torch._dynamo.reset()
    model = tiny_model(architecture)
    dkv.enable(model)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    stats = torch._dynamo.utils.counters["stats"]
    graphs = [stats["unique_graphs"]]
    for length in (PROMPT, PROMPT + 41, PROMPT + 12):
        growing, static, eager = caches(model, 3)
        for cache in (growing, static, eager):
            feed(model, cache, prompt(length, rows=2))
            logits = feed(model, cache, prompt(5, rows=2, seed=3))[:, -1]
        for number in range(4):
            token = logits.argmax(-1, keepdim=True)
            positions = torch.full_like(token, length + 5 + number)
            logits = step(model, growing, token, positions)
            for one in (compiled(model, static, token, positions), feed(model, eager, token)[:, -1]):
                torch.testing.assert_close(one, logits, rtol=1e-4, atol=1e-4)
        assert growing.get_seq_length() == int(static.get_seq_length()) == int(eager.get_seq_length())
        graphs.append(stats["unique_graphs"])
    # transformers' static sliding layers count in numbers, for which there is a general graph at the second step.
    assert graphs[1] - graphs[0] <= (2 if _has_windows(growing) else 1)
    assert graphs[2] - graphs[1] <= 1
    assert graphs[3] == graphs[2]


def _has_windows(cache: dkv.EvictingCache) -> bool:
    return any(plan.kind in ("sliding_attention", "chunked_attention") for plan in cache._plans)


def compile_config(backend: str = "eager") -> CompileConfig:
    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("padded", [False, True])
def test_generate_compiles_its_steps_by_itself(padded: bool) -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    dkv.enable(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (PROMPT, PROMPT + 33):
        ids = prompt(length, rows=2)
        mask = torch.ones_like(ids)
        mask[0, :40] = 0 if padded else 1
        growing, static = caches(model)
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        expected = model.generate(ids, **{CACHE_ARGUMENT: growing}, **options)
        output = model.generate(ids, **{CACHE_ARGUMENT: static}, **options, compile_config=compile_config())
        assert torch.equal(output, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_compiler_gives_the_same_text() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    dkv.enable(model)
    growing, static = caches(model)
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(prompt(PROMPT), **{CACHE_ARGUMENT: growing}, **options)
    output = model.generate(
        prompt(PROMPT), **{CACHE_ARGUMENT: static}, **options, compile_config=compile_config("inductor")
    )
    assert torch.equal(output, expected)


@torch.inference_mode()
def test_forks_beams_crops_and_released_rows_are_those_of_a_growing_cache() -> None:
    model = tiny_model("qwen3")
    dkv.enable(model)
    growing, static = caches(model)
    outputs = []
    for cache in (growing, static):
        feed(model, cache, prompt(PROMPT, rows=2))
        feed(model, cache, prompt(3, rows=2, seed=1))
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        fork = cache.fork()
        fork.batch_repeat_interleave(2)
        parts = [feed(model, fork, prompt(2, rows=4, seed=2)), feed(model, cache, prompt(2, rows=2, seed=3))]
        cache.batch_select_indices(torch.tensor([1]))
        parts.append(feed(model, cache, prompt(1, seed=4)))
        outputs.append(torch.cat([part.flatten() for part in parts]))
        assert int(cache.get_seq_length()) == PROMPT + 5
        assert torch.equal(cache.kept_positions(0, 0, 0), growing.kept_positions(0, 0, 0))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_more_tokens_than_there_is_room_for_are_refused_before_any_is_stored() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.4, static_tokens=4)
    feed(model, cache, prompt(PROMPT))
    feed(model, cache, prompt(3, seed=1))
    with pytest.raises(CacheError, match="room for 4 tokens after its prompt, 3 are in it and 2 more came"):
        feed(model, cache, prompt(2, seed=1))
    assert int(cache.get_seq_length()) == PROMPT + 3
    feed(model, cache, prompt(1, seed=1))
    with pytest.raises(CacheError, match="make it with a larger static_tokens"):
        feed(model, cache, prompt(1, seed=1))


def test_generating_more_than_there_is_room_for_is_refused_in_compiled_steps_too() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.4, static_tokens=6)
    with pytest.raises(CacheError, match="room for 6 tokens"):
        model.generate(prompt(PROMPT), **{CACHE_ARGUMENT: cache}, max_new_tokens=20, compile_config=compile_config())


@torch.inference_mode()
def test_after_reset_it_takes_another_prompt() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    growing, static = caches(model)
    feed(model, static, prompt(PROMPT, rows=3, seed=9))
    static.reset()
    for cache in (growing, static):
        feed(model, cache, prompt(PROMPT))
    first, second = (feed(model, cache, prompt(2, seed=1)) for cache in (growing, static))
    torch.testing.assert_close(first, second)


@torch.inference_mode()
def test_a_prompt_is_not_read_by_compiled_code() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama")
    dkv.enable(model)
    _, static = caches(model)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="compiled steps come after the prompt"):
        compiled(model, static, prompt(PROMPT), torch.arange(PROMPT)[None])


def test_what_cannot_be_static_is_refused_by_name() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    with pytest.raises(InvalidInputError, match="static_tokens: steps under a bound"):
        dkv.EvictingCache(model, "layer-defensivekv", 0.4, static_tokens=9, max_entries=64)
    with pytest.raises(InvalidInputError, match="static_tokens 0 must be a positive integer"):
        dkv.EvictingCache(model, "layer-defensivekv", 0.4, static_tokens=0)
    odd = tiny_model("llama", head_dim=24)
    dkv.enable(odd)
    cache = dkv.EvictingCache(odd, "layer-defensivekv", 0.4, static_tokens=9)
    with pytest.raises(InvalidInputError, match="multiples of 16"), torch.inference_mode():
        feed(odd, cache, prompt(PROMPT))


def test_a_static_cache_says_that_it_can_be_compiled_and_counts_its_buffers() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    growing, static = caches(model)
    assert (growing.is_compileable, static.is_compileable) == (False, True)
    with torch.inference_mode():
        for cache in (growing, static):
            feed(model, cache, prompt(PROMPT))
    token = 2 * 16 * 2 * 4
    assert static.nbytes - growing.nbytes == 3 * (40 * token + 8)
