import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import ROOT
from benchmarks.result import Result, Target
from benchmarks.suite import BENCHMARKS


def test_the_quick_run_writes_settings_versions_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "result.json"
    main(["--quick", "--threads", str(threads), "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["threads"] == threads
    assert found["versions"]["torch"] == torch.__version__
    assert found["not_run"] == []
    names = {result["name"] for result in found["results"]}
    speed = {"attention-float32", "attention-bfloat16", "attention-float16", "decode-step", "logical-length", "prefill"}
    steps = {"window-scores", "value-norm", "compaction"}
    endless = {f"endless-{name}" for name in ("layer-defensivekv", "h2o", "tova", "streaming-llm")}
    assert names == speed | steps | endless | {"memory"}
    for result in found["results"]:
        assert result["settings"]
        assert all(len(times) > 0 and min(times) > 0 for times in result["samples_s"].values())
        assert result["targets"] == [], "tiny shapes are held against no target"
    assert str(output) in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    message = capsys.readouterr().err
    assert all(name in message for name in BENCHMARKS)


def test_targets_say_whether_they_are_met() -> None:
    met, missed = Target("speed", 5.0, at_least=4.5), Target("share", 0.1, at_most=0.09)
    assert met.is_met
    assert not missed.is_met
    text = str(Result("name", {"tokens": 4}, {"rival": [0.2, 0.1, 0.3]}, {"ratio": 5.0}, (met, missed)))
    assert "met" in text
    assert "MISSED  share: 0.1 (target: at most 0.09)" in text
    assert "200 ms" in text


def test_the_gpu_command_runs_tests_and_benchmarks_into_one_file(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(output.read_text())
    assert found["tests"]["failed"] == []
    assert found["tests"]["passed"] > 40
    assert found["device_type"] == "cpu"
    assert {result["name"] for result in found["results"]} > {"decode-step", "prefill"}
