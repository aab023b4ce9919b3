"""Contexts found again by what they were made of."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers import Context
from tests.integrations.transformers.contexts.cases import assert_same, context_of, document
from tests.integrations.transformers.models import tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dkv.ContextStore]:
    """A store of each kind, empty."""
    if request.param == "folder":
        yield dkv.ContextStore(tmp_path / "store")
    elif request.param == "file":
        yield dkv.ContextStore(f"file://{tmp_path}/store")
    elif request.param == "memory":
        yield dkv.ContextStore(f"memory://{tmp_path.name}/contexts", copies=tmp_path / "copies")
    else:
        bucket = request.getfixturevalue("bucket")
        yield dkv.ContextStore(f"s3://{bucket.name}/a/b", copies=tmp_path / "copies", storage_options=bucket.options)


def test_a_document_is_read_once(
    model: PreTrainedModel, store: dkv.ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = context_of(model, store=store)
    assert not made.was_stored
    assert made.key in store
    monkeypatch.setattr(
        "defensivekv.integrations.transformers.contexts.compressing.prefill", lambda *_, **__: pytest.fail("read again")
    )
    found = context_of(model, store=store)
    assert found.was_stored
    assert_same(found, made)
    assert dkv.context_key(model, small_tokenizer(), document(), "layer-defensivekv", 0.3) == made.key
    again = store.get(made.key, model, small_tokenizer())
    assert again is not None
    assert_same(again, made)


def test_what_is_in_it_is_listed_and_removed(model: PreTrainedModel, store: dkv.ContextStore) -> None:
    keys = [store.put(context_of(model, budget=budget)) for budget in (0.2, 0.3)]
    assert store.put(context_of(model, budget=0.3)) == keys[1]
    entries = store.list()
    assert {entry.key for entry in entries} == set(keys)
    assert {entry.facts.budget for entry in entries if entry.facts} == {"0.2", "0.3"}
    assert entries[0].last_used >= entries[1].last_used
    assert store.resolve(keys[0][:20]) == keys[0]
    assert store.describe(keys[0]).nbytes < store.describe(keys[1]).nbytes
    assert store.remove(keys[0])
    assert not store.remove(keys[0])
    assert keys[0] not in store
    assert store.get(keys[0], model, small_tokenizer()) is None
    assert [entry.key for entry in store.list()] == [keys[1]]
    for start in (keys[0], "", "zz"):
        with pytest.raises(dkv.InvalidInputError, match=r"0 contexts of .* have a key that begins with"):
            store.resolve(start)
    with pytest.raises(dkv.InvalidInputError, match="has no context of key"):
        store.describe(keys[0])


def test_the_least_recently_used_go_beyond_the_limit(model: PreTrainedModel, store: dkv.ContextStore) -> None:
    contexts = [context_of(model, "snapkv", budget=budget) for budget in (0.30, 0.31, 0.32)]
    keys = []
    for context in contexts:
        keys.append(store.put(context))
        _wait(store)
    largest = store.describe(keys[2]).nbytes
    assert store.get(keys[0], model, small_tokenizer())
    assert set(store.prune(2 * largest + 10)) == {keys[1]}
    assert set(store.prune(largest + 10)) == {keys[2]}
    assert keys[0] in store
    with pytest.raises(dkv.BudgetError, match="is not understood"):
        store.prune("much")


def _wait(store: dkv.ContextStore) -> None:
    """Until a later use has a later time: buckets count whole seconds."""
    if store.address.startswith("s3"):
        import time

        time.sleep(1.1)


def _file_of(store: dkv.ContextStore, key: str) -> Path:
    return store._folder.place(key)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_named_and_the_entry_dropped(model: PreTrainedModel, store: dkv.ContextStore) -> None:
    made = context_of(model)
    key = store.put(made)
    path = _file_of(store, key)
    _flip(path)
    if store._remote is not None:
        # The damaged file is what all machines find.
        store._remote.put(key, path)
    with pytest.warns(dkv.DefensiveKVWarning, match=rf"{key}\.kv: layers\.\d\.\w+ is damaged.*dropped from the store"):
        assert store.get(key, model, small_tokenizer()) is None
    assert key not in store
    assert not path.exists()
    again = context_of(model, store=store)
    assert not again.was_stored
    assert_same(again, made)


def test_a_damaged_copy_is_fetched_again(model: PreTrainedModel, tmp_path: Path, bucket: Any) -> None:
    store = dkv.ContextStore(f"s3://{bucket.name}/x", copies=tmp_path, storage_options=bucket.options)
    made = context_of(model, store=store)
    _flip(_file_of(store, made.key))
    found = context_of(model, store=store)
    assert found.was_stored
    assert_same(found, made)


def test_what_another_machine_removed_is_not_answered_from(model: PreTrainedModel, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/contexts"
    here, there = (dkv.ContextStore(address, copies=tmp_path / name) for name in ("here", "there"))
    key = here.put(context_of(model))
    assert there.remove(key)
    assert here.get(key, model, small_tokenizer()) is None
    assert not _file_of(here, key).exists()


def test_a_damaged_entry_is_written_anew(model: PreTrainedModel, store: dkv.ContextStore) -> None:
    made = context_of(model)
    path = _file_of(store, store.put(made))
    for damage in (_flip, lambda path: path.write_bytes(path.read_bytes()[:100])):
        damage(path)
        found = store.get(store.put(made), model, small_tokenizer())
        assert found is not None
        assert_same(found, made)


def test_what_was_read_is_not_lost_where_it_cannot_be_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    small = dkv.ContextStore(tmp_path, "10KiB")
    with pytest.warns(dkv.DefensiveKVWarning, match=r"not put into .*give it a larger max_bytes"):
        made = context_of(model, store=small)
    assert_same(made, context_of(model))


def test_a_place_for_reading_alone_is_read(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"memory://{tmp_path.name}/contexts"
    folder, remote = dkv.ContextStore(tmp_path / "store"), dkv.ContextStore(address, copies=tmp_path / "copies")
    made = context_of(model)
    key = folder.put(made), remote.put(made)
    assert remote._remote is not None

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "for reading alone")

    for name in ("pipe_file", "rm_file", "put_file"):
        monkeypatch.setattr(remote._remote._files, name, refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    monkeypatch.setattr("os.utime", refuse)
    for store in (folder, remote):
        found = store.get(key[0], model, small_tokenizer())
        assert found is not None
        assert_same(found, made)
        with pytest.raises(dkv.InvalidInputError, match="for reading alone"):
            store.remove(key[0])
    _flip(_file_of(folder, key[0]))
    with pytest.warns(dkv.DefensiveKVWarning, match=r"is damaged.*it stays in the store, since cannot change"):
        assert folder.get(key[0], model, small_tokenizer()) is None


def test_a_place_that_does_not_answer_is_named(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dkv.ContextStore(f"memory://{tmp_path.name}/contexts", copies=tmp_path)
    key = store.put(context_of(model))
    assert store._remote is not None
    monkeypatch.setattr(store._remote._files, "exists", lambda *_: 1 / 0)
    with pytest.raises(dkv.InvalidInputError, match=r"memory://.* refuses, or cannot be reached: ZeroDivisionError"):
        store.get(key, model, small_tokenizer())


def test_folders_are_found_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    relative = dkv.ContextStore("store")
    monkeypatch.chdir("/")
    assert relative._folder.path == tmp_path / "store"
    assert dkv.ContextStore("~/kept")._folder.path == tmp_path / "home" / "kept"
    assert dkv.ContextStore(f"file://{tmp_path}/with%20blank")._folder.path == tmp_path / "with blank"
    for address in (Path("s3://bucket/a"), "s3:/bucket", "file://elsewhere/x"):
        with pytest.raises(dkv.InvalidInputError, match=r"both slashes|names a machine"):
            dkv.ContextStore(address)


def test_a_file_under_another_key_is_not_answered_from(model: PreTrainedModel, tmp_path: Path) -> None:
    store = dkv.ContextStore(tmp_path)
    one, two = (store.put(context_of(model, budget=budget)) for budget in (0.2, 0.3))
    _file_of(store, one).replace(_file_of(store, two))
    with pytest.warns(dkv.DefensiveKVWarning, match="holds the context of another key"):
        assert store.get(two, model, small_tokenizer()) is None


def _variants(model: PreTrainedModel) -> dict[str, Context]:
    context = context_of(model)
    chat = small_tokenizer("{% for m in messages %}{{ m['content'] }} [END]{% endfor %} [ASSISTANT]")
    other_weights = tiny_model("llama", seed=1)
    return {
        "as it is": context,
        "budget": context_of(model, budget=0.31),
        "policy": context_of(model, "defensivekv"),
        "window": context_of(model, window_size=16),
        "scores": context_of(model, keep_scores=False),
        "chunks": context_of(model, chunk_size=64),
        "bound": context_of(model, max_entries=96),
        "longer": context.append("w7"),
        "other text": dkv.compress(model, small_tokenizer(), document(seed=1), "layer-defensivekv", 0.3),
        "turn": context.turn("w7", max_new_tokens=2)[1],
        "shrunk": context.shrink(0.2),
        "template": dkv.compress(model, chat, document(), "layer-defensivekv", 0.3),
        "plain": dkv.compress(model, chat, document(), "layer-defensivekv", 0.3, template="plain"),
        "weights": context_of(other_weights),
        "dtype": context_of(tiny_model("llama", dtype=torch.bfloat16)),
    }


def test_everything_that_decides_what_is_in_it_is_in_the_key(model: PreTrainedModel) -> None:
    keys = {name: context.key for name, context in _variants(model).items()}
    assert len(set(keys.values())) == len(keys)
    assert context_of(tiny_model("llama")).key == keys["as it is"], "and nothing else"


def test_a_model_that_was_changed_gives_its_contexts_no_key(model: PreTrainedModel, tmp_path: Path) -> None:
    context = context_of(model)
    before = context.key
    after = context.append("w7")
    model.get_input_embeddings().weight.data.add_(1.0)
    assert context_of(model).key != before
    for one in (context, after, context.append("w8")):
        with pytest.raises(dkv.ContextError, match="the model was changed since it read this document"):
            dkv.ContextStore(tmp_path).put(one)
        with pytest.raises(dkv.ContextError, match="change it back"):
            one.save(tmp_path / "book.kv")
    assert not list(tmp_path.iterdir())


def test_another_models_context_is_refused(model: PreTrainedModel, store: dkv.ContextStore) -> None:
    key = store.put(context_of(model))
    with pytest.raises(dkv.ContextError, match="was made by another model"):
        store.get(key, tiny_model("llama", seed=1), small_tokenizer())
    assert key in store


def test_what_is_larger_than_the_store_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    for address in (str(tmp_path / "store"), f"memory://{tmp_path.name}"):
        copies: dict[str, Any] = {} if "://" not in address else {"copies": tmp_path / "copies"}
        with pytest.raises(dkv.InvalidInputError, match="of the whole store: give it a larger max_bytes"):
            dkv.ContextStore(address, "10KiB", **copies).put(context_of(model))


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(dkv.InvalidInputError, match="give another folder"):
        dkv.ContextStore(tmp_path / "file")
    with pytest.raises(dkv.InvalidInputError, match="cannot keep contexts at 'nowhere://x'"):
        dkv.ContextStore("nowhere://x", copies=tmp_path)
    with pytest.raises(dkv.InvalidInputError, match="are for addresses such as"):
        dkv.ContextStore(tmp_path, copies=tmp_path)
    with pytest.raises(dkv.BudgetError, match="budget 'much' is not understood"):
        dkv.ContextStore(tmp_path, "much")


def test_another_machine_finds_what_one_put_into_the_bucket(model: PreTrainedModel, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/contexts"
    made = context_of(model, store=dkv.ContextStore(address, copies=tmp_path / "here"))
    there = dkv.ContextStore(address, copies=tmp_path / "there")
    assert not os.listdir(tmp_path / "there")
    found = context_of(model, store=there)
    assert found.was_stored
    assert_same(found, made)
    assert (tmp_path / "there" / f"{made.key}.kv").exists()


def test_copies_have_a_place_of_their_own_by_default(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = dkv.ContextStore(f"memory://{tmp_path.name}/contexts").put(context_of(model))
    assert len(list(tmp_path.glob(f"defensivekv/*/{key}.kv"))) == 1
