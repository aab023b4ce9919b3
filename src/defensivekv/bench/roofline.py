"""How fast the machine could be: the speed of its memory and of its matrix products, and the times that follow."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from defensivekv.bench.timing import seconds

_BUFFER = {"cpu": 2**28, "cuda": 2**31}
_REPEATS = 7
_TRIES = 3
_MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Roofline:
    """read, copy: bytes/s read from memory, alone and while as many are written. matmul: FLOP/s of the dtype."""

    read: float
    copy: float
    matmul: float


class ReadProbe:
    """Reads a buffer much larger than a CPU's caches, so that others' steps can be held against it in the same turn."""

    def __init__(self, device: torch.device) -> None:
        half = _BUFFER.get(device.type, 2**28) // 8
        self._device = device
        self._halves = torch.ones(half, device=device), torch.ones(half, device=device)
        self.nbytes = 8 * half

    def seconds(self) -> float:
        """Of reading it once: a dot product of its halves, which no other operation of torch reads faster than."""
        return seconds(lambda: torch.dot(*self._halves), self._device)

    def speed(self) -> float:
        """Bytes/s, the best of a few tries: what steps are held against is a bound."""
        return self.nbytes / min(self.seconds() for _ in range(_TRIES))


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Medians of several tries. In half a gigabyte of memory, eight on a GPU."""
    probe = ReadProbe(device)
    source = torch.ones(probe.nbytes // 4, device=device)
    target = torch.empty_like(source)
    size = _MATRIX.get(device.type, 2048)
    left = torch.randn(size, size, device=device).to(dtype)
    right = left.mT.contiguous()
    read = _median(probe.seconds)
    copy = _median(lambda: seconds(lambda: target.copy_(source), device))
    product = _median(lambda: seconds(lambda: left @ right, device))
    return Roofline(probe.nbytes / read, source.nbytes / copy, 2 * size**3 / product)


def _median(timed: Callable[[], float]) -> float:
    timed()
    return median(timed() for _ in range(_REPEATS))


def prefill_flops(parameters: int, embedding: int, tokens: int, layers: int, query_width: int) -> int:
    """Operations of a prompt: two for each weight but the embeddings' and token, and causal attention.

    query_width: query heads times their size. The output's projection is of the last token alone, and left out.
    """
    weights = 2 * (parameters - embedding) * tokens
    return weights + layers * 2 * query_width * tokens**2


def floor_seconds(read_bytes: int | None, bytes_per_second: float) -> float | None:
    """The time below which nothing that reads so many bytes can come."""
    return None if read_bytes is None else read_bytes / bytes_per_second
