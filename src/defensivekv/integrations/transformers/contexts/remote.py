"""Files by key at an address of fsspec's: a bucket that many machines share.

KEY.kv     whole: object stores show an object once all of it is there; elsewhere it is renamed when it is
KEY.used   of no content; its time is that of KEY.kv's last use
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.contexts.folder import SUFFIX, Held, check_fits, check_key, leaving

_USED = ".used"
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"})
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


class Remote:
    """What lies at an address such as `s3://bucket/contexts`. Machines that make room at once may make too much.

    max_bytes: of all files together. options: for fsspec, such as credentials.
    Raises InvalidInputError for an address that fsspec cannot open; every method, where it does not answer or refuses.
    """

    def __init__(self, address: str, max_bytes: int | None, options: dict[str, Any]) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(address, **options)
        except (ImportError, ValueError) as error:
            raise InvalidInputError(f"cannot keep contexts at {address!r}: {error}") from error
        self.address = address
        self.max_bytes = max_bytes
        protocols = self._files.protocol
        self._is_atomic = not _OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)

    def has(self, key: str) -> bool:
        """Whether the file of that key is there."""
        with self._reaching():
            self._files.invalidate_cache()
            return bool(self._files.exists(self._place(key)))

    def fetch(self, key: str) -> Callable[[BinaryIO], None]:
        """What writes the file of that key into another. Raises FileNotFoundError then, where it is gone."""

        def write(file: BinaryIO) -> None:
            with self._reaching(), self._files.open(self._place(key), "rb") as there:
                while part := there.read(2**24):
                    file.write(part)

        return write

    def use(self, key: str) -> None:
        """Notes that a file is used now; nothing where the address is for reading alone."""
        with contextlib.suppress(InvalidInputError), self._reaching():
            self._files.pipe_file(self._place(key, _USED), b"")

    def put(self, key: str, path: Path) -> None:
        """Brings a file there, and makes room for it. Raises InvalidInputError where it is larger than all may be."""
        size = path.stat().st_size
        check_fits(size, self.max_bytes)
        if self.max_bytes is not None:
            self._drop(leaving([one for one in self.held() if one.key != key], self.max_bytes - size))
        with self._reaching():
            self._files.makedirs(self._root, exist_ok=True)
            if self._is_atomic:
                self._files.put_file(str(path), self._place(key))
            else:
                part = f"{self._root}/.{key}.{uuid.uuid4().hex}.part"
                self._files.put_file(str(path), part)
                self._files.mv(part, self._place(key))
        self.use(key)

    def remove(self, key: str) -> bool:
        """Whether a file was there, which is gone now."""
        return bool(self._drop([Held(check_key(key), 0, 0.0)]))

    def prune(self, max_bytes: int | None) -> list[str]:
        """Removes the least recently used files beyond `max_bytes`; gives their keys."""
        return [] if max_bytes is None else self._drop(leaving(self.held(), max_bytes))

    def held(self) -> list[Held]:
        """All files, the most recently used first."""
        used: dict[str, float] = {}
        sizes: dict[str, int] = {}
        with self._reaching():
            self._files.invalidate_cache()
            try:
                listed = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            for info in listed:
                name = str(info["name"]).rsplit("/", 1)[-1]
                key, dot, ending = name.rpartition(".")
                if dot + ending in (SUFFIX, _USED) and len(key) == 64:
                    used[key] = max(used.get(key, 0.0), self._time(info))
                    if dot + ending == SUFFIX:
                        sizes[key] = int(info["size"])
        held = [Held(key, size, used[key]) for key, size in sizes.items()]
        return sorted(held, key=lambda one: -one.used)

    def open(self, key: str) -> BinaryIO:
        """The file of that key, to be read in parts. Raises FileNotFoundError where it is gone."""
        with self._reaching():
            file: BinaryIO = self._files.open(self._place(key), "rb", block_size=2**16)
        return file

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Names the address where it does not answer: fsspec's places raise errors of many libraries."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise InvalidInputError(f"{self.address} refuses, or cannot be reached: {error!r}") from error

    def _place(self, key: str, ending: str = SUFFIX) -> str:
        return f"{self._root}/{check_key(key)}{ending}"

    def _time(self, info: dict[str, Any]) -> float:
        found = next((info[name] for name in _TIMES if info.get(name) is not None), None)
        if found is None:
            found = self._files.modified(info["name"])
        if isinstance(found, str):
            found = datetime.fromisoformat(found)
        if isinstance(found, datetime):
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        return float(found)

    def _drop(self, going: list[Held]) -> list[str]:
        gone = []
        for one in going:
            there = self.has(one.key)
            for ending in (SUFFIX, _USED):
                with contextlib.suppress(FileNotFoundError), self._reaching():
                    self._files.rm_file(self._place(one.key, ending))
            if there:
                gone.append(one.key)
        return gone
