"""`python3 -m benchmarks.gpu`: on a machine with a GPU, the tests on it, then the benchmarks; one JSON for both.

Needs torch, transformers, pytest and hypothesis, and no network: the package is run from `src/`, and jaxtyping, where
it is missing, is stood in for.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 6.5 * 60
"""No benchmark is started later than this, so that all is done in eight minutes."""

_NEEDED = ("torch", "transformers", "pytest", "hypothesis")


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; gives the exit status: 0, or 1 where a test failed, or 2 where nothing could be run."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, or cpu to try the command itself")
    parser.add_argument("--quick", action="store_true", help="tiny shapes in the benchmarks")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/<device's name>.json)")
    options = parser.parse_args(arguments)

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(f"missing: {', '.join(missing)}; install them with: python3 -m pip install {' '.join(missing)}")
        return 2
    paths = [str(ROOT / "src"), str(ROOT)]
    if find_spec("jaxtyping") is None:
        print("jaxtyping is not installed: shapes are not checked at run time")
        paths.append(str(ROOT / "benchmarks" / "stand_ins"))
    sys.path[:0] = paths

    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device was found; `--device cpu --quick` shows what would be run")
        return 2

    from benchmarks.suite import BENCHMARKS, RESULTS, run
    from defensivekv.bench.machine import device_name

    tests = run_tests(options.device, paths)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    output = options.output or RESULTS / f"{slug}.json"
    limit = TIME_LIMIT_S - (time.monotonic() - started)
    run(list(BENCHMARKS), quick=options.quick, device=device, output=output, extra={"tests": tests}, limit_s=limit)
    print(f"tests: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed")
    return 1 if tests["failed"] or tests["exit_status"] else 0


def run_tests(device: str, paths: list[str]) -> dict[str, Any]:
    """The tests of `tests/gpu` and `tests/kernels` on the device, in a process of their own: counts and failures."""
    started = time.monotonic()
    environment = os.environ | {
        "DEFENSIVEKV_TEST_DEVICE": device,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # On a CPU, the kernels' tests are among the ordinary ones.
        folders = ["tests/gpu"] if device == "cpu" else ["tests/gpu", "tests/kernels"]
        command = [sys.executable, "-m", "pytest", *folders, "-q", f"--junitxml={report}"]
        # The machine's releases may warn of things that the project's own do not: no reason to fail there.
        command += ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default"]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in cases if _has(case, "failure", "error")]
    skipped = sum(_has(case, "skipped") for case in cases)
    return {
        "exit_status": status,
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "wall_s": round(time.monotonic() - started, 1),
    }


def _has(case: ElementTree.Element, *kinds: str) -> bool:
    return any(case.find(kind) is not None for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
