import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from defensivekv.attention import native
from defensivekv.kernels.native import library
from tests.attention.cases import Sizes
from tests.kernels.native.library import needs_library

pytestmark = needs_library


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "defensivekv"


def compiler(path: Path, body: str) -> Path:
    """A program that is taken for the compiler, and calls the real one as `$REAL`."""
    path.write_text(f'#!/bin/sh\nREAL="{shutil.which("c++")}"\n{body}\n')
    path.chmod(0o755)
    return path


def test_it_is_compiled_once_and_found_again(cache_folder: Path) -> None:
    first = library._find()
    assert first.functions is not None
    assert first.reason.startswith("compiled with ")
    assert [path.name for path in cache_folder.iterdir()] == [first.path.name if first.path else ""]
    second = library._find()
    assert second.path == first.path
    assert second.reason == f"from {first.path}"


def test_other_sources_flags_or_compilers_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("c++")
    assert real is not None
    known = library._fingerprint(real)
    assert library._fingerprint(real) == known
    other = compiler(tmp_path / "other", "echo another version")
    assert library._fingerprint(str(other)) != known
    monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, "-DOTHER"))
    assert library._fingerprint(real) != known


def test_flags_that_the_compiler_does_not_know_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = compiler(tmp_path / "old", 'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done; exec "$REAL" "$@"')
    monkeypatch.setenv("CXX", str(old))
    found = library._find()
    assert found.functions is not None
    assert found.reason.startswith("compiled with old -march=native to ")


def test_a_compiler_that_fails_leaves_its_last_words_and_no_file(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = compiler(tmp_path / "broken", '[ "$1" = --version ] && exit 0; echo out of order >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    found = library._find()
    assert found.functions is None
    assert found.reason == "not compiled: out of order"
    assert list(cache_folder.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library._find().functions is not None


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-fopenmp",), ("-march=haswell", "-fopenmp"), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_builds_for_other_processors_and_without_threads_give_the_same(
    flags: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_ATTEMPTS", (flags,))
    built = library._find()
    assert isinstance(built.functions, ctypes.CDLL), built.reason
    monkeypatch.setattr(native, "find_library", lambda: built)
    size = Sizes(0, 5, 80, 96, 2, 9, 700, [[700, 0, 33]], [0, 0], (True, True), 0.2, 4.0, True)
    case = size.case(dtype)
    torch.testing.assert_close(case.attend("native").float(), case.expected(), rtol=0, atol=case.tolerance())
