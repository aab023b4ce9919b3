import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from defensivekv import CacheError
from defensivekv.cache import RaggedLayer
from tests.cache.test_prefix import watched

HEADS = 2
ONE = torch.zeros(1, HEADS, 1, 2)


class World:
    """A layer and the plain model of it: for each batch row and head, the (position, number) of every entry."""

    def __init__(self, layer: RaggedLayer, entries: list[list[list[tuple[int, float]]]]) -> None:
        self.layer = layer
        self.entries = entries
        self.seen = 0
        self.prefix_size = [[0] * HEADS for _ in entries]
        """Entries of each head that lie in the prefix."""
        self.has_facts = False

    @property
    def tail_size(self) -> int:
        return len(self.entries[0][0]) - self.prefix_size[0][0]

    def fork(self) -> "World":
        twin = World(self.layer.fork(), [[list(head) for head in row] for row in self.entries])
        twin.seen, twin.prefix_size = self.seen, [list(row) for row in self.prefix_size]
        twin.has_facts = self.has_facts
        return twin


class RaggedStore(RuleBasedStateMachine):
    """Any order of appending, compacting, cropping, reordering and forking, against lists of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[World] = []
        self.given: list[tuple[Tensor, Tensor]] = []
        """Tensors that were handed in, and what they were then."""
        self.next_number = 0.0

    @initialize(rows=st.integers(1, 3), count=st.integers(1, 12), reserve=st.sampled_from([0, 5, 20]))
    def prompt(self, rows: int, count: int, reserve: int) -> None:
        world = World(RaggedLayer(reserve), [[[] for _ in range(HEADS)] for _ in range(rows)])
        self.worlds = [world]
        self._append(world, count)

    def _append(self, world: World, count: int) -> None:
        rows = len(world.entries)
        numbers = self.next_number + torch.arange(rows * HEADS * count, dtype=torch.float32).view(rows, HEADS, count)
        self.next_number += rows * HEADS * count
        keys, values = torch.stack((numbers, -numbers), -1), numbers.unsqueeze(-1) + 0.5
        self.given += [(keys, keys.clone()), (values, values.clone())]
        tail_keys, tail_values = world.layer.append(keys, values)
        for row in range(rows):
            for head in range(HEADS):
                positions = range(world.seen, world.seen + count)
                world.entries[row][head] += zip(positions, numbers[row, head].tolist(), strict=True)
        world.seen += count
        assert tail_keys.shape == (rows, HEADS, world.tail_size, 2)
        assert tail_values.shape == (rows, HEADS, world.tail_size, 1)

    def _pick(self, data: st.DataObject) -> World:
        return self.worlds[data.draw(st.integers(0, len(self.worlds) - 1), label="world")]

    @rule(data=st.data(), count=st.integers(1, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        self._append(self._pick(data), count)

    @rule(
        data=st.data(),
        seed=st.integers(0, 2**31 - 1),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        with_facts=st.booleans(),
    )
    def compact(self, data: st.DataObject, seed: int, share: float, with_facts: bool) -> None:
        world = self._pick(data)
        tail, slots = world.tail_size, world.layer.num_slots
        assert slots == max(len(head) for row in world.entries for head in row)
        size = (len(world.entries), HEADS, slots)
        kept = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
        facts = torch.zeros(*size, 1)
        for row, heads in enumerate(world.entries):
            for head, entries in enumerate(heads):
                kept[row, head, : slots - len(entries)] = False
                facts[row, head, slots - len(entries) :, 0] = torch.tensor([number for _, number in entries])
                stays = kept[row, head, slots - len(entries) :].tolist()
                heads[head] = [entry for entry, stay in zip(entries, stays, strict=True) if stay]
                world.prefix_size[row][head] = len(heads[head])
        world.layer.compact(kept, facts if with_facts else None)
        world.has_facts = with_facts or (world.has_facts and not tail)
        assert world.layer.tail is None

    @rule(data=st.data())
    def forget_facts(self, data: st.DataObject) -> None:
        world = self._pick(data)
        world.layer.forget_facts()
        world.has_facts = False

    @rule(data=st.data())
    def release_rows(self, data: st.DataObject) -> None:
        world = self._pick(data)
        rows = data.draw(st.sets(st.integers(0, len(world.entries) - 1)), label="released")
        world.layer.release_rows(rows)
        view = world.layer.view
        if view is None:
            return
        assert set(view.rows) == set(range(len(view.prefix.lengths))), "every row that is held is read"
        for row in rows:
            for head, entries in enumerate(world.entries[row]):
                del entries[: world.prefix_size[row][head]]
                world.prefix_size[row][head] = 0

    @rule(data=st.data(), count=st.integers(0, 12))
    def crop(self, data: st.DataObject, count: int) -> None:
        world = self._pick(data)
        if count > world.tail_size:
            with pytest.raises(CacheError, match=f"cannot crop {count} tokens: only the last {world.tail_size}"):
                world.layer.crop(count)
            return
        world.layer.crop(count)
        world.seen -= count
        for heads in world.entries:
            for head, entries in enumerate(heads):
                heads[head] = entries[: len(entries) - count]

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        world = self._pick(data)
        index = data.draw(st.lists(st.integers(0, len(world.entries) - 1), min_size=1, max_size=4), label="rows")
        world.layer.select_rows(torch.tensor(index))
        world.entries = [[list(head) for head in world.entries[row]] for row in index]
        world.prefix_size = [list(world.prefix_size[row]) for row in index]

    @precondition(lambda self: 0 < len(self.worlds) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        world = self._pick(data)
        twin = world.fork()
        assert twin.layer.view is None or twin.layer.view.prefix is world.layer.view.prefix  # type: ignore[union-attr]
        self.worlds.append(twin)

    @invariant()
    def every_layer_holds_what_its_model_holds(self) -> None:
        for world in self.worlds:
            layer = world.layer
            assert layer.seen == world.seen
            assert layer.tail_length == world.tail_size
            assert world.has_facts == (layer.view is not None and layer.view.prefix.facts is not None)
            for row, heads in enumerate(world.entries):
                for head, entries in enumerate(heads):
                    assert _read(layer, row, head) == entries

    @invariant()
    def nothing_that_was_handed_in_has_been_written(self) -> None:
        assert all(torch.equal(tensor, before) for tensor, before in self.given)

    @invariant()
    def bytes_are_those_of_the_storages(self) -> None:
        for layer in (world.layer for world in self.worlds):
            held: list[Tensor] = [] if layer.tail is None else [layer.tail.key_buffer, layer.tail.value_buffer]
            if layer.view is not None:
                prefix = layer.view.prefix
                held += [prefix.keys, prefix.values, prefix.positions]
                held += [] if prefix.facts is None else [prefix.facts]
            assert layer.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held)


def _read(layer: RaggedLayer, row: int, head: int) -> list[tuple[int, float]]:
    """The entries that a layer holds, prefix first, checked for keys and values that belong together."""
    keys, values, positions = torch.empty(0, 2), torch.empty(0, 1), []
    if layer.view is not None:
        prefix, source = layer.view.prefix, layer.view.rows[row]
        where = prefix.segment(source, head)
        keys, values, positions = prefix.keys[where], prefix.values[where], prefix.kept_positions(source, head).tolist()
        assert prefix.facts is None or torch.equal(prefix.facts[where, 0], keys[:, 0])
    if layer.tail is not None:
        keys = torch.cat((keys, layer.tail.keys[row, head]))
        values = torch.cat((values, layer.tail.values[row, head]))
        positions += range(layer.seen - layer.tail_length, layer.seen)
    assert torch.equal(keys[:, 0], -keys[:, 1])
    assert torch.equal(keys[:, 0] + 0.5, values[:, 0])
    return list(zip(positions, keys[:, 0].tolist(), strict=True))


TestRaggedStore = RaggedStore.TestCase
TestRaggedStore.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def _evicted_layer(tokens: int = 50, kept_tokens: int = 10) -> RaggedLayer:
    layer = RaggedLayer()
    layer.append(torch.randn(1, HEADS, tokens, 2), torch.randn(1, HEADS, tokens, 2))
    layer.compact((torch.arange(tokens) < kept_tokens).expand(1, HEADS, -1))
    return layer


def test_what_is_evicted_is_freed_and_so_is_the_copy_in_the_prompts_buffers() -> None:
    layer, storages = RaggedLayer(), []
    for count in (60, 1, 30):  # the second one makes the buffers grow
        keys, key_storage = watched(1, HEADS, count, 2)
        values, value_storage = watched(1, HEADS, count, 2)
        layer.append(keys, values)
        storages += [key_storage, value_storage]
        del keys, values
    tail = layer.tail
    assert tail is not None
    kept = torch.zeros(1, HEADS, 91, dtype=torch.bool)
    kept[..., :9] = True
    layer.compact(kept)
    del tail
    gc.collect()
    assert [storage() for storage in storages] == [None] * 6
    assert layer.tail is None
    assert layer.nbytes == HEADS * 9 * (2 + 2) * 4 + HEADS * 9 * 4


def test_a_prompt_that_was_read_in_one_go_is_freed() -> None:
    layer = RaggedLayer()
    keys, key_storage = watched(1, HEADS, 60, 2)
    values, value_storage = watched(1, HEADS, 60, 2)
    layer.append(keys, values)
    fork = layer.fork()
    del keys, values
    assert key_storage() is not None
    layer.compact(torch.arange(60).expand(1, HEADS, -1) < 9)
    gc.collect()
    assert key_storage() is None
    assert value_storage() is None
    assert fork.tail_length == 60


def test_forks_and_rows_share_the_prefix_and_copy_none_of_it() -> None:
    layer = _evicted_layer()
    assert layer.view is not None
    prefix = layer.view.prefix
    pointers = prefix.keys.data_ptr(), prefix.values.data_ptr(), prefix.positions.data_ptr()
    branch = layer.fork()
    branch.select_rows(torch.tensor([0] * 5))
    branch.append(torch.zeros(5, HEADS, 3, 2), torch.zeros(5, HEADS, 3, 2))
    again = branch.fork()
    for twin in (branch, again):
        assert twin.view is not None
        held = twin.view.prefix
        assert (held.keys.data_ptr(), held.values.data_ptr(), held.positions.data_ptr()) == pointers
        assert twin.view.rows == (0,) * 5
    assert layer.view.rows == (0,)


def test_a_prefix_is_freed_with_the_last_that_reads_it() -> None:
    layer = RaggedLayer()
    layer.append(torch.randn(1, HEADS, 50, 2), torch.randn(1, HEADS, 50, 2))
    layer.compact(torch.ones(1, HEADS, 50, dtype=torch.bool))
    fork = layer.fork()
    assert layer.view is not None
    # Its keys put where their storage can be watched.
    keys, storage = watched(100, 2)
    object.__setattr__(layer.view.prefix, "keys", keys)
    del keys, layer
    gc.collect()
    assert storage() is not None
    del fork
    gc.collect()
    assert storage() is None


def test_a_token_after_the_eviction_moves_neither_prefix_nor_tail() -> None:
    layer = _evicted_layer()
    layer.append(ONE, ONE)
    layer.append(ONE, ONE)
    assert layer.view is not None
    assert layer.tail is not None
    watch = [layer.view.prefix.keys, layer.view.prefix.values, layer.tail.key_buffer, layer.tail.value_buffer]
    versions = [tensor._version for tensor in watch[:2]]
    for _ in range(25):
        layer.append(ONE, ONE)
    now = [layer.view.prefix.keys, layer.view.prefix.values, layer.tail.key_buffer, layer.tail.value_buffer]
    assert [tensor.data_ptr() for tensor in now] == [tensor.data_ptr() for tensor in watch]
    assert [tensor._version for tensor in now[:2]] == versions  # the prefix has not been written either


def test_a_crop_into_the_prefix_is_refused_and_changes_nothing() -> None:
    layer = _evicted_layer()
    with pytest.raises(CacheError, match="only the last 0 came after the eviction"):
        layer.crop(1)
    layer.append(ONE, ONE)
    with pytest.raises(CacheError, match=r"only the last 1 .* fork this one"):
        layer.crop(2)
    assert (layer.seen, layer.tail_length) == (51, 1)
    layer.crop(1)
    assert (layer.seen, layer.tail_length) == (50, 0)


def test_an_empty_layer_holds_nothing_and_cannot_be_compacted() -> None:
    layer = RaggedLayer()
    assert (layer.seen, layer.tail_length, layer.nbytes) == (0, 0, 0)
    layer.crop(0)
    layer.select_rows(torch.tensor([0, 0]))
    assert layer.fork().seen == 0
    with pytest.raises(CacheError, match="holds tokens"):
        layer.compact(torch.ones(1, 1, 1, dtype=torch.bool))


def test_a_reserve_is_room_from_the_start_and_not_moved_until_it_is_full() -> None:
    layer = RaggedLayer(reserve=20)
    layer.append(ONE, ONE)
    assert layer.tail is not None
    buffer = layer.tail.key_buffer.data_ptr()
    for _ in range(19):
        layer.append(ONE, ONE)
    assert (layer.tail.key_buffer.data_ptr(), layer.nbytes) == (buffer, HEADS * 20 * (2 + 2) * 4)
    layer.compact(torch.ones(1, HEADS, 20, dtype=torch.bool))
    layer.append(ONE.expand(1, HEADS, 3, 2), ONE.expand(1, HEADS, 3, 2))
    assert layer.nbytes == HEADS * 20 * ((2 + 2) * 4 + 4) + HEADS * 20 * (2 + 2) * 4


def test_a_released_row_gives_its_memory_back_and_the_others_read_on() -> None:
    layer = RaggedLayer()
    layer.append(torch.randn(3, HEADS, 30, 2), torch.randn(3, HEADS, 30, 2))
    layer.compact(torch.ones(3, HEADS, 30, dtype=torch.bool))
    before = layer.nbytes
    layer.release_rows([1])
    assert layer.nbytes == before * 2 // 3
    assert layer.view is not None
    assert layer.view.is_identity
    assert layer.view.prefix.lengths == ((30, 30), (0, 0), (30, 30))


def test_rows_that_nobody_reads_are_freed() -> None:
    layer = RaggedLayer()
    layer.append(torch.randn(3, HEADS, 30, 2), torch.randn(3, HEADS, 30, 2))
    layer.compact(torch.ones(3, HEADS, 30, dtype=torch.bool))
    fork, before = layer.fork(), layer.nbytes
    layer.select_rows(torch.tensor([2, 2]))
    assert layer.nbytes == before
    layer.release_rows()
    assert (layer.nbytes, fork.nbytes) == (before // 3, before)
    assert layer.view is not None
    assert layer.view.rows == (0, 0)
