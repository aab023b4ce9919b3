"""What a result was measured on and with, as of the package."""

from pathlib import Path

from defensivekv.bench.machine import commit, describe, device_name

__all__ = ["ROOT", "commit", "describe", "device_name"]

ROOT = Path(__file__).resolve().parent.parent
