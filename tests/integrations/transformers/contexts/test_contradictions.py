"""Files whose checksums are right and whose content is not: refused by type, never run, never answered from."""

import json
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.cache.tensor_file import _header_checksum, read_header
from tests.integrations.transformers.contexts.cases import context_of
from tests.integrations.transformers.models import tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer

Change = Callable[[Any], Any]


def rewrite(path: Path, changes: dict[str, Change], tensor: tuple[str, Change] | None = None) -> None:
    """Changes a file's metadata and entries by name, and the numbers of a tensor; makes its checksums right again."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries, data = read_header(BytesIO(content), path.name), bytearray(content[8 + length :])
    metadata = entries["__metadata__"]
    if tensor is not None:
        name, change = tensor
        start, end = entries[name]["data_offsets"]
        data[start:end] = change(np.frombuffer(data[start:end], "<i4").copy()).tobytes()
        sums = json.loads(metadata["checksums"])
        sums[name] = xxhash.xxh3_128_hexdigest(bytes(data[start:end]))
        metadata["checksums"] = json.dumps(sums)
    for name, change in changes.items():
        if name in metadata:
            metadata[name] = json.dumps(change(json.loads(metadata[name])))
        else:
            entries[name] = change(entries[name])
    metadata["header_checksum"] = _header_checksum(entries)
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 64)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


CASES: dict[str, dict[str, Change]] = {
    "no model": {"model": lambda _: None},
    "no model's weights": {"model": lambda held: {"name": held["name"], "dtype": held["dtype"]}},
    "no state": {"state": lambda _: {}},
    "no checksums": {"checksums": lambda _: [1]},
    "an option too many": {"options": lambda held: held | {"x": 1}},
    "a policy without fields": {"policy": lambda held: held | {"fields": {}}},
    "a budget of nonsense": {"policy": lambda held: {**held, "fields": held["fields"] | {"budget": {"budget": "zzz"}}}},
    "a wrapping too many": {"wrapping": lambda held: held | {"x": 1}},
    "steps that are a number": {"steps": lambda _: 5},
    "a share of nothing": {"state": lambda held: held | {"shares": ["1/0"]}},
    "text for seconds": {"prefill_seconds": lambda _: "long"},
    "no facts": {"about": lambda _: {}},
    "a negative offset": {"lengths": lambda held: held | {"data_offsets": [-8, held["data_offsets"][1]]}},
    "offsets of text": {"lengths": lambda held: held | {"data_offsets": ["a", "b"]}},
    "a dtype of nobody's": {"lengths": lambda held: held | {"dtype": "F77"}},
    "another shape": {"lengths": lambda held: held | {"shape": [7, 7]}},
    "fewer tokens before the tail": {"state": lambda held: held | {"before": [3] * len(held["before"])}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_contradicts_itself_is_refused_and_dropped(
    model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    store = dkv.ContextStore(tmp_path)
    key = store.put(context_of(model))
    path = tmp_path / f"{key}.kv"
    rewrite(path, CASES[name])
    with pytest.raises(dkv.DamagedContextError, match=path.name):
        dkv.load_context(path, model, small_tokenizer())
    assert [entry.key for entry in store.list()] == [key]
    with pytest.warns(dkv.DefensiveKVWarning, match="dropped from the store"):
        assert not context_of(model, store=store).was_stored
    assert context_of(model, store=store).was_stored


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("lengths", lambda lengths: lengths * 3),
        ("lengths", lambda lengths: lengths - lengths.max()),
        ("lengths", lambda lengths: lengths[::-1]),
    ],
)
def test_lengths_that_are_not_those_of_what_is_there_are_refused(
    model: PreTrainedModel, tmp_path: Path, tensor: str, change: Change
) -> None:
    path = tmp_path / "book.kv"
    context_of(model).save(path)
    rewrite(path, {}, (tensor, change))
    with pytest.raises(dkv.DamagedContextError, match=r"contradicts itself: layer \d has"):
        dkv.load_context(path, model, small_tokenizer())


def test_a_file_names_nothing_that_is_run(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    path = tmp_path / "book.kv"
    context_of(model).save(path)
    content = path.read_bytes()

    def in_stock(value: Any) -> Change:
        def change(state: dict[str, Any]) -> dict[str, Any]:
            assert state["stock"], "a model with a layer of transformers' own"
            for layer in state["stock"].values():
                layer["values"] |= value
            return state

        return change

    torch.manual_seed(5)
    for value, says in (
        ({"keys": {"dtype": "seed"}}, "'seed' is no dtype"),
        ({"get_seq_length": {"dtype": "float32"}}, "has 'get_seq_length' in place of its own"),
        ({"__class__": 1}, "has '__class__' in place of its own"),
    ):
        path.write_bytes(content)
        rewrite(path, {"state": in_stock(value)})
        with pytest.raises(dkv.DamagedContextError, match=says):
            dkv.load_context(path, model, small_tokenizer())
    assert torch.initial_seed() == 5
