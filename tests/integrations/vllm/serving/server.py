"""A server in a process group of its own, and what it says of itself."""

import importlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "needleworld"
"""The name it is served by."""

BLOCK_SIZE = 128
BLOCKS = 40
"""Of the pool, without the one that vLLM keeps for itself."""

MAX_LENGTH = 4096
MAX_STEP = 1024
"""Tokens of a step: longer prompts are read in chunks, beside what other requests generate."""

MAX_REQUESTS = 8
READ_WHOLE = MAX_STEP - MAX_REQUESTS
"""Tokens of the longest prompt that is read in one pass."""

START_LIMIT_S = 300
IDLE_LIMIT_S = 30

_OPTIONS = {
    "served-model-name": MODEL,
    "dtype": "float32",
    "max-model-len": MAX_LENGTH,
    "max-num-batched-tokens": MAX_STEP,
    "max-num-seqs": MAX_REQUESTS,
    "block-size": BLOCK_SIZE,
    "num-gpu-blocks-override": BLOCKS + 1,
}
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_CHAT = "<bos> {% for message in messages %}{{ message.content }} {% endfor %}"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "DO_NOT_TRACK": "1",
}


class Server:
    """Starts at once; answers after `wait`; ends with `stop`.

    command: up to the options that are the same for all. log: a file for what it writes.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with log.open("w") as written:
            self._process = subprocess.Popen(
                [*command, *self._options()],
                env={**os.environ, **_ENVIRONMENT},
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _options(self) -> list[str]:
        named = {**_OPTIONS, "chat-template": _CHAT, "host": "127.0.0.1", "port": self.url.rpartition(":")[2]}
        return ["--enforce-eager", *(f"--{name}={value}" for name, value in named.items())]

    def wait(self) -> None:
        """Until it answers. Fails with the end of its log."""
        end = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"{self._process.args!r} does not answer:\n{self.log.read_text()[-8000:]}")

    def connect(self) -> Any:
        """OpenAI's own client."""
        openai = importlib.import_module("openai")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The value of a metric that has one."""
        (line,) = (line for line in self.get("/metrics").splitlines() if line.startswith(f"vllm:{name}{{"))
        return float(line.rpartition(" ")[2])

    @property
    def blocks(self) -> int:
        """Blocks of the pool that requests hold."""
        return round(self.metric("kv_cache_usage_perc") * BLOCKS)

    def wait_until_idle(self) -> None:
        """Until it has nothing to do, and holds nothing."""
        self._wait_until(lambda: not any(self.metric(name) for name in _GAUGES))

    def wait_until_generated(self, total: float) -> None:
        """Until its counter has come to that: metrics come a little after the tokens."""
        self._wait_until(lambda: self.metric("generation_tokens_total") >= total)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + IDLE_LIMIT_S
        while not is_so():
            assert time.monotonic() < end, {name: self.metric(name) for name in _GAUGES}
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends every process of its group."""
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, ending)
                self._process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
