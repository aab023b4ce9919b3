"""The cache's own interface: rows, crops, resets, forks, and what it tells of itself."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import feed, prompt, tiny_model

PROMPT = 240


def _enabled(architecture: str = "llama") -> PreTrainedModel:
    model = tiny_model(architecture)
    dkv.enable(model)
    return model


def _with_prompt(model: PreTrainedModel, rows: int = 1, policy: str = "layer-defensivekv") -> dkv.EvictingCache:
    cache = dkv.EvictingCache(model, policy, 0.3)
    feed(model, cache, prompt(PROMPT, rows=rows))
    return cache


# ---------------------------------------------------------------------- what it tells


def test_lengths_and_kept_positions_tell_what_is_stored() -> None:
    model = _enabled()
    cache = _with_prompt(model, rows=2)
    lengths = cache.lengths
    assert lengths.shape == (3, 2, 2)
    assert lengths.sum((0, 2)).tolist() == [3 * 2 * PROMPT * 3 // 10] * 2
    for layer in range(3):
        for row in range(2):
            for head in range(2):
                positions = cache.kept_positions(layer, row, head)
                assert positions.dtype == torch.int32
                assert len(positions) == lengths[layer, row, head]
                assert bool((positions.diff() > 0).all())
                assert positions[-32:].tolist() == list(range(PROMPT - 32, PROMPT)), "the window is protected"


def test_lengths_tell_of_the_models_evicted_layers_in_order() -> None:
    cache = _with_prompt(_enabled("gemma3_text"))
    assert cache.evicted_layers == (1, 3)
    assert cache.lengths.shape == (2, 1, 2)


def test_before_the_prompt_nothing_is_told_as_kept() -> None:
    cache = dkv.EvictingCache(_enabled(), "defensivekv", 0.3)
    assert cache.lengths.shape == (0, 0, 0)
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    assert cache.report().achieved == 1.0
    assert "not evicted: no prompt has been read yet" in str(cache.report())
    with pytest.raises(dkv.CacheError, match="run the prompt"):
        cache.kept_positions(0, 0, 0)


def test_the_logical_length_counts_what_was_evicted_and_the_mask_what_is_left() -> None:
    model = _enabled()
    cache = _with_prompt(model)
    feed(model, cache, prompt(7))
    assert cache.get_seq_length() == PROMPT + 7
    assert cache.get_mask_sizes(5, 0) == (7 + 5, PROMPT)
    assert cache.batch_size == 1


def test_the_report_tells_the_request_the_result_and_the_bytes() -> None:
    cache = _with_prompt(_enabled(), rows=2)
    report = cache.report()
    assert (report.policy, report.budget) == ("layer-defensivekv", "0.3")
    assert report.prompt_tokens == (PROMPT, PROMPT)
    assert report.kept_whole == (False, False)
    assert (report.entries_seen, report.entries_kept) == (2 * 6 * PROMPT, 2 * 6 * PROMPT * 3 // 10)
    assert report.achieved == pytest.approx(0.3)
    text = str(report)
    assert text.count("full_attention") == 3
    assert "30.00%" in text
    assert "evicted, " in text


# ---------------------------------------------------------------------- crops and resets


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_cropped_tokens_are_as_if_they_had_never_been(architecture: str) -> None:
    model = _enabled(architecture)
    cache, plain = _with_prompt(model), _with_prompt(model)
    cache.activate_past_recording()
    feed(model, cache, prompt(9, seed=1))
    cache.crop(-4)
    feed(model, plain, prompt(9, seed=1)[:, :5])
    assert cache.get_seq_length() == PROMPT + 5
    after = feed(model, cache, prompt(3, seed=2)), feed(model, plain, prompt(3, seed=2))
    torch.testing.assert_close(*after, atol=1e-5, rtol=0)


def test_a_crop_into_what_was_evicted_is_refused_and_changes_nothing() -> None:
    model = _enabled()
    cache, plain = _with_prompt(model), _with_prompt(model)
    for each in (cache, plain):
        feed(model, each, prompt(3, seed=1))
    with pytest.raises(dkv.CacheError, match="only the last 3 came after the eviction"):
        cache.crop(-4)
    with pytest.raises(dkv.InvalidInputError, match="negative number"):
        cache.crop(PROMPT)
    torch.testing.assert_close(feed(model, cache, prompt(2)), feed(model, plain, prompt(2)), atol=0, rtol=0)


def test_a_crop_past_what_a_sliding_layer_remembers_is_refused_and_changes_nothing() -> None:
    model = tiny_model("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2)
    dkv.enable(model)
    cache, plain = _with_prompt(model), _with_prompt(model)
    for each in (cache, plain):
        feed(model, each, prompt(3, seed=1))
    with pytest.raises(dkv.CacheError, match="activate_past_recording"):
        cache.crop(-1)
    torch.testing.assert_close(feed(model, cache, prompt(2)), feed(model, plain, prompt(2)), atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_reset_cache_takes_a_new_prompt_as_a_new_cache_does(architecture: str) -> None:
    model = _enabled(architecture)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    feed(model, cache, prompt(PROMPT + 17, rows=2, seed=9))
    feed(model, cache, prompt(4, rows=2))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    fresh = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    for ids in (prompt(PROMPT), prompt(5)):
        torch.testing.assert_close(feed(model, cache, ids), feed(model, fresh, ids), atol=0, rtol=0)
    assert torch.equal(cache.lengths, fresh.lengths)


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_repeated_selected_and_reordered_rows_go_on_as_the_rows_they_came_from(architecture: str) -> None:
    model = _enabled(architecture)
    cache = _with_prompt(model, rows=3)
    feed(model, cache, prompt(4, rows=3, seed=1))
    alone = cache.fork()
    cache.batch_repeat_interleave(2)  # 0 0 1 1 2 2
    cache.batch_select_indices(torch.tensor([0, 1, 2, 5]))  # 0 0 1 2
    cache.batch_select_indices(torch.tensor([False, True, True, True]))  # 0 1 2
    cache.reorder_cache(torch.tensor([2, 0, 2, 1]))  # 2 0 2 1
    rows = [2, 0, 2, 1]
    assert cache.batch_size == 4
    ids = prompt(3, rows=3, seed=2)
    expected = feed(model, alone, ids)[rows]
    torch.testing.assert_close(feed(model, cache, ids[rows]), expected, atol=1e-5, rtol=0)
    assert torch.equal(cache.lengths, alone.lengths[:, rows])
    assert torch.equal(cache.kept_positions(0, 3, 1), alone.kept_positions(0, 1, 1))
    assert cache.report().entries_kept == int(cache.lengths.sum())


def test_the_batch_can_be_repeated_before_the_prompt_without_effect() -> None:
    model = _enabled()
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    cache.batch_repeat_interleave(3)
    feed(model, cache, prompt(PROMPT))
    assert cache.batch_size == 1


# ---------------------------------------------------------------------- forks


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_forks_and_their_origin_do_not_see_each_other(architecture: str) -> None:
    model = _enabled(architecture)
    cache = _with_prompt(model)
    feed(model, cache, prompt(3, seed=1))
    forks = [cache.fork(), copy.deepcopy(cache)]
    for seed, fork in enumerate(forks):
        feed(model, fork, prompt(6, seed=10 + seed))
    plain = _with_prompt(model)
    feed(model, plain, prompt(3, seed=1))
    torch.testing.assert_close(feed(model, cache, prompt(2)), feed(model, plain, prompt(2)), atol=0, rtol=0)


def test_a_fork_taken_before_the_prompt_takes_a_prompt_of_its_own() -> None:
    model = _enabled()
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    fork = cache.fork()
    feed(model, cache, prompt(PROMPT))
    feed(model, fork, prompt(PROMPT + 20, seed=3))
    assert fork.report().prompt_tokens == (PROMPT + 20,)
    assert cache.report().prompt_tokens == (PROMPT,)


def test_a_fork_outlives_its_origin() -> None:
    model = _enabled()
    cache = _with_prompt(model)
    fork = cache.fork()
    expected = feed(model, cache, prompt(4))
    del cache
    torch.testing.assert_close(feed(model, fork, prompt(4)), expected, atol=0, rtol=0)


def test_the_report_follows_the_rows_of_the_batch() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "snapkv", 0.5)
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, :100] = 0
    feed(model, cache, prompt(200, rows=2), attention_mask=mask)
    full = cache.report().full_bytes
    cache.batch_select_indices(torch.tensor([1]))
    assert (cache.report().prompt_tokens, cache.report().achieved) == ((200,), 0.5)
    assert cache.report().full_bytes == full * 200 // 300
    cache.batch_repeat_interleave(3)
    assert (cache.report().prompt_tokens, cache.report().achieved) == ((200,) * 3, 0.5)
    assert cache.report().kept_whole == (False,) * 3


def test_bytes_of_stock_layers_are_told_apart_from_what_the_budget_is_about() -> None:
    model = tiny_model("gpt_oss")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "snapkv", 0.2)
    feed(model, cache, prompt(300))
    report = cache.report()
    assert report.evicted_nbytes == report.full_bytes * 0.2
    assert report.nbytes > report.evicted_nbytes
    assert "more in layers that are not evicted" in str(report)
