import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from defensivekv.bench.roofline import ReadProbe
from defensivekv.cli import app
from defensivekv.errors import InvalidInputError

runner = CliRunner()
QUICK = ["bench", "--quick", "--what", "decode", "--lengths", "256,512", "--rivals", "stock,kvpress", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("defensivekv.bench.roofline._BUFFER", {"cpu": 2**20})
    monkeypatch.setattr("defensivekv.bench.rivals.installing.HOME", tmp_path / "home")


def test_the_command_measures_reports_and_draws(tmp_path: Path) -> None:
    result = runner.invoke(app, [*QUICK, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [cell["length"] for cell in found["cells"]] == [256, 512]
    assert (tmp_path / "run" / "decode.png").stat().st_size > 10_000
    assert "one token after 512 stored" in result.output
    assert "--install-rivals kvpress" in result.output.replace("\n", " ")


def test_without_a_name_the_packaged_model_is_measured(tmp_path: Path) -> None:
    arguments = [*QUICK[:1], *QUICK[2:], "--lengths", "256", "--repeats", "1", "--rivals", "none", "--threads", "1"]
    result = runner.invoke(app, [*arguments, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "the packaged model: 4 layers" in result.output


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReadProbe, "seconds", interrupted)
    result = runner.invoke(app, [*QUICK, "--output", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert "the same command goes on" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-9"], "unknown shape 'gpt-9'"),
        (["--rivals", "vllm"], "unknown rival 'vllm'"),
        (["--memory", "much"], "16GiB"),
        (["--lengths", "8k"], "has 4k positions"),
        (["--python", "kvpress"], "kvpress=/path/to/bin/python"),
        (["--python", f"kvpress={sys.executable}"], "cannot import kvpress"),
        (["--layers", "9"], "has 2 layers"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--install-rivals", "stock"], "no environment of its own"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        runner.invoke(app, [*QUICK, *arguments, "--output", str(tmp_path / "run")], catch_exceptions=False)
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_environment_is_made_with_the_packages_that_the_package_pins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command))
    result = runner.invoke(app, ["bench", "--install-rivals", "kvpress"])
    assert result.exit_code == 0, result.output
    made, installed = commands
    assert made == [sys.executable, "-m", "venv", str(tmp_path / "home" / "kvpress")]
    assert "kvpress==0.5.5" in Path(installed[-1]).read_text()
