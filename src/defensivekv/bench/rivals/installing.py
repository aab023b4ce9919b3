"""Environments of rivals: where they are looked for, and how they are made."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from defensivekv.bench.plan import EXTERNAL
from defensivekv.errors import InvalidInputError, RivalError

HOME = Path("~/.cache/defensivekv/rivals")
_IMPORTS = {"kvpress": "kvpress", "llama.cpp": "llama_cpp, gguf", "openvino": "openvino_genai, optimum.intel"}
_UNWANTED = {"openvino": ("torchvision",)}
"""Brought along by others, not needed, and broken beside a torch from another index."""


def python_of(rival: str) -> Path:
    """Where the Python of an installed rival is."""
    return HOME.expanduser() / rival / "bin" / "python"


def install_advice(rival: str) -> str:
    """How to get it."""
    return f"run `defensivekv bench --install-rivals {rival}`, or give --python {rival}=PATH"


def find_pythons(given: Mapping[str, str], rivals: Sequence[str]) -> dict[str, str]:
    """The Pythons of those of the rivals that are there: the given ones, or installed ones.

    Raises InvalidInputError where a given one cannot be used.
    """
    found: dict[str, str] = {}
    for rival in rivals:
        if rival in given:
            _check(rival, given[rival])
            found[rival] = given[rival]
        elif rival in EXTERNAL and python_of(rival).exists():
            found[rival] = str(python_of(rival))
    return found


def _check(rival: str, python: str) -> None:
    try:
        command = [python, "-c", f"import {_IMPORTS[rival]}"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidInputError(f"--python {rival}={python} cannot be run: {error}") from None
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or [f"status {ran.returncode}"])[-1]
        raise InvalidInputError(f"--python {rival}={python} cannot import {_IMPORTS[rival]}: {said}")


def install(rival: str, say: Callable[[str], None]) -> Path:
    """Makes the rival's environment, with pinned packages. Raises InvalidInputError for another name, or RivalError."""
    if rival not in EXTERNAL:
        raise InvalidInputError(f"rival {rival!r} has no environment of its own: {', '.join(EXTERNAL)} have")
    python = python_of(rival)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    requirements = Path(__file__).with_name("requirements") / f"{rival}.txt"
    steps = [
        [sys.executable, "-m", "venv", str(python.parent.parent)],
        [*pip, "install", "--requirement", str(requirements)],
    ]
    steps += [[*pip, "uninstall", "--yes", package] for package in _UNWANTED.get(rival, ())]
    for command in steps:
        say(" ".join(command))
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RivalError(f"{rival} was not installed: {error}") from None
    return python
