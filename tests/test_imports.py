import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_import_direction_of_pyproject_holds() -> None:
    output = _run(
        "import sys; from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(config_filename='pyproject.toml', cache_dir=None))"
    )
    assert "0 broken" in output


def test_the_core_is_imported_without_a_model_library_and_no_part_brings_one_above_it() -> None:
    names = ["defensivekv", "defensivekv.cache", "defensivekv.attention"]
    steps = "\n".join(f"import sys, {name}; print(*sys.modules)" for name in names)
    loaded = [set(line.split()) for line in _run(steps).splitlines()]
    for name, modules in zip(names, loaded, strict=True):
        assert name in modules
        assert not {"transformers", "typer", "rich", "matplotlib", "scipy"} & modules
    assert "defensivekv.policies" in loaded[0]
    assert "defensivekv.cache" not in loaded[0]
    assert "defensivekv.attention" not in loaded[1]


def test_an_unknown_name_is_an_attribute_error() -> None:
    import defensivekv

    with pytest.raises(AttributeError, match="no attribute 'evict'"):
        defensivekv.evict
