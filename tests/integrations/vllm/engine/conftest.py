"""Tests inside vLLM, each engine in a process of its own; `make test-vllm` runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

START_LIMIT_S = 600

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a job of `driver.py` in an engine of its own, in one process or in vLLM's; gives what it wrote."""

    def start(job: dict[str, Any], *, processes: bool = False, **environment: str) -> dict[str, Any]:
        asked, answer = tmp_path / "job.json", tmp_path / "result.json"
        asked.write_text(json.dumps(job))
        answer.unlink(missing_ok=True)
        variables = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_CI_ENV": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.integrations.vllm.engine.driver", str(asked), str(answer)],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        result: dict[str, Any] = json.loads(answer.read_text())
        return {**result, "log": done.stdout + done.stderr}

    return start
