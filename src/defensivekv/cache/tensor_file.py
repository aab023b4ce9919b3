"""One file of named tensors, mapped instead of read, and checked before it is trusted.

A safetensors file, which anything that reads those reads, with two things of its own:

- data begins at a multiple of 64 bytes, and tensors whose size is one too come first, so that kernels find mapped rows
  aligned as they find those of a new tensor, and give the same bits;
- the metadata hold a checksum (xxh3, 128 bits) of each tensor and of the header itself.

Knows no policy, no model and no cache.
"""

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor

from defensivekv.errors import DamagedContextError

ALIGNMENT = 64
_LENGTH_BYTES = 8
_MOST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""Older versions keep one for each mapping."""


@runtime_checkable
class Readable(Protocol):
    """A file that is open, here or elsewhere."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...


@runtime_checkable
class Writable(Protocol):
    """A file that is open to be written."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Adds the bytes."""
        ...


def checksum(tensor: Tensor) -> str:
    """Of the bytes of a contiguous tensor on the CPU."""
    return str(xxhash.xxh3_128_hexdigest(_bytes_of(tensor)))


def write_tensors(file: Writable, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, of any device, at the file's current place. One at a time is copied off a GPU.

    metadata: names and texts; "checksums" and "header_checksum" are added.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].element_size()))
    sums = {name: checksum(_on_cpu(tensors[name])) for name in order}
    entries: dict[str, Any] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        offsets = [start, start + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        start += tensor.nbytes
    entries["__metadata__"] = {**metadata, "checksums": json.dumps(sums, sort_keys=True)}
    entries["__metadata__"]["header_checksum"] = _header_checksum(entries)
    header = json.dumps(entries).encode()
    header += b" " * (-(_LENGTH_BYTES + len(header)) % ALIGNMENT)
    file.write(struct.pack("<Q", len(header)) + header)
    for name in order:
        file.write(_bytes_of(_on_cpu(tensors[name])))


def read_header(file: Readable, name: str) -> dict[str, Any]:
    """The header of a file that is open at its beginning: what it says of each tensor, and "__metadata__".

    name: of the file, for messages. Raises DamagedContextError where it is not one that `write_tensors` wrote.
    """
    try:
        (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
        if length > _MOST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        entries: dict[str, Any] = json.loads(file.read(length).decode())
        claimed = entries["__metadata__"]["header_checksum"]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DamagedContextError(f"{name} is no stored context, or its header is damaged: {error}") from None
    if claimed != _header_checksum(entries):
        raise DamagedContextError(f"{name}: the header is damaged: its checksum differs")
    return entries


class TensorFile:
    """Tensors of a file. On the CPU they are the file's own pages, mapped: nothing is read before it is used.

    The file is opened once: what takes its name later, or that it is removed, changes nothing. Opening checks the
    header and the file's size; `verify` what the tensors hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._entries = read_header(file, str(path))
            self.metadata: dict[str, str] = self._entries.pop("__metadata__")
            self._start, size = file.tell(), os.fstat(file.fileno()).st_size
            try:
                ends = [_end(entry) for entry in self._entries.values()]
                self._sums: dict[str, str] = dict(json.loads(self.metadata["checksums"]))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DamagedContextError(f"{path}: its header makes no sense: {error!r}") from None
            self._check_size(size, max(ends, default=0))
            # Private: who writes to a tensor by mistake does not write to the file.
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, **_NO_DESCRIPTOR)
        self._unverified = set(self._entries)

    def _check_size(self, size: int, end: int) -> None:
        """Raises DamagedContextError where the data are not as many bytes as the header says."""
        whole = self._start + end
        if size != whole:
            raise DamagedContextError(f"{self.path} has {size} bytes in place of {whole}: it was cut off or damaged")

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors."""
        return frozenset(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU, mapped. Not to be written to."""
        entry = self._entries[name]
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - start) // dtype.itemsize
        tensor: Tensor = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=self._start + start)
        return tensor.view(shape)

    def verify(self, names: Iterable[str]) -> None:
        """Reads these tensors and compares checksums, once. Raises DamagedContextError, which names the tensor."""
        for name in sorted(self._unverified.intersection(names)):
            if checksum(self[name]) != self._sums.get(name):
                raise DamagedContextError(f"{self.path}: {name} is damaged: its checksum differs")
            self._unverified.discard(name)


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor's data end. Raises ValueError where dtype, shape and place do not agree."""
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if min(start, *shape, 0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} from {start} to {end}")
    return int(end)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header_checksum(entries: dict[str, Any]) -> str:
    metadata = {name: text for name, text in entries["__metadata__"].items() if name != "header_checksum"}
    return str(xxhash.xxh3_128_hexdigest(json.dumps({**entries, "__metadata__": metadata}, sort_keys=True).encode()))
