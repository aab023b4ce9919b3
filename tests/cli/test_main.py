from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app, main
from defensivekv.policies import PARTS

runner = CliRunner()


def test_help_names_every_command() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "ask", "compress", "contexts", "policies", "profile", "evaluate"):
        assert command in result.output


def test_policies_gives_each_a_line_with_its_paper() -> None:
    result = runner.invoke(app, ["policies"])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert set(dkv.policies()) <= set(lines)
    assert "2510.13334" in lines["layer-defensivekv"]
    assert "all layers" in lines["layer-defensivekv"]
    assert "2404.14469" in lines["snapkv"]


def test_the_documentation_has_the_table_that_the_command_prints() -> None:
    result = runner.invoke(app, ["policies", "--markdown"])
    assert result.exit_code == 0
    methods = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert result.output.strip() in methods
    for kind, names in PARTS.items():
        row = next(line for line in methods.splitlines() if line.startswith(f"| `{kind}` |"))
        assert row.endswith(f"| {', '.join(f'`{name}`' for name in names)} |")


def test_an_error_raised_on_purpose_is_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["defensivekv", "ask", "--policy", "snapkw", "--question", "why"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean 'snapkv'" in " ".join(error.split())
    assert "Traceback" not in error
