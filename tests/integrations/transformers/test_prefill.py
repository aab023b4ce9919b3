"""Prompts that are read twice, or in chunks: what is scored, what is left behind, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import defensivekv as dkv
from defensivekv.policies.scoring import Reconstruction
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel
from tests.integrations.transformers.tokenizers import small_tokenizer

T = 60


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return small_tokenizer()


def _kvzip(model: PreTrainedModel, budget: float, chunk_size: int, **options: object) -> dkv.EvictingCache:
    policy = dkv.policy("kvzip", budget, scoring=Reconstruction(chunk_size), **options)  # type: ignore[arg-type]
    return dkv.EvictingCache(model, policy)


def _repetition(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Tensor:
    asked = tokenizer("\n\nRepeat the previous context exactly.", add_special_tokens=False)["input_ids"]
    return torch.cat((torch.tensor([asked]).expand(len(ids), -1), ids), 1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_what_stays_is_what_the_stock_models_weights_say(architecture: str, tokenizer: PreTrainedTokenizerBase) -> None:
    # One chunk, whose softmax is that of the whole text.
    ids = prompt(T, rows=2)
    eager = tiny_model(architecture)
    eager.set_attn_implementation("eager")
    text = torch.cat((ids, _repetition(tokenizer, ids)), 1)
    weights = eager(text, output_attentions=True).attentions
    model = tiny_model(architecture)
    dkv.enable(model)
    cache = _kvzip(model, 0.3, T)
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    for row in range(2):
        heads = [weights[layer][row, :, T:, :T].unflatten(0, (2, -1)) for layer in cache.evicted_layers]
        scores = torch.stack([of_layer.amax((1, 2)) for of_layer in heads])
        scores[..., :4] = 2.0
        count = int(0.3 * scores.numel())
        expected = torch.zeros(scores.numel(), dtype=torch.bool)
        expected[scores.flatten().topk(count).indices] = True
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for layer in range(len(kept)):
            for head in range(2):
                kept[layer, head, cache.kept_positions(layer, row, head)] = True
        assert int(kept.sum()) == count
        threshold = scores.flatten().topk(count).values[-1]
        clear = (scores - threshold).abs() > 1e-5
        assert torch.equal(kept[clear], expected.view_as(kept)[clear])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("chunk_size", [7, 25, 100])
def test_nothing_is_left_of_the_repetition(
    architecture: str, chunk_size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What follows reads the kept entries of one reading, and the sliding and linear layers of one reading."""
    model, ids, question = tiny_model(architecture), prompt(T), prompt(5, seed=1)
    dkv.enable(model)
    cache = _kvzip(model, 0.5, chunk_size)
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    assert cache.get_seq_length() == T
    assert cache.report().prompt_tokens == (T,)
    assert int(cache.lengths.sum()) == cache.lengths.numel() * T // 2
    oracle = MaskedModel(tiny_model(architecture), cache, T)
    oracle(ids)
    torch.testing.assert_close(feed(model, cache, question), oracle(question), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_read_prompt_goes_on_with_generate_and_forks(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T)
    dkv.enable(model)
    cache = _kvzip(model, 0.5, 32)
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    whole = torch.cat((ids, prompt(3, seed=2)), 1)
    first = generate(model, whole, cache.fork())
    assert torch.equal(first, generate(model, whole, cache.fork()))


@torch.no_grad()
def test_chunks_of_one_size_decide_as_the_pieces_of_the_prompt_do(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T)
    dkv.enable(model)
    whole, pieces = _kvzip(model, 0.5, T), _kvzip(model, 0.5, 20)
    for cache in (whole, pieces):
        dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    assert int(whole.lengths.sum()) == int(pieces.lengths.sum()) == 3 * 2 * T // 2
    assert not torch.equal(whole.lengths, pieces.lengths)


@torch.no_grad()
def test_other_policies_and_whole_budgets_are_read_once(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T)
    dkv.enable(model)
    calls: list[int] = []

    def count(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        calls.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(count, with_kwargs=True)
    dkv.prefill(model, dkv.EvictingCache(model, "snapkv", 0.6), ids)
    dkv.prefill(model, dkv.EvictingCache(model, "kvzip", 1.0), ids)
    assert calls == [T, T]
    dkv.prefill(model, _kvzip(model, 0.5, 40), ids, tokenizer=tokenizer)
    assert len(calls) == 5
    assert calls[3] > 40


def test_one_reading_of_a_policy_that_wants_two_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T)
    dkv.enable(model)
    cache = _kvzip(model, 0.5, 32)
    with pytest.raises(dkv.InvalidInputError, match=r"read twice.*prefill.*or use defensivekv\.compress"):
        generate(model, ids, cache)
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    assert int(cache.lengths.sum()) == 3 * 2 * T // 2


def test_what_cannot_be_repeated_is_refused_before_it_is_read(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T, rows=2)
    dkv.enable(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = _kvzip(model, 0.5, 32)
    with pytest.raises(dkv.InvalidInputError, match="pass the tokenizer"):
        dkv.prefill(model, cache, ids)
    with pytest.raises(dkv.InvalidInputError, match="rows of one length"):
        dkv.prefill(model, cache, ids, attention_mask=mask, tokenizer=tokenizer)
    with pytest.raises(dkv.InvalidInputError, match="exceed the model's 1024 positions"):
        dkv.prefill(model, _kvzip(model, 0.5, 600), prompt(600), tokenizer=tokenizer)
    assert cache.get_seq_length() == 0
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    with pytest.raises(dkv.CacheError, match="holds a prompt already"):
        dkv.prefill(model, cache, ids, tokenizer=tokenizer)


def test_a_reading_that_breaks_off_leaves_a_cache_that_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    model, ids = tiny_model("llama"), prompt(T)
    dkv.enable(model)
    cache = _kvzip(model, 0.5, 32)

    def fail(module: object, args: object) -> None:
        if cache.repeats is not None:
            raise RuntimeError("power cut")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="power cut"):
        dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    hook.remove()
    with pytest.raises(dkv.CacheError):
        feed(model, cache, prompt(3))
    cache.reset()
    dkv.prefill(model, cache, ids, tokenizer=tokenizer)
    assert int(cache.lengths.sum()) == 3 * 2 * T // 2


@torch.no_grad()
def test_a_padded_batch_is_read_as_its_rows_and_goes_on_as_they_do(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    rows = [prompt(T), prompt(T - 17, seed=1)]
    ids = torch.cat((rows[0], torch.nn.functional.pad(rows[1], (17, 0))))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together = dkv.EvictingCache(model, "snapkv", 0.5, window_size=8)
    dkv.prefill(model, together, ids, attention_mask=mask)
    question = prompt(3, rows=2, seed=2)
    whole = torch.cat((ids, question), 1)
    sequences = generate(model, whole, together, attention_mask=torch.cat((mask, torch.ones_like(question)), 1))
    for number, row in enumerate(rows):
        alone = dkv.EvictingCache(model, "snapkv", 0.5, window_size=8)
        dkv.prefill(model, alone, row)
        expected = generate(model, torch.cat((row, question[number : number + 1]), 1), alone)
        assert torch.equal(sequences[number, -4:], expected[0, -4:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["kvzip", "expected-attention"])
def test_rotations_that_change_with_the_length_are_refused_and_left_alone(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    model = tiny_model("llama", max_position_embeddings=32, rope_parameters=rope)
    before = model(prompt(T)).logits
    dkv.enable(model)
    with pytest.raises(dkv.UnsupportedModelError, match="frequencies that change with the length"):
        dkv.prefill(model, dkv.EvictingCache(model, name, 0.5), prompt(T), tokenizer=tokenizer)
    dkv.disable(model)
    torch.testing.assert_close(model(prompt(T)).logits, before)


# ---------------------------------------------------------------------- in chunks


@pytest.mark.parametrize("chunk_size", [37, 64, 299])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
def test_chunks_without_eviction_say_what_one_reading_says(architecture: str, chunk_size: int) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    whole, chunked = (dkv.EvictingCache(model, "full") for _ in range(2))
    dkv.prefill(model, whole, prompt(300))
    dkv.prefill(model, chunked, prompt(300), chunk_size=chunk_size)
    torch.testing.assert_close(
        feed(model, chunked, prompt(5, seed=1)), feed(model, whole, prompt(5, seed=1)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["defensivekv", "layer-defensivekv", "h2o", "knorm"])
def test_a_chunk_as_long_as_the_prompt_is_one_reading(name: str) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    whole, chunked = (dkv.EvictingCache(model, name, 0.3) for _ in range(2))
    dkv.prefill(model, whole, prompt(300))
    dkv.prefill(model, chunked, prompt(300), chunk_size=300)
    assert torch.equal(whole.lengths, chunked.lengths)
    assert all(
        torch.equal(whole.kept_positions(layer, 0, head), chunked.kept_positions(layer, 0, head))
        for layer in range(3)
        for head in range(2)
    )


def test_chunks_leave_nothing_behind_that_only_they_needed() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    whole, chunked = (dkv.EvictingCache(model, "layer-defensivekv", 0.3) for _ in range(2))
    dkv.prefill(model, whole, prompt(300))
    dkv.prefill(model, chunked, prompt(300), chunk_size=64)
    assert whole.nbytes == chunked.nbytes
    assert chunked.report().achieved == whole.report().achieved
    assert chunked.report().shares == whole.report().shares
    feed(model, chunked, prompt(40, seed=1))
    assert chunked.layers[0].store.tail_length == 40, "a later turn is kept whole"


def test_a_padded_batch_in_chunks_is_its_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    lengths, longest = [200, 90], 200
    rows = [prompt(length, seed=length) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    batch = dkv.EvictingCache(model, "layer-defensivekv", 0.4)
    dkv.prefill(model, batch, ids, attention_mask=mask, chunk_size=50)
    alone = dkv.EvictingCache(model, "layer-defensivekv", 0.4)
    alone.expect(90)  # of which the batch's chunks show the last 40 and the 50 before
    for chunk in rows[1].split([40, 50], dim=1):
        feed(model, alone, chunk)
    for layer in range(3):
        for head in range(2):
            shifted = batch.kept_positions(layer, 1, head) - 110
            assert torch.equal(shifted, alone.kept_positions(layer, 0, head))
    step = {
        "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1),
        "position_ids": torch.tensor([[200], [90]]),
    }
    together = feed(model, batch, prompt(1, rows=2), **step)
    torch.testing.assert_close(together[1], feed(model, alone, prompt(1, rows=2)[1:])[0], rtol=1e-3, atol=1e-4)


def test_under_a_bound_a_document_is_read_in_chunks_without_being_asked_to() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    dkv.enable(model)
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    dkv.prefill(model, dkv.EvictingCache(model, "defensivekv", max_entries=200), prompt(1200))
    dkv.prefill(model, dkv.EvictingCache(model, "defensivekv", 0.5), prompt(1200))
    hook.remove()
    assert seen == [512, 512, 176, 1200]


@pytest.mark.parametrize(
    ("policy", "chunk_size", "message"),
    [
        ("layer-defensivekv", 20, "chunk_size 20 is less than the window of 32"),
        ("layer-defensivekv", 0, "chunk_size 0 must be a positive integer"),
        ("layer-defensivekv", 64.0, "chunk_size 64.0 must be a positive integer"),
        ("cake", 64, "'cake' cannot evict in steps"),
        ("kvzip", 64, "'kvzip' cannot evict in steps"),
    ],
)
def test_chunks_that_nothing_can_be_decided_from_are_refused(
    tokenizer: PreTrainedTokenizerBase, policy: str, chunk_size: Any, message: str
) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, policy, 0.3)
    with pytest.raises(dkv.InvalidInputError, match=message):
        dkv.prefill(model, cache, prompt(300), tokenizer=tokenizer, chunk_size=chunk_size)
    assert cache.get_seq_length() == 0
