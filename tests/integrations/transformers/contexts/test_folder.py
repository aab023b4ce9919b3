"""Many processes on one folder, some of which die: what can be seen is always whole."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import defensivekv as dkv
from defensivekv.integrations.transformers.contexts.folder import Folder, Held, leaving
from tests.integrations.transformers.contexts.writers import FLOATS, KEYS, check, writes


class Writers:
    """Processes that are told what to do."""

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.integrations.transformers.contexts.writers",
            str(folder),
            str(max_bytes),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, line: str) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return [int(word) for word in self._process.stdout.readline().split()]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    made = Writers(tmp_path)
    yield made
    made.close()


def test_writers_killed_at_any_moment_leave_whole_files_alone(tmp_path: Path, writers: Writers) -> None:
    draw, folder, parts, seen = random.Random(0), Folder(tmp_path, None), 0, set()
    for number in range(40):
        (child,) = writers.tell(f"write {number}")
        time.sleep(draw.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        assert writers.tell("wait") == [-signal.SIGKILL]
        for one in folder.held():
            check(folder.place(one.key))
            seen.add(one.key)
        parts = max(parts, len(list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))))
    assert seen == set(KEYS), "a writer that never finished would prove nothing"
    assert parts, "nor one that was never interrupted"
    folder.prune(None)
    assert list(tmp_path.glob(".*.part")), "a part that is young may be somebody's"
    for part in tmp_path.glob(".*.part"):
        os.utime(part, (0, 0))
    folder.prune(None)
    assert not list(tmp_path.glob(".*.part"))
    assert {one.key for one in folder.held()} == seen


def test_a_part_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path, None)
    seen: list[Path] = []

    def write(file: object) -> None:
        writes(KEYS[0])(file)  # type: ignore[arg-type]
        for part in tmp_path.glob(".*.part"):
            os.utime(part, (0, 0))
        Folder(tmp_path, None).prune(None)
        seen.extend(tmp_path.glob(".*.part"))

    check(folder.put(KEYS[0], write))
    assert len(seen) == 1


def test_many_processes_read_write_and_remove_within_the_limit(tmp_path: Path) -> None:
    size, writers = 4 * FLOATS + 1000, Writers(tmp_path, 3 * (4 * FLOATS + 1000))
    for number in range(4):
        writers.tell(f"use {number} 3.0")
    largest, end = 0, time.monotonic() + 3.0
    while time.monotonic() < end:
        largest = max(largest, sum(one.nbytes for one in Folder(tmp_path, None).held()))
        time.sleep(0.005)
    assert writers.tell("wait") == [0, 0, 0, 0]
    writers.close()
    assert 2 * size < largest <= 3 * size
    assert not list(tmp_path.glob(".*.part"))
    for one in Folder(tmp_path, None).held():
        check(Folder(tmp_path, None).place(one.key))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 3 * (4 * FLOATS + 1000))
    for number, key in enumerate(KEYS[:3]):
        folder.put(key, writes(key))
        os.utime(folder.place(key), (number, number))
    folder.use(KEYS[0])
    folder.put(KEYS[3], writes(KEYS[3]))
    assert {one.key for one in folder.held()} == {KEYS[0], KEYS[2], KEYS[3]}
    assert folder.prune(4 * FLOATS + 1000) == [KEYS[2], KEYS[0]]
    assert [one.key for one in folder.held()] == [KEYS[3]]
    assert folder.remove(KEYS[3])
    assert not folder.remove(KEYS[3])


def test_what_goes_is_no_more_than_must() -> None:
    held = [Held("a", 5, 3.0), Held("b", 5, 1.0), Held("c", 5, 2.0)]
    assert leaving(held, 15) == []
    assert leaving(held, 14) == [held[1]]
    assert leaving(held, 9) == [held[1], held[2]]
    assert leaving(held, -1) == [held[1], held[2], held[0]]


def test_what_is_too_large_or_no_key_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 1000)
    with pytest.raises(dkv.InvalidInputError, match=r"takes 195\.\d KiB, more than the 1000 B of the whole store"):
        folder.put(KEYS[0], writes(KEYS[0]))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []
    for key in ("../../etc/passwd", "abc", "", "F" * 64):
        with pytest.raises(dkv.InvalidInputError, match="is no key of a context"):
            folder.place(key)
    (tmp_path / "file").write_text("")
    with pytest.raises(dkv.InvalidInputError, match="give another folder"):
        Folder(tmp_path / "file", None)
