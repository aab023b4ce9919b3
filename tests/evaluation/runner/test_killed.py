import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from tests.evaluation.runner.killed_run import run

ROOT = Path(__file__).parents[3]


def _sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "records").glob("*.jsonl"))


def _kill_after(folder: Path, num_bytes: int, delay: float) -> int:
    """Runs into the folder and kills the run `delay` seconds after so many bytes of records; its exit status."""
    command = [sys.executable, "-m", "tests.evaluation.runner.killed_run", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and _sizes(folder) < num_bytes:
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    return process.returncode


def test_a_killed_run_goes_on_to_the_same_bytes_as_one_that_was_left_alone(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run(whole)
    total = _sizes(whole)
    rng = Random()
    assert _kill_after(killed, int(total * (0.1 + 0.6 * rng.random())), 0.03 * rng.random()) == -signal.SIGKILL
    assert 0 < _sizes(killed) < total
    run(killed)
    expected = {path.name: path.read_bytes() for path in (whole / "records").iterdir()}
    assert {path.name: path.read_bytes() for path in (killed / "records").iterdir()} == expected
