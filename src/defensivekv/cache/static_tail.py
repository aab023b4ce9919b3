"""The growing part of a layer's cache in buffers that never move, so that a compiled decoding step can write to it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.errors import CacheError
from defensivekv.types import Keys, Values


class StaticTail:
    """Keys and values of recent tokens in buffers of one size for life.

    How many are held is itself a tensor, beside them on the device: a compiled step, or a captured CUDA graph, that
    runs again without Python goes on where it stopped. Asking for it in Python waits for the device.

    key_buffer: (b, h, capacity, d).  value_buffer: (b, h, capacity, v).  count: () int64, tokens held.
    """

    def __init__(self, key_buffer: Tensor, value_buffer: Tensor, count: Int[Tensor, ""]) -> None:
        self.key_buffer = key_buffer
        self.value_buffer = value_buffer
        self.count = count
        for buffer in (key_buffer, value_buffer, count):
            # Another cache's buffers are read by the same compiled code.
            torch._dynamo.mark_static_address(buffer, guard=False)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], sizes: tuple[int, int], like: Tensor) -> "StaticTail":
        """Room for tokens, and none held. shape: (b, h, capacity). sizes: d, v. like: dtype and device."""
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            # Zeros: masked entries have no weight, but would still be NaN where memory holds one.
            keys, values = (torch.zeros(*shape, size, dtype=like.dtype, device=like.device) for size in sizes)
            return cls(keys, values, torch.zeros((), dtype=torch.long, device=like.device))

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return int(self.key_buffer.shape[2])

    @property
    def used(self) -> int:
        """Tokens held, as a number."""
        return int(self.count)

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
        return self.key_buffer.nbytes + self.value_buffer.nbytes + self.count.nbytes

    def append(self, keys: Keys, values: Values, reserve: int = 0) -> None:
        """Adds tokens at the end. Raises CacheError where there is no room."""
        self.check_room(keys.shape[2])
        self.write(keys, values)

    def check_room(self, num_tokens: int) -> None:
        """Raises CacheError where there is no room for so many more."""
        used = self.used
        if used + num_tokens > self.capacity:
            raise CacheError(
                f"the cache has room for {self.capacity} tokens after its prompt, {used} are in it and {num_tokens} "
                "more came: make it with a larger static_tokens"
            )

    def write(self, keys: Float[Tensor, "b h x d"], values: Float[Tensor, "b h x v"]) -> None:
        """As `append`, by tensors alone: for compiled code, which checks that places lie within the buffers."""
        places = self.count + torch.arange(keys.shape[2], device=self.count.device)
        self.key_buffer.index_copy_(2, places, keys)
        self.value_buffer.index_copy_(2, places, values)
        self.count.add_(keys.shape[2])

    def drop_last(self, count: int, reserve: int = 0) -> None:
        """Forgets the last `count` tokens."""
        self.count.sub_(count)

    def select_rows(self, index: Tensor) -> "StaticTail":
        """The rows of `index`, copied."""
        with torch.inference_mode(False):
            keys, values = (buffer.index_select(0, index) for buffer in (self.key_buffer, self.value_buffer))
            return StaticTail(keys, values, self.count.clone())

    def clone(self) -> "StaticTail":
        """A tail with buffers of its own."""
        with torch.inference_mode(False):
            return StaticTail(self.key_buffer.clone(), self.value_buffer.clone(), self.count.clone())
