"""The other end of a worker: a process that is asked one thing at a time; see `workers/protocol.py`."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from defensivekv.errors import RivalError

_ENTRY = Path(__file__).resolve().parent.parent / "workers" / "__main__.py"


class WorkerProcess:
    """Runs `command`, whose errors and chatter go to the file `log`.

    Raises RivalError where it ends by itself or answers with an error.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **(environment or {})},
                text=True,
                encoding="utf-8",
            )

    @classmethod
    def of_rival(cls, name: str, python: str, threads: int, log: Path) -> "WorkerProcess":
        """The worker of that name in that Python."""
        # What this process was told of its own packages is not meant for another's.
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
        return cls([python, str(_ENTRY), name], log, environment)

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise RivalError(f"the process ended with status {status}: {self._last_words()} (all of it in {self._log})")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise RivalError(f"the process answered {line[:100]!r}, which is no JSON") from None
        if "error" in answer:
            raise RivalError(f"{answer['error']} (log: {self._log})")
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """Ends the process: by the end of its input, or, where it does not notice, by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
