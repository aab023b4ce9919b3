"""Folders that runs write to, and files in them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name once it is whole and on the disk; until then there is what was there before.

    Raises InvalidInputError where the name is that of something else, such as a folder or a device.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{str(path)!r} is no file that could be written anew: give another name")
    part = part_of(path)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def part_of(path: Path) -> Path:
    """A name beside it for what is not whole yet, which nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
