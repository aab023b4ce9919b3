"""What tells one model, or one tokenizer, from another: hashes of all that their answers depend on."""

import hashlib
import json
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.errors import UnsupportedModelError

_CHUNK = 2**26
"""Elements that are copied off a GPU at a time."""

_INCIDENTAL = frozenset(
    "architectures attn_implementation dtype eos_token_id torch_dtype transformers_version use_cache".split()
)
"""Entries of a configuration that change no key and no value."""


@dataclass(frozen=True)
class ModelFingerprint:
    """A model, as far as its keys and values depend on it.

    weights: xxh3 of every tensor of its state, names, dtypes and shapes counted. config: what differs from its class's
    own defaults. dtype: of its first parameter. name, revision: where it came from, which is no part of what it is.
    """

    weights: str
    config: dict[str, Any]
    dtype: str
    name: str = ""
    revision: str = ""

    @property
    def described(self) -> str:
        """For messages."""
        at = f" at revision {self.revision}" if self.revision else ""
        return f"{self.name or 'a model without a name'}{at} in {self.dtype}"

    def differences(self, other: "ModelFingerprint") -> list[str]:
        """What of the two is not the same, by name."""
        found = [name for name in ("dtype", "weights") if getattr(self, name) != getattr(other, name)]
        keys = sorted(self.config.keys() | other.config.keys())
        return found + [f"config {key}" for key in keys if self.config.get(key) != other.config.get(key)]


_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, str]]" = weakref.WeakKeyDictionary()


def model_fingerprint(model: PreTrainedModel) -> ModelFingerprint:
    """Of a model. All of its weights are read, once for each model: at the memory's speed on a CPU.

    A change that PyTorch counts (an optimizer's step, `copy_`) is noticed afterwards; one through `.data` is not.
    Raises UnsupportedModelError for weights that are not in this process: on disk, or split over several.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if value.is_meta or hasattr(value, "to_local"):
            where = "on disk" if value.is_meta else "split over several devices"
            raise UnsupportedModelError(
                f"weight {name!r} is {where}, and a stored context is told by all weights: load the model whole"
            )
    versions = tuple((value.data_ptr(), 0 if value.is_inference() else value._version) for value in state.values())
    known = _known.get(model)
    if known is None or known[0] != versions:
        known = _known[model] = (versions, _hash_weights(state))
    config = json.loads(json.dumps(_plain(model.config.to_diff_dict()), sort_keys=True, default=str))
    return ModelFingerprint(
        weights=known[1],
        config=config,
        dtype=str(model.dtype).removeprefix("torch."),
        name=str(getattr(model.config, "_name_or_path", "") or ""),
        revision=str(getattr(model.config, "_commit_hash", None) or ""),
    )


def _hash_weights(state: dict[str, Tensor]) -> str:
    whole = xxhash.xxh3_128()
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in sorted(state):
        value = state[name].detach()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # Tied weights have several names.
        place = (value.data_ptr(), tuple(value.shape), value.stride())
        if place not in seen:
            seen[place] = _hash_tensor(value)
        whole.update(seen[place].encode())
    return str(whole.hexdigest())


def _hash_tensor(tensor: Tensor) -> str:
    part = xxhash.xxh3_128()
    flat = tensor.contiguous().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part.update(flat[start : start + _CHUNK].cpu().view(torch.uint8).numpy().data)
    return str(part.hexdigest())


def _plain(config: Any) -> Any:
    """A configuration without what changes no key and no value, and without what is private."""
    if isinstance(config, dict):
        return {
            str(key): _plain(value)
            for key, value in config.items()
            if not str(key).startswith("_") and key not in _INCIDENTAL
        }
    return [_plain(one) for one in config] if isinstance(config, list | tuple) else config


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of a tokenizer: sha256 of its rules, vocabulary, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    else:
        rules = json.loads(backend.to_str())
        # Set by whoever called last.
        rules["truncation"] = rules["padding"] = None
    parts = [rules, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
