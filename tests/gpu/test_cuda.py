"""On a GPU, what the other tests show on a CPU. `make gpu` runs them; elsewhere they are skipped.

DEFENSIVEKV_TEST_DEVICE names another device, such as cpu, which tries the tests themselves.
"""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.attention import attend, masked_attention, scatter_prefix
from defensivekv.cache import PrefixView, RaggedPrefix
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

DEVICE = torch.device(os.environ.get("DEFENSIVEKV_TEST_DEVICE", "cuda"))
REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "ops"
PROMPT, QUESTION = 300, 9
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [(0, 1), (1, 0, 1), (1,)], ids=["all rows", "shared", "some rows"])
@pytest.mark.parametrize("num_queries", [1, 5, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_equals_the_oracle(
    dtype: torch.dtype, rows: tuple[int, ...], num_queries: int, softcap: float | None
) -> None:
    torch.manual_seed(0)
    h, g, t, d = 3, 2, 700, 32
    share = torch.tensor([[0.0, 0.05, 0.9], [0.5, 1.0, 0.3]])
    kept = torch.rand(2, h, t) < share[..., None]
    keys, values = (torch.randn(2, h, t, d).to(DEVICE, dtype) for _ in range(2))
    view = PrefixView(RaggedPrefix.gather(keys, values, kept.to(DEVICE)), rows)
    b, x = len(rows), num_queries
    queries = torch.randn(b, h * g, x, d).to(DEVICE, dtype)
    tail_keys, tail_values = (torch.randn(b, h, x + 3, d).to(DEVICE, dtype) for _ in range(2))
    sinks = torch.randn(h * g).to(DEVICE)

    output = attend(queries, view, tail_keys, tail_values, scaling=0.2, softcap=softcap, sinks=sinks)

    all_keys, all_values, there = scatter_prefix(view, t)
    causal = torch.ones(x, x + 3, dtype=torch.bool, device=DEVICE).tril(3).expand(b, h, -1, -1)
    visible = torch.cat((there.unsqueeze(2).expand(-1, -1, x, -1), causal), -1)
    expected = masked_attention(
        queries,
        torch.cat((all_keys, tail_keys), 2),
        torch.cat((all_values, tail_values), 2),
        visible,
        0.2,
        softcap,
        sinks,
    )
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("name", ["gqa_flat", "mqa_sink", "layers_spiky"])
def test_kept_sets_are_those_of_the_authors(name: str) -> None:
    case = next(case for case in json.loads((REFERENCE / "index.json").read_text()) if case["name"] == name)
    tensors = {key: tensor.to(DEVICE) for key, tensor in load_file(REFERENCE / f"{name}.safetensors").items()}
    layers = range(case["num_layers"])

    observations = [
        dkv.Observation(
            queries=tensors[f"layer{layer}.q_window"][None],
            keys=tensors[f"layer{layer}.keys"][None],
            values=tensors[f"layer{layer}.values"][None],
            output_projection=tensors[f"layer{layer}.o_proj"],
        )
        for layer in layers
    ]
    policy = dkv.policy(case["method"].replace("_", "-"), case["budget"], protect_window=False)
    kept = policy.select(observations)
    for layer in layers:
        assert torch.equal(kept[layer][0].cpu(), tensors[f"layer{layer}.kept"].bool().cpu())


def _feed(model: PreTrainedModel, cache: dkv.EvictingCache, *turns: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for turn in turns]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_logits_equal_dense_attention_with_the_evicted_entries_masked(architecture: str) -> None:
    model = tiny_model(architecture).to(DEVICE)
    turns = [tokens.to(DEVICE) for tokens in (prompt(PROMPT), prompt(QUESTION, seed=1), *prompt(3, seed=2).split(1, 1))]
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    logits = torch.cat(_feed(model, cache, *turns)[1:], 1)
    dkv.disable(model)
    oracle = MaskedModel(model, cache, PROMPT)
    expected = torch.cat([oracle(turn) for turn in turns][1:], 1)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def test_a_left_padded_batch_equals_its_rows_one_at_a_time() -> None:
    model = tiny_model("llama").to(DEVICE)
    dkv.enable(model)
    pads = 47
    rows = [prompt(PROMPT, seed=0), prompt(PROMPT - pads, seed=1)]
    ids = torch.cat((rows[0], torch.cat((torch.zeros(1, pads, dtype=torch.long), rows[1]), 1))).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    batch = dkv.EvictingCache(model, "defensivekv", 0.3)
    together = model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: batch}, **options)
    for row, tokens in enumerate(rows):
        single = dkv.EvictingCache(model, "defensivekv", 0.3)
        alone = model.generate(
            tokens.to(DEVICE), attention_mask=torch.ones_like(tokens).to(DEVICE), **{CACHE_ARGUMENT: single}, **options
        )
        torch.testing.assert_close(together.scores[0][row], alone.scores[0][0], atol=1e-3, rtol=0)
        assert together.sequences[row, PROMPT:].tolist() == alone.sequences[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["layer-defensivekv", "defensivekv", "h2o", "streaming-llm"])
def test_chunks_and_a_bound_decide_as_on_a_cpu(name: str) -> None:
    sizes = [*[64] * 4, 44, *[1] * 60]
    kept = []
    for device in (torch.device("cpu"), DEVICE):
        model = tiny_model("llama").to(device)
        dkv.enable(model)
        cache = dkv.EvictingCache(model, name, 0.4, max_entries=150, interval=11)
        cache.expect(300)
        logits = _feed(model, cache, *prompt(360).to(device).split(sizes, dim=1))[-1]
        kept.append((logits.cpu(), cache.lengths))
    torch.testing.assert_close(kept[0][0], kept[1][0], atol=1e-3, rtol=0)
    assert torch.equal(kept[0][1], kept[1][1])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts the CUDA allocator's bytes")
def test_evicted_entries_are_freed() -> None:
    model = tiny_model("llama", num_key_value_heads=4, head_dim=64, max_position_embeddings=8192).to(DEVICE)
    dkv.enable(model)
    ids = prompt(6000).to(DEVICE)
    # Once before, so that what libraries allocate for themselves on first use does not count.
    _feed(model, dkv.EvictingCache(model, "layer-defensivekv", 0.2), ids[:, :600])

    def held(budget: float) -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, cache.nbytes

    for budget in (1.0, 0.2):
        allocated, counted = held(budget)
        assert allocated == pytest.approx(counted, rel=0.02, abs=2**17)
    full = 3 * 2 * 4 * 64 * 4 * 6000
    assert held(0.2)[0] < 0.22 * full
