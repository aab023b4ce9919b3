"""What a figure was measured on and with: device, threads, versions, commit."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("defensivekv", "torch", "transformers", "triton", "safetensors")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything needed to believe a figure, as JSON types."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """The device's product name, as far as it tells."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _processor() or platform.machine()


def commit() -> str:
    """The commit that this package is checked out from, marked where tracked files differ from it.

    "unknown" outside a checkout of it, as where it is installed into the environment of some other repository.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} with changes" if changed else revision


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent.parent
    run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
