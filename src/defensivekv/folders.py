"""Folders that runs write to, and files in them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from defensivekv.errors import InvalidInputError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone, made if it is not there. Raises InvalidInputError where another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InvalidInputError(
            f"another run is writing to {str(folder)!r}: wait for it, stop it, or give another folder"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"cannot write to {str(folder)!r}: {error}: give another folder") from error
    try:
        yield
    finally:
        lock.release()


def replace_file(path: Path, text: str) -> None:
    """Writes the file whole, or leaves it as it was."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
