"""What tells one model, or one tokenizer, from another: hashes of all that their answers depend on."""

import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.errors import UnsupportedModelError

_CHUNK = 2**26
"""Elements that are copied off a GPU at a time."""

_SAMPLES = 64
"""Elements of every weight that are compared each time."""

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"gradient_checkpointing", "_is_hf_initialized"}
"""Attributes that say nothing about what a module computes."""

_INCIDENTAL = frozenset(
    "architectures attn_implementation bos_token_id dtype eos_token_id id2label label2id output_attentions "
    "output_hidden_states pad_token_id return_dict torch_dtype transformers_version use_cache".split()
)
"""Entries of a configuration that change no key and no value."""


@dataclass(frozen=True)
class ModelFingerprint:
    """A model, as far as its keys and values depend on it.

    weights: xxh3 of every tensor of its state, names, dtypes and shapes counted. modules: xxh3 of what its modules
    compute with besides, such as which adapter is active. config: what differs from its class's own defaults, and the
    class. dtype: of its first parameter. name, revision: where it came from, which is no part of what it is.
    """

    weights: str
    modules: str
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
        found = [name for name in ("dtype", "weights", "modules") if getattr(self, name) != getattr(other, name)]
        keys = sorted(self.config.keys() | other.config.keys())
        return found + [f"config {key}" for key in keys if self.config.get(key) != other.config.get(key)]


_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, str]]" = weakref.WeakKeyDictionary()
_known_tokenizers: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, str]]" = weakref.WeakKeyDictionary()


def model_fingerprint(model: PreTrainedModel) -> ModelFingerprint:
    """Of a model. All of its weights are read, once for each model: at the memory's speed on a CPU.

    Later changes are noticed where PyTorch counts them (an optimizer's step, `copy_`), and where they meet one of 64
    elements of each weight (an adapter merged through `.data`).
    Raises UnsupportedModelError for weights that are not in this process, on disk or split over several, for state that
    is no tensor, and for rotations that depend on what was read before (dynamic NTK).
    """
    if any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        raise UnsupportedModelError(
            "this model's rotation (rope_type 'dynamic') depends on the longest text that it has read, so a context of "
            "it cannot be told by the document: keep it in memory"
        )
    state = dict(_plain_tensors(model.state_dict()))
    versions = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in state.values()]
    state_now = (versions, _hash_samples(state.values()))
    known = _known.get(model)
    if known is None or known[0] != state_now:
        known = _known[model] = (state_now, _hash_weights(state))
    config = json.loads(json.dumps(_plain(model.config.to_diff_dict()), sort_keys=True, default=str))
    return ModelFingerprint(
        weights=known[1],
        modules=_hash_modules(model),
        config=config | {"class": type(model).__name__},
        dtype=str(model.dtype).removeprefix("torch."),
        name=_origin(str(getattr(model.config, "_name_or_path", "") or "")),
        revision=str(getattr(model.config, "_commit_hash", None) or ""),
    )


def _origin(name: str) -> str:
    """A name that means the same from any folder."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def model_mark(model: PreTrainedModel) -> str | None:
    """Of some elements of every weight, and what its modules compute with: milliseconds, of a model of any size.

    Two marks tell whether a model was changed in between. None: nothing of it can be told.
    """
    try:
        state = dict(_plain_tensors(model.state_dict()))
    except UnsupportedModelError:
        return None
    return _hash_samples(state.values()) + _hash_modules(model)


def _plain_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state; of those that are made of others (quantised weights of torchao's), the others."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UnsupportedModelError(
                f"{name!r} of the model's state is a {type(value).__name__}, not a tensor, and a stored context is "
                "told by all weights: such a model's contexts can be kept in memory alone"
            )
        if value.is_meta or hasattr(value, "to_local"):
            where = "on disk" if value.is_meta else "split over several devices"
            raise UnsupportedModelError(
                f"weight {name!r} is {where}, and a stored context is told by all weights: load the model whole"
            )
        if is_traceable_wrapper_subclass(value):
            parts, _ = value.__tensor_flatten__()
            yield from _plain_tensors({f"{name}.{part}": getattr(value, part) for part in parts})
        else:
            yield name, value.detach()


def _hash_modules(model: PreTrainedModel) -> str:
    """Of what modules compute with that neither weights nor configuration say: constants, and of modules that are not
    PyTorch's or transformers' own (adapters, remote code) all plain values.
    """
    whole = xxhash.xxh3_128()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            continue
        is_foreign = not type(module).__module__.startswith(("torch.", "transformers."))
        # What ends in "_cached" (the longest text so far, in rotations) comes and goes.
        kept = {
            key: value
            for key, value in vars(module).items()
            if key not in _OF_EVERY_MODULE
            and not key.endswith("_cached")
            and (isinstance(value, float) or (is_foreign and _is_plain(value)))
        }
        if kept:
            whole.update(json.dumps([name, type(module).__name__, kept], sort_keys=True, default=sorted).encode())
    return str(whole.hexdigest())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _hash_samples(weights: Iterable[Tensor]) -> str:
    """Of some elements of each."""
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in weights:
        flat = value.reshape(-1)
        samples.setdefault((value.device, value.dtype), []).append(flat[:: max(1, flat.numel() // _SAMPLES)])
    whole = xxhash.xxh3_128()
    for parts in samples.values():
        whole.update(_hash_tensor(torch.cat(parts)).encode())
    return str(whole.hexdigest())


def _hash_weights(state: dict[str, Tensor]) -> str:
    whole = xxhash.xxh3_128()
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in sorted(state):
        value = state[name]
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
    """Of a tokenizer: sha256 of its rules, vocabulary, special tokens and chat template.

    Its vocabulary is read once for each tokenizer; later changes are noticed, but for a vocabulary that another of the
    same size took the place of.
    """
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    splits = getattr(tokenizer, "split_special_tokens", False)
    parts = json.dumps(
        [type(tokenizer).__name__, _rules(tokenizer), tokenizer.chat_template, special, splits],
        sort_keys=True,
        default=str,
    )
    known = _known_tokenizers.get(tokenizer)
    if known is None or known[0] != parts:
        whole = hashlib.sha256(parts.encode())
        whole.update(_vocabulary(tokenizer))
        known = _known_tokenizers[tokenizer] = (parts, whole.hexdigest())
    return known[1]


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Of a tokenizer, all but the vocabulary; not what whoever called last set, padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [len(tokenizer), tokenizer.added_tokens_decoder]
    steps = [getattr(backend, step) for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    settings = {name: getattr(backend.model, name) for name in dir(backend.model) if not name.startswith("_")}
    return [
        type(backend.model).__name__,
        {
            name: value
            for name, value in settings.items()
            if value is None or isinstance(value, bool | int | float | str)
        },
        [None if step is None else json.loads(step.__getstate__()) for step in steps],
        [(number, token.__getstate__()) for number, token in backend.get_added_tokens_decoder().items()],
        backend.get_vocab_size(),
    ]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])).encode()
    # After what is in `_rules`, and padding and truncation.
    return str(backend.to_str()).partition(',"model":')[2].encode()
