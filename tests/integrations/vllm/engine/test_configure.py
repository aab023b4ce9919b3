"""What is refused before a model is loaded, what is switched off, and that nothing happens without the option."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import defensivekv as dkv

SCRIPT = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
told = []
for case in json.loads(sys.argv[1]):
    options = case.pop("options")
    if options is not None:
        case["additional_config"] = {"defensivekv": options}
    try:
        config = EngineArgs(sys.argv[2], max_model_len=512, **case).create_engine_config()
        told.append({
            "worker": config.parallel_config.worker_cls,
            "prefix_caching": config.cache_config.enable_prefix_caching,
        })
    except Exception as error:
        told.append({"error": type(error).__name__ + ": " + str(error)})
print("TOLD" + json.dumps(told))
"""

DEFENSIVE = {"policy": "defensivekv", "budget": 0.2}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"options": {"policy": "defensivkv", "budget": 0.2}}, "UnknownPolicyError: unknown policy 'defensivkv': did you"),
    ({"options": {"policy": "defensivekv"}}, "BudgetError: policy 'defensivekv' needs a budget"),
    ({"options": {"policy": "defensivekv", "budgt": 0.2}}, "InvalidInputError: additional_config 'defensivekv': budgt"),
    ({"options": 0.2}, "InvalidInputError: additional_config 'defensivekv' is 0.2: give options"),
    ({"options": {"policy": "kvzip", "budget": 0.2}}, "InvalidInputError: policy 'kvzip' cannot be served"),
    ({"options": {"policy": "h2o", "budget": 0.2}}, "InvalidInputError: policy 'h2o' cannot be served"),
    ({"options": {"policy": "snapkv", "budget": "auto:0.9"}}, "InvalidInputError: budget auto:0.9 cannot be served"),
    ({"options": {"policy": "snapkv", "budget": 0.2, "head_groups": 3}}, "4 key-value heads cannot be shared out"),
    ({"options": {"policy": "snapkv", "budget": "64MiB"}}, "InvalidInputError: budget 64.0 MiB cannot be served"),
    ({"options": DEFENSIVE, "kv_cache_dtype": "fp8"}, "does not support a cache of dtype fp8"),
    ({"options": DEFENSIVE, "pipeline_parallel_size": 2}, "does not support pipeline parallelism"),
    ({"options": DEFENSIVE, "tensor_parallel_size": 2}, "UnsupportedModelError: policy 'defensivekv' shares a budget"),
    ({"options": DEFENSIVE, "enable_lora": True}, "does not support LoRA adapters"),
]


def configure(*cases: dict[str, Any], **environment: str) -> tuple[list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases), dkv.demo_model()],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD"))
    told: list[dict[str, Any]] = json.loads(line[4:])
    return told, done.stdout + done.stderr


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, Any]]:
    return configure(*(dict(case) for case, _ in REFUSED))[0]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_served_is_refused_by_name(refusals: list[dict[str, Any]], number: int) -> None:
    assert REFUSED[number][1] in refusals[number].get("error", refusals[number])


def test_without_the_option_nothing_is_changed() -> None:
    (plain, evicting), log = configure({"options": None}, {"options": DEFENSIVE})
    assert plain == {"worker": "vllm.v1.worker.cpu_worker.CPUWorker", "prefix_caching": True}
    assert evicting == {
        "worker": "defensivekv.integrations.vllm.cpu_worker.EvictingCPUWorker",
        "prefix_caching": False,
    }
    assert log.count("prefix caching is switched off") == 1


def test_another_release_of_vllm_is_refused_where_the_option_is_given(tmp_path: Path) -> None:
    info = tmp_path / "vllm-0.99.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0+cpu\n")
    told, _ = configure({"options": None}, {"options": DEFENSIVE}, PYTHONPATH=str(tmp_path))
    assert "error" not in told[0]
    assert "UnsupportedModelError: vLLM 0.99.0 is not supported" in told[1]["error"]
