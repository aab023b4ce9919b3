"""What is evicted is freed, what is shared is not copied, and `nbytes` is what was asked for."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.cache import PrefixIndex
from defensivekv.cache.blocks import Blocks
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model

PROMPT, LAYERS, HEADS, SIZE = 300, 3, 2, 16
ENTRY = 2 * SIZE * 4 + 4
"""Bytes of a key, a value and a position."""


def _read(model: PreTrainedModel, cache: dkv.EvictingCache, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})


class _Watched(dkv.EvictingCache):
    """Keeps weak references to the storages that the model hands to the cache and that it puts them into, and counts
    those alive.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.handed: list[StorageWeakRef] = []
        self.put: list[StorageWeakRef] = []
        self.alive_at_update: list[int] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.alive_at_update.append(self.alive)
        self.handed += [StorageWeakRef(states.untyped_storage()) for states in (key_states, value_states)]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.put += [StorageWeakRef(states.untyped_storage()) for states in (keys, values)]
        return keys, values

    @property
    def alive(self) -> int:
        return len({storage.cdata for storage in (*self.handed, *self.put) if not storage.expired()})


@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv", "snapkv"])
def test_the_keys_and_values_of_the_prompt_are_freed_once_it_has_been_read(policy: str, budget: float) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = _Watched(model, dkv.policy(policy, budget))
    _read(model, cache, prompt(PROMPT))
    assert len(cache.handed) == 2 * LAYERS
    assert cache.alive == 0


def test_no_more_layers_are_whole_at_a_time_than_the_budget_holds() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    dkv.enable(model)
    cache = _Watched(model, dkv.policy("defensivekv", 0.3))
    _read(model, cache, prompt(PROMPT))
    assert cache.alive_at_update == [0] * 6
    whole = _Watched(model, dkv.policy("layer-defensivekv", 0.3))
    _read(model, whole, prompt(PROMPT))
    # Two layers are more than three tenths of six: from then on, the whole one is the one that was read last.
    assert whole.alive_at_update == [0, 2, 0, 0, 0, 0]
    assert whole.alive == 0


def test_the_graph_of_a_forward_pass_with_gradients_does_not_keep_the_prompt_alive() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = _Watched(model, dkv.policy("defensivekv", 0.3))
    model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: cache})
    assert cache.alive == 0


_MEASURE = """
import gc, sys
import psutil, torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

torch.set_num_threads(1)
config = AutoConfig.for_model("llama", vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=4, head_dim=128, max_position_embeddings=4096)
model = AutoModelForCausalLM.from_config(config).eval()
process = psutil.Process()

def held(make_cache, num_tokens):
    def read(tokens):
        cache = make_cache()
        with torch.no_grad():
            model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        return cache
    read(num_tokens)
    gc.collect()
    before = process.memory_info().rss
    cache = read(num_tokens)
    gc.collect()
    return process.memory_info().rss - before

stock = held(lambda: DynamicCache(config=config), 2048)
dkv.enable(model)
print(stock, held(lambda: dkv.EvictingCache(model, sys.argv[1], 0.1), 2048))
"""


@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_the_process_gives_the_memory_back(policy: str) -> None:
    # Freed blocks of more than 64 KiB go back to the system at once, so that resident memory is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, policy], env=environment, capture_output=True, text=True, check=True
    )
    stock, evicted = map(int, measured.stdout.split())
    full = 8 * 2 * 4 * 128 * 4 * 2048
    assert stock > 0.9 * full
    assert evicted < 0.2 * full


@pytest.mark.parametrize(
    ("budget", "share"),
    [
        (1.0, 1.0),
        (0.9, 0.9),
        (0.333, 0.333),
        (0.2, 0.2),
        (40, 40 / PROMPT),
    ],
)
@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_bytes_held_are_the_budget_within_one_token_of_every_head(
    policy: str, budget: float | int, share: float
) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, policy, budget)
    _read(model, cache, prompt(PROMPT))
    full = LAYERS * HEADS * ENTRY * PROMPT
    assert 0 <= share * full - cache.nbytes < LAYERS * HEADS * ENTRY
    report = cache.report()
    assert report.nbytes == cache.nbytes
    assert report.full_bytes == full
    assert report.achieved == report.entries_kept / (LAYERS * HEADS * PROMPT)
    assert report.nbytes == report.entries_kept * ENTRY


def test_bytes_held_are_those_of_all_tensors_that_the_cache_keeps() -> None:
    model = tiny_model("gemma3_text")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    _read(model, cache, prompt(PROMPT, rows=2))
    _read(model, cache, prompt(5, rows=2))
    storages: dict[int, int] = {}
    stack: list[object] = [cache.layers]
    while stack:
        held = stack.pop()
        if isinstance(held, Tensor):
            storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, list | tuple):
            stack.extend(held)
        elif hasattr(held, "__dict__") and not isinstance(held, type | Blocks | PrefixIndex):
            # Those are made anew from the lengths.
            stack.extend(vars(held).values())
    windows = 2 * 8
    assert cache.nbytes == sum(storages.values()) - windows, "all but the window's length of the two sliding layers"


def test_appending_a_token_copies_nothing_that_is_stored() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _read(model, cache, prompt(PROMPT))
    store = cache.layers[1].store
    prefix = store.view.prefix.keys.data_ptr(), store.view.prefix.values.data_ptr()
    buffers = []
    for token in prompt(130, seed=1).split(1, dim=1):
        _read(model, cache, token)
        assert (store.view.prefix.keys.data_ptr(), store.view.prefix.values.data_ptr()) == prefix
        buffers.append(store.tail.key_buffer)
    moves = [step for step in range(1, 130) if buffers[step] is not buffers[step - 1]]
    assert moves == [1, 32, 64, 128], "buffers double, and are written in place in between"


def test_forks_share_the_prefix_and_it_dies_with_the_last_of_them() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _read(model, cache, prompt(PROMPT))
    _read(model, cache, prompt(4))
    fork = cache.fork()
    expanded = cache.fork()
    expanded.batch_repeat_interleave(5)
    views = [c.layers[0].store.view for c in (cache, fork, expanded)]
    assert len({view.prefix.keys.data_ptr() for view in views}) == 1
    tails = [c.layers[0].store.tail.key_buffer.data_ptr() for c in (cache, fork, expanded)]
    assert len(set(tails)) == 3
    prefix = StorageWeakRef(views[0].prefix.keys.untyped_storage())
    del views, cache, fork
    assert not prefix.expired()
    del expanded
    assert prefix.expired()
