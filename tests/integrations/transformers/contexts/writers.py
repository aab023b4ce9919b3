"""Writers that can be killed: `python -m tests.integrations.transformers.contexts.writers FOLDER MAX_BYTES`.

For each line of standard input, a process is forked that does what the line says, and its number is printed.
"write SEED": puts files for ever. "use SEED SECONDS": puts, reads and removes files. "wait": prints how all of them
ended.
"""

import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from defensivekv.cache.tensor_file import TensorFile, write_tensors
from defensivekv.integrations.transformers.contexts.folder import Folder

KEYS = [f"{number:064x}" for number in range(8)]
FLOATS = 50_000


def content_of(key: str) -> torch.Tensor:
    """What a file of that key holds."""
    return torch.full((FLOATS,), float(int(key, 16)))


def writes(key: str) -> Callable[[BinaryIO], None]:
    """Writes the file of that key."""
    return lambda file: write_tensors(file, {"a": content_of(key)}, {})


def check(path: Path) -> None:
    """That a file is whole, and its key's."""
    file = TensorFile(path)
    file.verify(file.names)
    assert torch.equal(file["a"], content_of(path.stem))


def _write(folder: Folder, seed: int) -> None:
    draw = random.Random(seed)
    while True:
        key = draw.choice(KEYS)
        folder.put(key, writes(key))


def _use(folder: Folder, seed: int, seconds: float) -> None:
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        key, what = draw.choice(KEYS), draw.random()
        if what < 0.5:
            folder.put(key, writes(key))
        elif what < 0.6:
            folder.remove(key)
        else:
            try:
                check(folder.place(key))
                folder.use(key)
            except FileNotFoundError:
                continue


def main() -> None:
    """Forks what standard input asks for."""
    torch.set_num_threads(1)
    folder = Folder(Path(sys.argv[1]), int(sys.argv[2]) or None)
    children: list[int] = []
    for line in sys.stdin:
        words = line.split()
        if words[0] == "wait":
            print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
            children = []
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if words[0] == "write":
                    _write(folder, int(words[1]))
                else:
                    _use(folder, int(words[1]), float(words[2]))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
        print(child, flush=True)


if __name__ == "__main__":
    main()
