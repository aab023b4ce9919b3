"""Rivals that need nothing installed: some of this process, and a worker that is a script."""

import sys
from pathlib import Path
from textwrap import dedent

from defensivekv.bench.rivals.rival import Filling, Prompt
from defensivekv.errors import RivalError

_WORKER = """
import sys
sys.path.append({workers!r})
from workers.protocol import serve

class Fake:
    def __init__(self):
        self.steps = 0
    def load(self, asked):
        print("loading: this is no answer")
        note = f"{{asked.dtype}}, {{asked.threads}} threads"
        return {{"versions": {{"fake": "1"}}, "weight_bytes": 1000, "note": note}}
    def fill(self, asked):
        if asked.tokens > 5000:
            raise MemoryError("too much")
        return {{"handle": 7, "held_bytes": asked.tokens * asked.batch, "note": f"kept {{asked.kept}}"}}
    def step(self, handle):
        self.steps += 1
        return {{"seconds": 0.25 + self.steps / 1000}}
    def prefill(self, asked):
        return {{"seconds": asked.tokens / 1000}}
    def drop(self, handle):
        return {{"steps": self.steps}}

{before}
serve(Fake())
"""


def fake_python(folder: Path, before: str = "") -> str:
    """A Python that imports everything, and serves a fake whatever script it is given. before: what it does first."""
    import defensivekv.bench

    workers = str(Path(defensivekv.bench.__file__).parent)
    script, python = folder / "fake.py", folder / "python"
    script.write_text(dedent(_WORKER).format(workers=workers, before=before))
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {script}\n')
    python.chmod(0o755)
    return str(python)


class FakeStepper:
    """Takes a second for each token, and fails when it is told to."""

    held_bytes, note = 1000, "by hand"

    def __init__(self, name: str, log: list[str], fails_at: int | None) -> None:
        self._name, self._log, self._fails_at = name, log, fails_at
        self._steps = 0

    def step(self) -> float:
        """Says so."""
        self._steps += 1
        if self._steps == self._fails_at:
            raise RuntimeError("out of luck")
        self._log.append(self._name)
        return float(self._steps)

    def close(self) -> None:
        """Says so."""
        self._log.append(f"{self._name} closed")


class FakeRival:
    """Writes what it does to a log. takes: bytes that it needs."""

    fills, reads = True, True

    def __init__(
        self,
        name: str,
        log: list[str],
        *,
        takes: int = 1,
        fails_at: int | None = None,
        absent: str | None = None,
        takes_budget: bool = False,
    ) -> None:
        self.family = self.name = name
        self.takes_budget = takes_budget
        self._log, self._takes, self._fails_at, self._absent = log, takes, fails_at, absent

    def missing(self, batch: int = 1) -> str | None:
        """As it was made."""
        return self._absent

    def start(self) -> None:
        """Nothing is loaded."""

    def needs(self, filling: Filling) -> int:
        """As it was made."""
        return self._takes

    def read_bytes(self, held: int) -> int | None:
        """As much again in weights."""
        return 2 * held

    def fill(self, filling: Filling) -> FakeStepper:
        """Fails where it is to fail at once."""
        if self._fails_at == 0:
            raise RivalError("cannot be filled")
        return FakeStepper(self.name, self._log, self._fails_at)

    def read(self, prompt: Prompt) -> float:
        """A millisecond for each token."""
        self._log.append(f"{self.name} {prompt.tokens}")
        return prompt.tokens / 1000

    def describe(self) -> dict[str, object]:
        """Nothing."""
        return {}
