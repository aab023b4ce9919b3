"""The growing part of a layer's cache: dense, the tokens since the last compaction."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.types import Keys, Values

MIN_CAPACITY = 32


@dataclass(eq=False)
class Tail:
    """Keys and values of recent tokens in buffers that double: appending a token copies nothing stored.

    key_buffer: (b, h, capacity, d).  value_buffer: (b, h, capacity, v).  used: tokens held.
    is_writable: whether the buffers are this tail's own, and not tensors that somebody else may read.
    """

    key_buffer: Float[Tensor, "b h c d"]
    value_buffer: Float[Tensor, "b h c v"]
    used: int
    is_writable: bool = False

    @classmethod
    def empty(cls, keys: Keys, values: Values, capacity: int) -> "Tail":
        """Room for `capacity` tokens like these, and none held."""
        return cls(_grown(keys[:, :, :0], capacity), _grown(values[:, :, :0], capacity), 0, is_writable=True)

    @classmethod
    def of(cls, keys: Keys, values: Values) -> "Tail":
        """A tail that holds these tensors themselves, or copies where they are views of something larger or where heads
        do not lie one after the other, as they are read.
        """
        return cls(_alone(keys), _alone(values), keys.shape[2])

    @property
    def keys(self) -> Keys:
        """(b, h, used, d), a view."""
        return self.key_buffer[:, :, : self.used]

    @property
    def values(self) -> Values:
        """(b, h, used, v), a view."""
        return self.value_buffer[:, :, : self.used]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the unused part counted."""
        return self.key_buffer.nbytes + self.value_buffer.nbytes

    def append(self, keys: Keys, values: Values, reserve: int = 0) -> None:
        """Adds tokens at the end; the buffers double when full.

        reserve: tokens that there is room for from the start; then the buffers never have room for more than they hold.
        """
        end = self.used + keys.shape[2]
        # Buffers made in inference mode cannot be written outside of it.
        is_frozen = self.key_buffer.is_inference() and not torch.is_inference_mode_enabled()
        if end > self.key_buffer.shape[2] or is_frozen or not self.is_writable:
            self._resize(max(end, reserve) if reserve else max(end, 2 * self.used, MIN_CAPACITY))
        self.key_buffer[:, :, self.used : end] = keys
        self.value_buffer[:, :, self.used : end] = values
        self.used = end

    def _resize(self, capacity: int) -> None:
        self.key_buffer = _grown(self.keys, capacity)
        self.value_buffer = _grown(self.values, capacity)
        self.is_writable = True

    def drop_last(self, count: int, reserve: int = 0) -> None:
        """Forgets the last `count` tokens. reserve: as in `append`."""
        self.used -= count
        if 0 < reserve < self.key_buffer.shape[2]:
            self._resize(max(self.used, reserve))

    def select_rows(self, index: Tensor) -> "Tail":
        """The rows of `index`, copied."""
        return Tail.of(self.keys.index_select(0, index), self.values.index_select(0, index))

    def clone(self) -> "Tail":
        """A tail with buffers of its own."""
        return Tail.of(self.keys.clone(), self.values.clone())


def _alone(tensor: Keys | Values) -> Tensor:
    """The tensor in order, not keeping more storage alive than it needs itself."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)


def _grown(held: Float[Tensor, "b h t d"], capacity: int) -> Float[Tensor, "b h c d"]:
    b, h, t, d = held.shape
    buffer = torch.empty(b, h, capacity, d, dtype=held.dtype, device=held.device)
    buffer[:, :, :t] = held
    return buffer
