"""Bounds where caches are forked, reordered, cropped, refused or given odd rows."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model

BYTES, LAYERS, HEADS = 96 * 1024, 3, 2


def _cache(model: PreTrainedModel, name: str = "snapkv", **options: Any) -> dkv.EvictingCache:
    window = {"window_size": 8} if dkv.policy(name, 1.0).scorer.has_window else {}
    return dkv.EvictingCache(model, name, **({"interval": 8} | window | options))


def _evicted_bytes(cache: dkv.EvictingCache) -> int:
    return sum(int(cache.layers[index].nbytes) for index in cache.evicted_layers)


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.fork(),
        copy.deepcopy,
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
    ],
    ids=["fork", "deepcopy", "select", "reorder"],
)
def test_bytes_hold_after_the_batch_was_copied(
    model: PreTrainedModel, change: Callable[[dkv.EvictingCache], dkv.EvictingCache | None]
) -> None:
    cache = _cache(model, budget=f"{BYTES}B")
    for size in (200, 1, 1, 1):
        feed(model, cache, prompt(size))
    after = change(cache) or cache
    for number in range(20):
        feed(model, after, prompt(1, seed=number))
        assert _evicted_bytes(after) <= BYTES


def test_bytes_hold_where_inference_mode_comes_and_goes(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=f"{BYTES}B")
    with torch.inference_mode():
        for size in (200, 1, 1):
            model(prompt(size), use_cache=True, **{CACHE_ARGUMENT: cache})
    for number in range(20):
        feed(model, cache, prompt(1, seed=number))
        assert _evicted_bytes(cache) <= BYTES


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_bytes_hold_while_beams_are_reordered(model: PreTrainedModel, name: str) -> None:
    cache, most = _cache(model, name, budget=f"{2 * BYTES}B"), []
    hook = model.register_forward_hook(lambda *_: most.append(_evicted_bytes(cache)))
    generate(model, prompt(100), cache, num_beams=3, max_new_tokens=40)
    hook.remove()
    assert max(most) <= 3 * 2 * BYTES


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": True}])
def test_bytes_hold_once_drafts_were_verified(model: PreTrainedModel, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("assistant_model", False):
        options["assistant_model"] = tiny_model("llama", seed=5)
    cache = _cache(model, budget=f"{BYTES}B")
    output = generate(model, prompt(150), cache, max_new_tokens=60, do_sample=False, **options)
    assert _evicted_bytes(cache) <= BYTES
    # And it goes on, with drafts and without.
    longer = torch.cat((output, prompt(5, seed=3)), 1)
    output = generate(model, longer, cache, max_new_tokens=20, do_sample=False)
    generate(model, torch.cat((output, prompt(5, seed=4)), 1), cache, max_new_tokens=9, do_sample=False)
    assert _evicted_bytes(cache) <= BYTES


def test_bytes_hold_where_a_row_is_all_pads_for_many_chunks(model: PreTrainedModel) -> None:
    ids, mask = prompt(400, rows=2), torch.ones(2, 400, dtype=torch.long)
    mask[1, :370] = 0
    cache = dkv.EvictingCache(model, "snapkv", max_batch_bytes="192KiB", window_size=32)
    most = []
    hook = model.register_forward_hook(lambda *_: most.append(_evicted_bytes(cache)))
    dkv.prefill(model, cache, ids, attention_mask=mask, chunk_size=40)
    hook.remove()
    assert max(most) <= 192 * 1024


def test_what_is_cropped_again_and_again_leaves_nothing_behind(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=f"{BYTES}B")
    feed(model, cache, prompt(200))
    for number in range(30):
        cache.activate_past_recording()
        feed(model, cache, prompt(5, seed=number))
        cache.crop(-4)
        assert _evicted_bytes(cache) <= BYTES


def test_the_prefix_before_a_step_is_gone_after_it(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60, interval=1)
    feed(model, cache, prompt(100))
    before = [weakref.ref(cache.layers[layer].store.view.prefix) for layer in range(LAYERS)]
    feed(model, cache, prompt(1))
    assert [prefix() for prefix in before] == [None] * LAYERS


def test_no_graph_hangs_on_what_is_remembered() -> None:
    model = tiny_model("gpt_oss")
    dkv.enable(model)
    cache = _cache(model, "layer-defensivekv", max_entries=60, interval=4)
    for number in range(4):
        model(prompt(20, seed=number), use_cache=True, **{CACHE_ARGUMENT: cache})
    prefix = cache.layers[cache.evicted_layers[0]].store.view.prefix
    assert not prefix.facts.requires_grad
    assert not prefix.keys.requires_grad


# ---------------------------------------------------------------------- passes that were refused


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_next", "lfm2"])
def test_a_refused_pass_that_other_layers_have_stored_already_is_not_gone_on_from(architecture: str) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    cache = _cache(model, max_entries=500)
    feed(model, cache, prompt(60))
    with pytest.raises(dkv.InvalidInputError, match="exceed the model's maximum"):
        feed(model, cache, prompt(1000, seed=5))
    with pytest.raises(dkv.CacheError, match="broke off"):
        feed(model, cache, prompt(5, seed=7))
    cache.reset()
    fresh = _cache(model, max_entries=500)
    assert torch.equal(feed(model, cache, prompt(60)), feed(model, fresh, prompt(60)))


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ["h2o", "snapkv", "layer-defensivekv", "streaming-llm"])
def test_rows_that_end_before_others_are_read_in_chunks_as_alone(model: PreTrainedModel, name: str) -> None:
    ids, mask = prompt(60, rows=2), torch.ones(2, 60, dtype=torch.long)
    mask[1, 20:] = 0
    cache, alone = (_cache(model, name, budget=0.5, interval=None) for _ in range(2))
    dkv.prefill(model, cache, ids, attention_mask=mask, chunk_size=20)
    alone.expect(20)
    dkv.prefill(model, alone, ids[1:, :20])
    assert torch.equal(cache.lengths[:, 1], alone.lengths[:, 0])


def test_a_row_of_pads_alone_is_refused_at_the_prompts_end(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(dkv.InvalidInputError, match="row 1 of the batch holds pads only"):
        dkv.prefill(model, _cache(model, max_entries=60), prompt(100, rows=2), attention_mask=mask, chunk_size=50)


@pytest.mark.parametrize("rows", [[1], (1,), torch.tensor([1]), [False, True], torch.tensor([False, True])])
def test_rows_are_released_by_number_or_by_mask(model: PreTrainedModel, rows: Any) -> None:
    cache = _cache(model, max_entries=60, interval=4)
    feed(model, cache, prompt(100, rows=2))
    cache.release(rows)
    assert cache.released == {1}
    for number in range(20):
        feed(model, cache, prompt(1, rows=2, seed=number))
    assert [int(count) for count in cache.lengths.sum((0, 2))] == [56 * LAYERS * HEADS, 0]


@pytest.mark.parametrize("rows", [1, "ab", ["a"], [2], [-1], [True], 1.5])
def test_rows_that_are_none_are_refused(model: PreTrainedModel, rows: Any) -> None:
    cache = _cache(model, max_entries=60)
    feed(model, cache, prompt(100, rows=2))
    with pytest.raises(dkv.InvalidInputError, match=r"batch of 2|all 2 rows"):
        cache.release(rows)


def test_a_row_that_was_released_stays_so_in_a_fork_under_a_bound(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.3, interval=None)
    feed(model, cache, prompt(100, rows=2))
    cache.release([1])
    fork = cache.fork(max_entries=80, interval=4)
    for number in range(30):
        feed(model, fork, prompt(1, rows=2, seed=number))
    assert int(fork.lengths[:, 1].sum()) == 0


def test_one_criterion_serves_several_prompts(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60)
    criterion = dkv.ReleaseFinished(cache, list(range(128)))
    for seed in range(2):
        generate(model, prompt(100, rows=2, seed=seed), cache, stopping_criteria=[criterion], max_new_tokens=20)
        assert int(cache.lengths.sum()) == 0
        cache.reset()


# ---------------------------------------------------------------------- forks under a bound of their own


def test_a_fork_keeps_the_budget_and_the_bounds_that_there_were(model: PreTrainedModel) -> None:
    empty = _cache(model, budget=0.2, interval=None).fork(max_entries=150)
    feed(model, empty, prompt(200))
    assert int(empty.lengths.sum()) == 40 * LAYERS * HEADS

    halfway = _cache(model, budget=0.4, interval=None)
    halfway.expect(100)
    feed(model, halfway, prompt(50))
    fork = halfway.fork(max_entries=90)
    feed(model, fork, prompt(50, seed=1))
    assert int(fork.lengths.sum()) == 40 * LAYERS * HEADS

    sized = _cache(model, budget=f"{BYTES}B")
    feed(model, sized, prompt(100))
    wider = sized.fork(max_entries=500)
    for number in range(10):
        feed(model, wider, prompt(30, seed=number))
        feed(model, wider, prompt(1, seed=number))
    assert _evicted_bytes(wider) <= BYTES + 30 * LAYERS * HEADS * 128


def test_a_fork_of_a_fork_still_keeps_the_document(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.3, interval=None)
    feed(model, cache, prompt(100))
    kept = set(cache.kept_positions(0, 0, 0).tolist())
    twice = cache.fork(max_entries=80).fork(max_entries=90)
    for number in range(80):
        feed(model, twice, prompt(1, seed=number))
    assert kept <= set(twice.kept_positions(0, 0, 0).tolist())
    assert cache.fork(max_entries=80).report().full_bytes == cache.report().full_bytes > 0


def test_a_fork_can_be_cropped_only_as_far_as_it_has_heard(model: PreTrainedModel) -> None:
    cache = _cache(model, "h2o", budget=0.4, interval=None)
    feed(model, cache, prompt(100))
    feed(model, cache, prompt(10))
    with pytest.raises(dkv.CacheError, match="queries before them"):
        cache.fork(max_entries=120).crop(-3)


# ---------------------------------------------------------------------- words


def test_a_policy_that_keeps_everything_takes_no_bound(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.InvalidInputError, match="'full' keeps everything"):
        dkv.EvictingCache(model, "full", max_entries=100)


def test_drafts_may_come_with_an_announced_prompt(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.5, interval=None)
    cache.expect(100)
    generate(model, prompt(100), cache, prompt_lookup_num_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (prompt(20)[0], {}, "input_ids must be a tensor"),
        ([[1, 2]], {}, "input_ids must be a tensor"),
        (prompt(20), {"attention_mask": torch.ones(1, 19)}, "attention_mask must be a tensor"),
        (prompt(20, rows=2), {"attention_mask": torch.ones(1, 20)}, "attention_mask must be a tensor"),
    ],
)
def test_prompts_of_another_shape_are_refused(
    model: PreTrainedModel, ids: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dkv.InvalidInputError, match=message):
        dkv.prefill(model, _cache(model, budget=0.5, interval=None), ids, **options)


def test_no_other_cache_can_be_read_into(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.InvalidInputError, match="give an EvictingCache"):
        dkv.prefill(model, object(), prompt(20))  # type: ignore[arg-type]
