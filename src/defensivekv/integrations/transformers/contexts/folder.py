"""Files by key in one folder of this machine, used by any number of processes at once.

KEY.kv           whole, always: a file takes that name by being renamed
.KEY.kv.*.part   being written, by a process that holds a lock on it; without one, left by a process that died
.lock            held while names come and go

The time of a file's last change is that of its last use.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from filelock import FileLock

from defensivekv.budget import format_bytes
from defensivekv.errors import InvalidInputError
from defensivekv.folders import part_of, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".kv"
_KEY = re.compile(r"[0-9a-f]{64}")
_YOUNG = 60.0
"""Seconds in which a part may not be locked yet."""
_OLD = 86_400.0
"""Seconds after which a part is given up, where locks cannot tell."""


@dataclass(frozen=True)
class Held:
    """One file. nbytes: its size. used: when it was last used, seconds since 1970."""

    key: str
    nbytes: int
    used: float


def check_key(key: object) -> str:
    """The key. Raises InvalidInputError for what is none."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidInputError(f"{key!r} is no key of a context: give 64 hexadecimal digits, as Context.key does")
    return key


def leaving(held: list[Held], room: int) -> list[Held]:
    """Which files have to go, the least recently used first, so that those that stay fit into `room` bytes."""
    total, going = sum(one.nbytes for one in held), []
    for one in sorted(held, key=lambda one: one.used):
        if total <= room:
            break
        going.append(one)
        total -= one.nbytes
    return going


def check_fits(nbytes: int, max_bytes: int | None) -> None:
    """Raises InvalidInputError for a file that is larger than the whole store may be."""
    if max_bytes is not None and nbytes > max_bytes:
        raise InvalidInputError(
            f"the context takes {format_bytes(nbytes)}, more than the {format_bytes(max_bytes)} of the whole store: "
            "give it a larger max_bytes, or compress further"
        )


class Folder:
    """The folder, made if it is not there. max_bytes: of all files together; None: no limit.

    Raises InvalidInputError where it cannot be written to.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(f"cannot keep contexts in {str(path)!r}: {error}: give another folder") from error

    def place(self, key: str) -> Path:
        """Where the file of that key is, if it is there."""
        return self.path / (check_key(key) + SUFFIX)

    def use(self, key: str) -> None:
        """Notes that a file is used now; nothing where it is gone meanwhile, or the folder is for reading alone."""
        with contextlib.suppress(OSError):
            os.utime(self.place(key))

    def put(self, key: str, write: Callable[[BinaryIO], None]) -> Path:
        """Writes a file whole, in place of one that may be there, and makes room for it.

        Raises InvalidInputError where it is larger than all may be together, or the disk is full.
        """
        path = self.place(key)
        part = part_of(path)
        try:
            with part.open("xb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
                check_fits(size, self.max_bytes)
                with self._locked():
                    self._sweep()
                    if self.max_bytes is not None:
                        others = [one for one in self.held() if one.key != key]
                        self._drop(leaving(others, self.max_bytes - size))
                    part.replace(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.path.is_dir():
                # What was to be written is gone.
                raise
            raise InvalidInputError(f"cannot write to {str(self.path)!r}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        sync_folder(self.path)
        return path

    def remove(self, key: str) -> bool:
        """Whether a file was there, which is gone now. Who has it mapped keeps it.

        Raises InvalidInputError where the folder is for reading alone.
        """
        if not self.place(key).exists():
            return False
        with self._locked():
            return bool(self._drop([Held(key, 0, 0.0)]))

    def prune(self, max_bytes: int | None) -> list[str]:
        """Removes what processes that died left, and the least recently used files beyond `max_bytes`; gives keys.

        Raises InvalidInputError where the folder is for reading alone.
        """
        with self._locked():
            self._sweep()
            return [] if max_bytes is None else self._drop(leaving(self.held(), max_bytes))

    def held(self) -> list[Held]:
        """All files, the most recently used first. Raises InvalidInputError where the folder cannot be read."""
        found = []
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise InvalidInputError(f"cannot read {str(self.path)!r}: {error}") from error
        for path in (self.path / name for name in names if name.endswith(SUFFIX)):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if not _KEY.fullmatch(path.stem) or not S_ISREG(stat.st_mode):
                continue
            found.append(Held(path.stem, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda one: -one.used)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """For names that come and go. A new lock each time: a process that was forked cannot use its parent's."""
        try:
            lock = FileLock(self.path / ".lock")
            lock.acquire()
        except OSError as error:
            raise InvalidInputError(f"cannot change {str(self.path)!r}: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def _drop(self, going: list[Held]) -> list[str]:
        gone = []
        for one in going:
            try:
                self.place(one.key).unlink()
            except FileNotFoundError:
                continue
            except PermissionError as error:
                if os.name == "nt":  # Somebody has it mapped.
                    continue
                raise InvalidInputError(f"cannot change {str(self.path)!r}: {error}") from error
            gone.append(one.key)
        return gone

    def _sweep(self) -> None:
        """Removes parts whose writers are gone."""
        for part in self.path.glob(f".*{SUFFIX}.*.part"):
            try:
                age = time.time() - part.stat().st_mtime
                if age > (_YOUNG if fcntl is not None else _OLD) and not _is_locked(part):
                    part.unlink()
            except OSError:
                continue


def _is_locked(path: Path) -> bool:
    if fcntl is None:
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
