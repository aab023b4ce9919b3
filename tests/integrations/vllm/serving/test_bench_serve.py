import json
import subprocess
import sys
from pathlib import Path

import pytest

from defensivekv.needleworld import demo_model
from tests.integrations.vllm.serving.server import MODEL, Server

NUM_PROMPTS, INPUT, OUTPUT = 16, 256, 16
LIMIT_S = 200


@pytest.mark.parametrize("backend", ["openai"])
def test_vllm_bench_serve_has_every_request_answered(evicting: Server, tmp_path: Path, backend: str) -> None:
    options = {
        "backend": backend,
        "base-url": evicting.url,
        "model": demo_model(),
        "served-model-name": MODEL,
        "dataset-name": "random",
        "random-input-len": INPUT,
        "random-output-len": OUTPUT,
        "num-prompts": NUM_PROMPTS,
        "result-dir": tmp_path,
        "result-filename": "result.json",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--ignore-eos", "--save-result"]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0)
    assert result["total_output_tokens"] == NUM_PROMPTS * OUTPUT
    evicting.wait_until_idle()
