"""H2O, TOVA and StreamingLLM while tokens are generated, each against a dense oracle of its own rule."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import defensivekv as dkv
from tests.integrations.transformers.models import feed, prompt, tiny_model
from tests.integrations.transformers.step_oracle import SteppedModel

LAYERS, HEADS, SINKS = 3, 2, 4


class _Tova(SteppedModel):
    """The last token's attention, averaged over the heads of a layer; the same positions stay in all of them."""

    def _scores(self, index: int, limit: Fraction) -> Tensor:
        alive, keys = self.alive[index], self.keys[index]
        weights = _attention(self.queries[index][:, -1:], keys, alive)[:, 0].masked_fill(~alive, -math.inf)
        rank = weights.mean(0)
        rank[: self.sinks], rank[-1] = math.inf, math.inf
        rank = rank.masked_fill(~alive[0], -math.inf)
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept[rank.topk(min(len(rank), int(limit))).indices] = True
        return torch.where(kept & alive[0], 1.0, -math.inf).expand(alive.shape)


class _H2O(SteppedModel):
    """Attention summed up over all queries so far; half of what stays of a head are its latest."""

    heard = 0

    def _scores(self, index: int, limit: Fraction) -> Tensor:
        alive, queries, keys = self.alive[index], self.queries[index], self.keys[index]
        t = alive.shape[1]
        new = _attention(queries[:, self.heard :], keys, alive).sum(1)
        before = self.sums.get(index, torch.zeros(len(alive), 0))
        self.sums[index] = torch.nn.functional.pad(before, (0, t - before.shape[1])) + new
        if index == LAYERS - 1:
            self.heard = t
        scores = torch.full(alive.shape, -math.inf)
        for head, row in enumerate(self.sums[index]):
            order = alive[head].nonzero().flatten()
            latest = set(order[-max(8, math.floor(limit / 2)) :].tolist())
            first = {place for place in range(self.sinks) if alive[head, place]}
            rest = [
                place
                for place in row.argsort(descending=True).tolist()
                if place in set(order.tolist()) - latest - first
            ]
            stays = [*first, *latest, *rest][: int(limit)]
            scores[head, stays] = 1.0
        return scores


def _attention(queries: Tensor, keys: Tensor, alive: Tensor) -> Tensor:
    """Softmax of the last queries (q, x, d) over what is alive, (h, x, t), the mean over a group's query heads."""
    (h, t), x = alive.shape, queries.shape[1]
    logits = queries.view(h, -1, x, queries.shape[-1]) @ keys[:, None].mT
    visible = torch.ones(x, t, dtype=torch.bool).tril(t - x) & alive[:, None]
    return logits.masked_fill(~visible[:, None], -math.inf).softmax(-1).mean(1)


@pytest.mark.parametrize(
    ("name", "oracle_class", "interval", "window"), [("tova", _Tova, 1, 1), ("tova", _Tova, 6, 1), ("h2o", _H2O, 5, 8)]
)
def test_what_is_held_is_what_the_methods_own_rule_keeps(
    name: str, oracle_class: type[SteppedModel], interval: int, window: int
) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    policy = replace(dkv.policy(name, 1.0), window_size=window)
    cache = dkv.EvictingCache(model, policy, max_entries=40, interval=interval)
    oracle, tail = oracle_class(tiny_model("llama"), window, sinks=SINKS), 0
    for number, size in enumerate([90, *[1] * 40, 12, *[1] * 20]):
        ids = prompt(size, seed=number)
        torch.testing.assert_close(feed(model, cache, ids), oracle(ids), rtol=2e-3, atol=2e-3)
        tail += size
        if number == 0 or tail >= interval:
            oracle.step(Fraction(40 - interval), across=False)
            tail = 0
        for layer in range(LAYERS):
            store = cache.layers[layer].store
            for head in range(HEADS):
                held = set(cache.kept_positions(layer, 0, head).tolist()) | set(
                    range(store.seen - store.tail_length, store.seen)
                )
                assert held == set(oracle.alive[layer][head].nonzero().flatten().tolist()), (number, layer, head)


def test_streaming_llm_holds_the_first_and_the_latest_tokens() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "streaming-llm", max_entries=60, interval=5)
    feed(model, cache, prompt(90))
    for number in range(23):
        feed(model, cache, prompt(1, seed=number))
    # Of 113 tokens, the last step came after 110, and left 55 entries; three tokens came since.
    expected = [*range(SINKS), *range(110 - 51, 110)]
    assert all(
        cache.kept_positions(layer, 0, head).tolist() == expected for layer in range(LAYERS) for head in range(HEADS)
    )
    assert cache.layers[0].store.tail_length == 3
