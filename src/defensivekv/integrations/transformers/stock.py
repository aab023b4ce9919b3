"""What is asked of any layer of a cache, ours or transformers' own."""

from typing import Any

from torch import Tensor

from defensivekv.integrations.transformers.layer import EvictedLayer


def has_forgotten(layer: Any) -> bool:
    """Whether a stock layer keeps no past to go back to."""
    if isinstance(layer, EvictedLayer):
        return False
    if not layer.is_croppable:
        return True
    if getattr(layer, "record_past", True):
        return False
    return not getattr(layer, "is_sliding", False) or bool(layer.get_seq_length() >= layer.sliding_window)


def layer_bytes(layer: Any) -> int:
    """Bytes of all that a layer holds."""
    if isinstance(layer, EvictedLayer):
        return layer.nbytes
    states = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        states.extend(held.values() if isinstance(held, dict) else [held])
    # Of the storage: a sliding layer holds its window as a view of everything that it has just read.
    storages = {
        state.untyped_storage().data_ptr(): state.untyped_storage().nbytes()
        for state in states
        if isinstance(state, Tensor)
    }
    return sum(storages.values())
