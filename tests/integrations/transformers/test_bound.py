"""A bound on the whole life of a sequence or a batch: it holds at every step, in every mode, or is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.bound import Limits
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model
from tests.integrations.transformers.test_steps import STEPPING

LAYERS, HEADS, WINDOW = 3, 2, 8


def _cache(model: PreTrainedModel, name: str = "layer-defensivekv", *args: Any, **options: Any) -> dkv.EvictingCache:
    if dkv.policy(name, 1.0).scorer.has_window:
        options = {"window_size": WINDOW} | options
    return dkv.EvictingCache(model, name, *args, **options)


def _entries(cache: dkv.EvictingCache) -> int:
    """Of all rows, layers and heads, tails counted."""
    tails = [int(layer.store.tail_length) for layer in cache.layers]
    return int(cache.lengths.sum()) + sum(tails) * int(cache.layers[0].batch_size) * HEADS


# ---------------------------------------------------------------------- it holds


@pytest.mark.parametrize("name", STEPPING)
def test_entries_are_bounded_at_every_step(model: PreTrainedModel, name: str) -> None:
    cache = _cache(model, name, max_entries=60, interval=7)
    most = []
    for number, size in enumerate([50, 90, *[1] * 120, 5, *[1] * 20]):
        feed(model, cache, prompt(size, seed=number))
        most.append(_entries(cache))
    assert max(most) <= 60 * LAYERS * HEADS
    assert max(most[100:]) > 52 * LAYERS * HEADS, "and used"
    assert cache.get_seq_length() == 285


@pytest.mark.parametrize("name", ["layer-defensivekv", "defensivekv", "h2o", "tova", "streaming-llm"])
@pytest.mark.parametrize("limit", ["96KiB", "200KiB", 123_456])
def test_bytes_are_bounded_at_every_step(model: PreTrainedModel, name: str, limit: str | int) -> None:
    cache = _cache(model, name, f"{limit}B" if isinstance(limit, int) else limit)
    size = int(dkv.Budget.parse(f"{limit}B" if isinstance(limit, int) else limit).amount)
    most = 0
    for number, chunk in enumerate([200, 150, *[1] * 150]):
        feed(model, cache, prompt(chunk, seed=number))
        most = max(most, cache.nbytes)
    assert size * 0.9 < most <= size


def test_a_batch_is_bounded_together_and_short_rows_leave_room_to_long_ones(model: PreTrainedModel) -> None:
    size, lengths, longest = 400_000, [20, 60, 300], 300
    cache = _cache(model, max_batch_bytes=size, interval=10)
    mask = torch.stack([torch.arange(longest + 60) >= longest - n for n in lengths]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    start = 0
    for length in [longest, *[1] * 60]:
        stop = start + length
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        feed(model, cache, prompt(length, rows=3, seed=start), **given)
        start = stop
        assert cache.nbytes <= size
    held = cache.lengths.sum((0, 2)).tolist()
    assert held[0] == 80 * LAYERS * HEADS, "a short row is whole"
    assert held[1] < held[2] + 2 * LAYERS * HEADS


@given(
    tokens=st.lists(st.integers(0, 500), min_size=1, max_size=6),
    each=st.none() | st.integers(1, 400),
    together=st.none() | st.integers(0, 1000),
)
def test_what_rows_may_hold_is_shared_out_evenly_and_wholly(
    tokens: list[int], each: int | None, together: int | None
) -> None:
    given_out = Limits(each, together, 8).of_rows(tokens)
    wanted = [count if each is None else min(each, count) for count in tokens]
    assert all(limit <= want for limit, want in zip(given_out, wanted, strict=True))
    if together is None or sum(wanted) <= together:
        assert given_out == wanted
        return
    assert together - len(tokens) < sum(given_out) <= together
    short = [limit for limit, want in zip(given_out, wanted, strict=True) if limit < want]
    assert max(given_out) <= min(short) + 1, "who gets less than it wants gets as much as anybody"


def test_finished_rows_give_their_memory_to_the_others(model: PreTrainedModel) -> None:
    cache = _cache(model, max_batch_bytes=200_000, interval=10)
    feed(model, cache, prompt(200, rows=2))
    even = cache.lengths.sum((0, 2)).tolist()
    held = cache.nbytes
    cache.release([0])
    assert cache.nbytes < held * 0.7
    alone = cache.fork()
    logits = feed(model, cache, prompt(1, rows=2))
    torch.testing.assert_close(logits[1], feed(model, alone, prompt(1, rows=2))[1])
    for number in range(200):
        feed(model, cache, prompt(1, rows=2, seed=number))
        assert cache.nbytes <= 200_000
    now = cache.lengths.sum((0, 2)).tolist()
    assert now[0] == 0
    assert now[1] > even[1] * 1.8


def test_generate_releases_rows_as_they_end(model: PreTrainedModel) -> None:
    ids = prompt(120, rows=4)
    plain = generate(model, ids, _cache(model, max_entries=100, interval=8), max_new_tokens=40)
    # A token that some row says early ends it.
    end = int(plain[1, 125])
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": end}
    expected = generate(model, ids, _cache(model, max_entries=100, interval=8), **options)
    cache = _cache(model, max_entries=100, interval=8)
    output = generate(model, ids, cache, stopping_criteria=[dkv.ReleaseFinished(cache, end)], **options)
    assert torch.equal(output, expected)
    ended = [end in row[120:].tolist() for row in output]
    assert ended[1]
    held = cache.lengths.sum((0, 2)).tolist()
    assert all((count == 0) == done for count, done in zip(held, ended, strict=True))


def test_rows_that_are_left_out_are_freed(model: PreTrainedModel) -> None:
    for cache in (_cache(model, max_entries=64), _cache(model, budget=0.3)):
        feed(model, cache, prompt(200, rows=4))
        held = cache.nbytes
        cache.batch_select_indices(torch.tensor([2]))
        assert cache.nbytes == held // 4
        feed(model, cache, prompt(1))


# ---------------------------------------------------------------------- every mode of generating

_MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "assisted": {"assistant": True},
    "in chunks": {"prefill_chunk_size": 48},
}


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_bound_that_is_never_reached_changes_nothing_however_often_it_steps(architecture: str, mode: str) -> None:
    options = dict(_MODES[mode])
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", seed=5)
        options["assistant_model"].generation_config.num_assistant_tokens = 4
    if mode == "in chunks" and architecture == "gemma3_text":
        options["prefill_chunk_size"] = 64
    windows: dict[str, Any] = {"sliding_window": 512} if architecture == "gemma3_text" else {}
    model = tiny_model(architecture, **windows)
    lengths = {"max_new_tokens": 40, "min_new_tokens": 40}
    torch.manual_seed(0)
    expected = generate(model, prompt(130), DynamicCache(config=model.config), **lengths, **options)
    dkv.enable(model)
    cache = _cache(model, max_entries=1000, interval=6)
    torch.manual_seed(0)
    assert torch.equal(generate(model, prompt(130), cache, **lengths, **options), expected)
    assert cache.get_seq_length() == 130 + 39
    first = cache.layers[cache.evicted_layers[0]].store
    assert first.tail_length <= 6 + 5


@pytest.mark.parametrize("mode", _MODES)
def test_every_mode_keeps_the_bound(model: PreTrainedModel, mode: str) -> None:
    options = dict(_MODES[mode])
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", seed=5)
    cache = _cache(model, max_entries=60, interval=6)
    generate(model, prompt(130), cache, max_new_tokens=60, min_new_tokens=60, **options)
    rows = cache.layers[0].batch_size
    assert _entries(cache) <= (60 + 5) * LAYERS * HEADS * rows
    assert int(cache.lengths.sum()) <= 54 * LAYERS * HEADS * rows


def test_forks_go_on_by_themselves_under_the_same_bound(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60, interval=6)
    feed(model, cache, prompt(150))
    left, right = cache.fork(), cache.fork()
    kept = cache.lengths
    first = [feed(model, left, prompt(1, seed=number)) for number in range(30)]
    feed(model, right, prompt(40, seed=9))
    assert torch.equal(cache.lengths, kept)
    again = [feed(model, cache, prompt(1, seed=number)) for number in range(30)]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert max(map(_entries, (left, right, cache))) <= 60 * LAYERS * HEADS


def test_a_reset_cache_takes_a_new_prompt(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.5, max_entries=60, interval=6)
    cache.expect(150)
    feed(model, cache, prompt(60))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    fresh = _cache(model, budget=0.5, max_entries=60, interval=6)
    assert torch.equal(feed(model, cache, prompt(100, seed=1)), feed(model, fresh, prompt(100, seed=1)))
    assert torch.equal(cache.lengths, fresh.lengths)


def test_the_report_says_what_may_be_held_and_what_is(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.5, max_entries=60, interval=6)
    feed(model, cache, prompt(100))
    for number in range(12):
        feed(model, cache, prompt(1, seed=number))
    report = cache.report()
    assert (report.bound, report.prompt_tokens, report.nbytes) == ("60 entries per head", (112,), cache.nbytes)
    assert report.entries_kept == int(cache.lengths.sum())
    assert "budget 0.5, at most 60 entries per head: kept" in str(report)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_entries": 12, "interval": 4}, "leaves 8 entries per head .*fewer than the 4 first tokens"),
        ({"max_entries": 0}, "max_entries 0 must be a positive integer"),
        ({"max_entries": 60, "interval": -1}, "interval -1 must be a positive integer"),
        ({"interval": 8, "budget": 0.5}, "interval is for caches with a bound"),
        ({"budget": 2000, "max_entries": 1000}, "budget 2000 entries per head is more than max_entries=1000"),
        ({"max_batch_bytes": "20%"}, "max_batch_bytes '20%' is no number of bytes"),
        ({"max_batch_bytes": -5}, "max_batch_bytes -5 is no number of bytes"),
        ({"max_entries": 60, "protect_window": False}, "parity mode"),
        ({"max_entries": 60, "budget": "auto:0.9"}, "is found once the whole prompt was seen"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused_at_once(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dkv.DefensiveKVError, match=message):
        _cache(model, **options)


@pytest.mark.parametrize("budget", ["12KiB", "1KiB"])
def test_bytes_below_what_always_stays_are_refused_before_the_first_attention(
    model: PreTrainedModel, budget: str
) -> None:
    cache = _cache(model, budget=budget)
    with pytest.raises(dkv.BudgetError, match=r"a bound of .* bytes for each sequence leaves"):
        feed(model, cache, prompt(100))
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_a_batch_of_more_rows_than_its_bound_has_room_for_is_refused(model: PreTrainedModel) -> None:
    cache = _cache(model, max_batch_bytes=200_000)
    with pytest.raises(dkv.BudgetError, match="for 16 sequences leaves"):
        feed(model, cache, prompt(100, rows=16))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kvzip", "wants the whole prompt"),
        ("expected-attention", "wants the whole prompt"),
        ("cake", "needs all queries at once"),
    ],
)
def test_methods_that_decide_once_are_refused_by_name(model: PreTrainedModel, name: str, reason: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=f"policy '{name}' cannot evict in steps.*{reason}"):
        _cache(model, name, "1MiB")
    with pytest.raises(dkv.InvalidInputError, match=f"policy '{name}' cannot evict in steps.*{reason}"):
        _cache(model, name, 0.5).expect(100)


def test_what_was_evicted_or_is_not_remembered_cannot_be_cropped_into(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60, interval=20)
    feed(model, cache, prompt(100))
    with pytest.raises(dkv.CacheError, match="only the last 0 came after the eviction"):
        cache.crop(-1)
    for number in range(12):
        feed(model, cache, prompt(1, seed=number))
    with pytest.raises(dkv.CacheError, match=r"queries before them.* are gone"):
        cache.crop(-3)
    assert cache.get_seq_length() == 112
    cache.activate_past_recording()
    feed(model, cache, prompt(3))
    cache.crop(-3)
    assert cache.get_seq_length() == 112


@pytest.mark.parametrize("length", [0, -3, 2.5, True])
def test_a_length_that_is_none_is_refused(model: PreTrainedModel, length: Any) -> None:
    with pytest.raises(dkv.InvalidInputError, match="must be a positive integer"):
        _cache(model, budget=0.5).expect(length)


def test_more_tokens_than_were_announced_are_refused(model: PreTrainedModel) -> None:
    cache = _cache(model, budget=0.5)
    cache.expect(100)
    feed(model, cache, prompt(60))
    with pytest.raises(dkv.InvalidInputError, match="110 tokens of a prompt that expect"):
        feed(model, cache, prompt(50))
    feed(model, cache, prompt(40))
    with pytest.raises(dkv.CacheError, match="holds a prompt already"):
        cache.expect(100)


def test_rows_that_the_batch_does_not_have_cannot_be_released(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60)
    feed(model, cache, prompt(100, rows=2))
    with pytest.raises(dkv.InvalidInputError, match=r"rows \[2\] are not all rows of a batch of 2"):
        cache.release([2])


def test_an_end_must_be_known_to_release_what_is_finished(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.InvalidInputError, match="give end_tokens"):
        dkv.ReleaseFinished(_cache(model, max_entries=60))


# ---------------------------------------------------------------------- a bound on what is stored already


@pytest.mark.parametrize("name", ["layer-defensivekv", "defensivekv", "snapkv", "h2o", "streaming-llm"])
def test_a_fork_under_a_bound_keeps_the_prompt_and_evicts_what_came_after(model: PreTrainedModel, name: str) -> None:
    cache = _cache(model, name, 40)
    feed(model, cache, prompt(150))
    kept = [set(cache.kept_positions(layer, 0, head).tolist()) for layer in range(LAYERS) for head in range(HEADS)]
    shared = cache.layers[0].store.view.prefix.keys.data_ptr()
    entries = 40 + 32 + 20
    fork = cache.fork(max_entries=entries, interval=6)
    assert fork.layers[0].store.view.prefix.keys.data_ptr() == shared, "nothing is copied before something goes"
    for number, size in enumerate([3, 30, *[1] * 60]):
        feed(model, fork, prompt(size, seed=number))
        assert _entries(fork) <= entries * LAYERS * HEADS
    held = [set(fork.kept_positions(layer, 0, head).tolist()) for layer in range(LAYERS) for head in range(HEADS)]
    assert all(before <= now for before, now in zip(kept, held, strict=True))
    assert any(now - before for before, now in zip(kept, held, strict=True))
    assert int(cache.lengths.sum()) == sum(map(len, kept))


def test_a_fork_of_a_bounded_cache_may_be_given_more_and_then_evicts_from_all(model: PreTrainedModel) -> None:
    cache = _cache(model, max_entries=60, interval=6)
    feed(model, cache, prompt(150))
    fork = cache.fork(max_entries=90, interval=6)
    for number in range(80):
        feed(model, fork, prompt(1, seed=number))
        assert _entries(fork) <= 90 * LAYERS * HEADS
    assert int(fork.lengths.sum()) > 75 * LAYERS * HEADS


@pytest.mark.parametrize("name", ["layer-defensivekv", "defensivekv", "snapkv"])
def test_a_bound_that_a_stored_prefix_exceeds_is_refused(model: PreTrainedModel, name: str) -> None:
    for cache in (_cache(model, name, 0.5), _cache(model, name, max_entries=120)):
        feed(model, cache, prompt(150))
        with pytest.raises(dkv.BudgetError, match=r"holds \d+ entries per head of its prompt .* compress the prompt"):
            cache.fork(max_entries=80)
        feed(model, cache.fork(max_entries=300), prompt(1))
    context_cache = _cache(model, name, 0.2)
    feed(model, context_cache, prompt(150))
    feed(model, context_cache, prompt(60, seed=1))
    with pytest.raises(dkv.BudgetError, match="and 60 tokens after it"):
        context_cache.fork(max_entries=80)
