"""A cache of one row as tensors and plain values, and back.

lengths                      (l, h) entries of each head of each evicted layer, int32
layers.N.keys, .values       (s, d), (s, v) of evicted layer N: head after head
layers.N.positions           (s,) int32, ascending within a head
layers.N.scores              (s, f) float32: see `policies.standing`; under a bound: see `policies.steps`
layers.N.tail.keys, .values  (h, x, d), (h, x, v) of what came after the last eviction
layers.N.queries             (q, w, d) that the next step listens to, under a bound
layers.N.stock.NAME          what a layer of transformers' own holds
"""

from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from defensivekv.cache import PrefixView, RaggedPrefix
from defensivekv.errors import CacheError, ContextError, DamagedContextError
from defensivekv.integrations.transformers.bound import LayerSizes
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies.standing import LayerStanding

State = dict[str, Any]
Get = Callable[[str], Tensor]


def is_score(name: str) -> bool:
    """Whether a tensor of that name is read for further eviction alone."""
    return name.endswith(".scores")


def take(cache: EvictingCache) -> tuple[dict[str, Tensor], State]:
    """What a cache holds, by name, and the plain values beside it. Tensors are the cache's own where they can be.

    Raises CacheError for a cache of several rows, or without a prompt.
    """
    layers = [cache.layers[index] for index in cache.evicted_layers]
    if not cache.lengths.numel() or cache.lengths.shape[1] != 1:
        raise CacheError("only a cache with one prompt, which was read, can be kept")
    tensors: dict[str, Tensor] = {"lengths": cache.lengths[:, 0].to(torch.int32)}
    befores = []
    for layer in layers:
        befores.append(layer.store.before)
        tensors |= {f"layers.{layer.index}.{name}": tensor for name, tensor in _evicted(layer).items()}
    stock: State = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, EvictedLayer):
            values = {name: _packed(value, f"layers.{index}.stock.{name}", tensors) for name, value in _held(layer)}
            stock[str(index)] = {"class": type(layer).__name__, "values": values}
    stepping = cache.stepping
    state = {
        "before": befores,
        "tokens": list(cache.texts.tokens),
        "shares": [str(share) for share in cache.texts.shares],
        "bytes_per_token": cache.bytes_per_token,
        "standings": {
            str(index): {"tops": list(standing.tops), "preferences": list(standing.preferences)}
            for index, standing in cache.standings.items()
        },
        "stock": stock,
        "steps": None
        if stepping is None or not cache.is_bounded
        else {
            "expected": stepping.expected,
            "pinned": stepping.pinned,
            "sizes": None if stepping.sizes is None else asdict(stepping.sizes),
        },
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, state


def _evicted(layer: EvictedLayer) -> dict[str, Tensor]:
    view, tail, log = layer.store.view, layer.store.tail, layer.log
    assert view is not None
    prefix = view.prefix if view.is_identity else view.prefix.select_rows(view.rows)
    found = {"keys": prefix.keys, "values": prefix.values, "positions": prefix.positions}
    if prefix.facts is not None:
        found["scores"] = prefix.facts
    if tail is not None and tail.used:
        found |= {"tail.keys": tail.keys[0], "tail.values": tail.values[0]}
    if log is not None and log.nbytes:
        found["queries"] = log.of_row(0, layer.store.seen)
    return found


def _held(layer: Any) -> list[tuple[str, Any]]:
    return sorted(vars(layer).items())


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON can hold it; its tensors go to `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    raise CacheError(f"{name} is a {type(value).__name__}, which this version of the package cannot keep")


def _unpacked(value: Any, get: Get, device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        # A copy, since a stock layer may write to it.
        return get(value["tensor"]).to(device, copy=True)
    if "dtype" in value:
        dtype = getattr(torch, value["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise DamagedContextError(f"{value['dtype']!r} is no dtype")
        return dtype
    if "device" in value:
        return device
    return {key: _unpacked(one, get, device) for key, one in value["dict"]}


def restore(cache: EvictingCache, get: Get, names: frozenset[str], state: State, device: torch.device) -> None:
    """Makes an empty cache, of the policy and bounds of that time, hold what `take` took.

    get: gives the tensor of a name, which is used as it is where it lies on `device`. names: of all tensors.
    Raises ContextError where a layer of transformers' own is of another class than it was, DamagedContextError where
    sizes contradict each other.
    """
    lengths = get("lengths").tolist()
    if len(lengths) != len(cache.evicted_layers):
        raise DamagedContextError(f"{len(lengths)} layers in place of {len(cache.evicted_layers)}")
    for place, index in enumerate(cache.evicted_layers):
        layer, own = cache.layers[index], f"layers.{index}."
        held = {name.removeprefix(own): get(name).to(device) for name in names if name.startswith(own)}
        _fill(layer, held, tuple(lengths[place]), state["before"][place])
    for number, stock in state["stock"].items():
        layer = cache.layers[int(number)]
        if type(layer).__name__ != stock["class"] or not vars(layer).keys() <= stock["values"].keys():
            raise ContextError(
                f"layer {number} was kept as transformers' {stock['class']}, which is not what this release of "
                "transformers makes of it: use the release that the context was made with, or compress it again"
            )
        for name, value in stock["values"].items():
            if name not in vars(layer) and hasattr(type(layer), name):
                raise DamagedContextError(f"layer {number} has {name!r} in place of its own")
            setattr(layer, name, _unpacked(value, get, device))
    texts = Texts(tuple(state["tokens"]), tuple(Fraction(share) for share in state["shares"]))
    standings = {
        int(index): LayerStanding(tuple(held["tops"]), tuple(held["preferences"]))
        for index, held in state["standings"].items()
    }
    if cache.stepping is None:
        decision = cache.decision
        decision.texts, decision.standings, decision.bytes_per_token = texts, standings, state["bytes_per_token"]
        return
    stepping, steps = cache.stepping, state["steps"]
    stepping.texts, stepping.expected, stepping.pinned = texts, steps["expected"], steps["pinned"]
    stepping.sizes = None if steps["sizes"] is None else LayerSizes(**steps["sizes"])
    for index in cache.evicted_layers:
        layer = cache.layers[index]
        layer.log = stepping.new_log()
        if f"layers.{index}.queries" in names:
            layer.log.add(get(f"layers.{index}.queries").to(device)[None], None)


def _fill(layer: EvictedLayer, held: dict[str, Tensor], lengths: tuple[int, ...], before: int) -> None:
    sizes = {name: len(held[name]) for name in ("keys", "values", "positions", "scores") if name in held}
    if min(lengths) < 0 or set(sizes.values()) != {sum(lengths)}:
        raise DamagedContextError(f"layer {layer.index} has {sizes} entries, and heads of {lengths}")
    prefix = RaggedPrefix(held["keys"], held["values"], held["positions"], (lengths,), held.get("scores"))
    layer.store.start_from(PrefixView(prefix, (0,)), before)
    if "tail.keys" in held:
        layer.store.append(held["tail.keys"][None], held["tail.values"][None])
    layer.awaits_prompt, layer.is_initialized = False, True
    layer.refresh_reads()
