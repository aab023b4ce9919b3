"""The compiled kernels: found in the user's cache folder, or made there from the sources beside this file."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_HEADERS = ("attend.h", "threads.h", "tiles.h", "vectors.h")
_SOURCES = ("paged_attention.cpp", "ragged_attention.cpp", "value_norm.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-w", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
"""From the fastest on: not every compiler knows the processor it runs on, or OpenMP."""

_COMPILE_LIMIT_S = 120

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels take, by the numbers that they know them by."""

logger = logging.getLogger("defensivekv")


@dataclass(frozen=True)
class Library:
    """What became of the compilation.

    functions: the loaded library; None: there is none, for the `reason`. path: its file.
    """

    functions: ctypes.CDLL | None
    reason: str
    path: Path | None = None


@lru_cache(maxsize=1)
def find_library() -> Library:
    """Compiles and loads, in the first call of a process: seconds on a machine's first time, nothing after it."""
    library = _find()
    logger.info("native CPU kernels: %s", library.reason)
    return library


def _find() -> Library:
    if os.environ.get("DEFENSIVEKV_NATIVE", "1") == "0":
        return Library(None, "switched off by DEFENSIVEKV_NATIVE=0")
    compiler = _compiler()
    if compiler is None:
        return Library(None, "no C++ compiler (c++, g++ or clang++, or the one that CXX names)")
    try:
        folder = _cache_folder()
        path = folder / f"native-{_fingerprint(compiler)}.so"
        reason = f"from {path}"
        if not path.exists():
            reason = _compile(compiler, path)
        return Library(ctypes.CDLL(str(path)), reason, path)
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"not compiled: {error}")


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(name))), None
    )


def _cache_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(named) if named else Path.home() / ".cache") / "defensivekv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    # Of this user alone: what lies here is loaded and run.
    return Path(tempfile.mkdtemp(prefix="defensivekv-"))


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the compiler makes: sources, flags, its version, the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    told = [version, repr((_FLAGS, _ATTEMPTS)), platform.machine(), _processor()]
    told += [(_FOLDER / name).read_text(encoding="utf-8") for name in (*_HEADERS, *_SOURCES)]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, path: Path) -> str:
    complaints = ""
    for attempt in _ATTEMPTS:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            library = Path(folder, "kernels.so")
            objects, made = [], ""
            for name in _SOURCES:
                objects.append(str(Path(folder, name).with_suffix(".o")))
                made = made or _run([compiler, *_FLAGS, *attempt, "-c", str(_FOLDER / name), "-o", objects[-1]])
            # Linked without OpenMP's runtime: PyTorch has loaded one, whose threads are shared with it so.
            made = made or _run([compiler, "-shared", *objects, "-o", str(library), *_UNDEFINED])
            if not made and _loads(library):
                os.replace(library, path)
                return f"compiled with {' '.join((Path(compiler).name, *attempt))} to {path}"
            complaints = made or "the library cannot be loaded"
    raise OSError(complaints.strip().splitlines()[-1] if complaints.strip() else "the compiler failed")


_UNDEFINED = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()


def _run(command: list[str]) -> str:
    """What the command complained of; empty where it did its work."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S)
    return "" if run.returncode == 0 else run.stderr or f"exit status {run.returncode}"


def _loads(library: Path) -> bool:
    # PyTorch's libraries come first, so that their OpenMP runtime is found.
    assert torch.__version__
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True
