"""Eviction in steps: what is read is what is held, what is held is what a slow oracle keeps, within the bound."""

from fractions import Fraction
from functools import cache as cached
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import feed, prompt, tiny_model
from tests.integrations.transformers.step_oracle import SteppedModel

LAYERS, HEADS, WINDOW = 3, 2, 8
STEPPING = [
    name for name in dkv.policies() if name not in ("full", "duo-attention", "cake", "expected-attention", "kvzip")
]


@cached
def _models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice, the second one enabled."""
    stock, enabled = tiny_model("llama"), tiny_model("llama")
    dkv.enable(enabled)
    return stock, enabled


def _held(cache: dkv.EvictingCache, layer: int, head: int, row: int = 0) -> set[int]:
    """Positions of prefix and tail."""
    store = cache.layers[cache.evicted_layers[layer]].store
    kept = set(cache.kept_positions(layer, row, head).tolist()) if store.view is not None else set()
    return kept | set(range(store.seen - store.tail_length, store.seen))


def _assert_alike(cache: dkv.EvictingCache, oracle: SteppedModel, *, across: bool) -> None:
    """All but entries of which the oracle says that they score the same. It goes on with those that we kept."""
    different: dict[int, list[float]] = {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            ours = torch.zeros_like(oracle.alive[layer][head])
            ours[sorted(_held(cache, layer, head))] = True
            places = (ours != oracle.alive[layer][head]).nonzero().flatten()
            different.setdefault(0 if across else layer, []).extend(oracle.scores[layer][head, places].tolist())
            oracle.alive[layer][head] = ours
    for scores in different.values():
        assert not scores or max(scores) <= min(scores) * (1 + 1e-3)


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(
    sizes=st.lists(st.integers(WINDOW, 90), min_size=1, max_size=6),
    last=st.integers(1, 60),
    percent=st.integers(12, 90),
    name=st.sampled_from(["defensivekv", "layer-defensivekv"]),
    seed=st.integers(0, 100),
)
def test_chunks_of_a_prompt_are_read_and_decided_on_as_by_the_oracle(
    sizes: list[int], last: int, percent: int, name: str, seed: int
) -> None:
    (stock, enabled), across = _models(), name == "layer-defensivekv"
    sizes = [*sizes, last]
    total = sum(sizes)
    share = max(Fraction(percent, 100), Fraction(WINDOW, total))
    cache = dkv.EvictingCache(enabled, dkv.policy(name, share, window_size=WINDOW))
    limit = share * total
    cache.expect(total)
    oracle = SteppedModel(stock, WINDOW)
    for chunk in prompt(total, seed=seed).split(sizes, dim=1):
        torch.testing.assert_close(feed(enabled, cache, chunk), oracle(chunk), rtol=2e-3, atol=2e-3)
        oracle.step(limit, across=across)
        _assert_alike(cache, oracle, across=across)
    for number in range(3):
        token = prompt(1, seed=number)
        torch.testing.assert_close(feed(enabled, cache, token), oracle(token), rtol=2e-3, atol=2e-3)
    heads = (1, HEADS * LAYERS) if across else (LAYERS, HEADS)
    assert int(cache.lengths.sum()) == heads[0] * floor(limit * heads[1])


@pytest.mark.filterwarnings("ignore:.*the whole text again")
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(
    first=st.integers(1, 150),
    turns=st.lists(st.integers(1, 40), max_size=3),
    max_entries=st.integers(24, 80),
    interval=st.integers(1, 11),
    name=st.sampled_from(["defensivekv", "layer-defensivekv"]),
)
def test_under_a_bound_prompt_turns_and_tokens_are_as_by_the_oracle(
    first: int,
    turns: list[int],
    max_entries: int,
    interval: int,
    name: str,
) -> None:
    (stock, enabled), across = _models(), name == "layer-defensivekv"
    options: dict[str, Any] = {"max_entries": max_entries, "interval": interval, "window_size": WINDOW}
    cache = dkv.EvictingCache(enabled, name, **options)
    oracle, tail, seen = SteppedModel(stock, WINDOW, sinks=4), 0, 0
    sizes = [first, *(size for turn in turns for size in (turn, *[1] * 15))]
    for chunk in prompt(sum(sizes), seed=first).split(sizes, dim=1):
        torch.testing.assert_close(feed(enabled, cache, chunk), oracle(chunk), rtol=2e-3, atol=2e-3)
        seen, tail = seen + chunk.shape[1], tail + chunk.shape[1]
        if seen == first or tail >= interval:
            oracle.step(Fraction(max_entries - interval), across=across)
            tail = 0
        _assert_alike(cache, oracle, across=across)
        held = sum(len(_held(cache, layer, head)) for layer in range(LAYERS) for head in range(HEADS))
        assert held <= max_entries * LAYERS * HEADS


@pytest.mark.parametrize("name", STEPPING)
def test_every_method_reads_exactly_what_it_holds(name: str) -> None:
    stock, enabled = _models()
    window: dict[str, Any] = {"window_size": 4} if dkv.policy(name, 1.0).scorer.has_window else {}
    cache = dkv.EvictingCache(enabled, name, 0.4, max_entries=72, interval=9, **window)
    cache.expect(150)
    oracle, seen = SteppedModel(stock, 4), 0
    for chunk in prompt(213).split([64, 50, 36, *[1] * 30, 12, *[1] * 21], dim=1):
        torch.testing.assert_close(feed(enabled, cache, chunk), oracle(chunk), rtol=2e-3, atol=2e-3)
        seen += chunk.shape[1]
        for layer in range(LAYERS):
            for head in range(HEADS):
                held = _held(cache, layer, head)
                assert held >= set(range(seen - 4, seen)), "the latest tokens stay"
                assert held >= set(range(4)), "and so do the first"
                oracle.alive[layer][head] = torch.tensor([token in held for token in range(seen)])
        assert int(cache.lengths.sum()) <= (72 - 9) * LAYERS * HEADS
        if seen == 150 and name != "pyramidkv":  # of which a layer may have had less before than it gets in the end
            assert 59 * LAYERS * HEADS < int(cache.lengths.sum()) <= 60 * LAYERS * HEADS


@pytest.mark.parametrize("name", ["defensivekv", "layer-defensivekv", "h2o", "tova", "lagkv", "chunkkv", "random"])
def test_a_padded_batch_in_chunks_and_under_a_bound_is_its_rows_one_at_a_time(
    name: str,
) -> None:
    _, enabled = _models()
    options: dict[str, Any] = {"window_size": 4} if dkv.policy(name, 1.0).scorer.has_window else {}
    lengths, chunks, longest = [100, 61, 20], [48, 32, 20], 100
    rows = [prompt(length + 30, seed=length) for length in lengths]
    ids = torch.cat(
        [
            torch.cat((torch.zeros(1, longest - n, dtype=torch.long), row), 1)
            for n, row in zip(lengths, rows, strict=True)
        ]
    )
    mask = torch.stack([torch.arange(longest + 30) >= longest - n for n in lengths]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = dkv.EvictingCache(enabled, name, 0.5, max_entries=60, interval=6, **options)
    cache.expect(longest)
    start, batch = 0, []
    for size in [*chunks, 11, *[1] * 19]:
        stop = start + size
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        batch.append(feed(enabled, cache, ids[:, start:stop], **given))
        start = stop
    logits = torch.cat(batch, 1)
    for number, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = dkv.EvictingCache(enabled, name, 0.5, max_entries=60, interval=6, **options)
        pads, pieces, start = longest - n, [], 0
        sizes, passed = [], 0
        for size in chunks:
            own = min(size, max(0, passed + size - pads))
            passed += size
            sizes += [own] if own else []
        alone.expect(n)
        if len(sizes) == 1:  # read at once, as its last chunk is all of it
            alone.expect(n + 1)
            assert alone.stepping is not None
            alone.stepping.expected = n
        for size in [*sizes, 11, *[1] * 19]:
            pieces.append(feed(enabled, alone, row[:, start : start + size]))
            start += size
        torch.testing.assert_close(logits[number, pads:], torch.cat(pieces, 1)[0], rtol=2e-3, atol=2e-3)
        for layer in range(LAYERS):
            for head in range(HEADS):
                shifted = {position - pads for position in _held(cache, layer, head, number)}
                assert shifted == _held(alone, layer, head)
