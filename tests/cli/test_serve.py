import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app

runner = CliRunner()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been started, with vLLM installed."""
    commands: list[list[str]] = []
    monkeypatch.setattr(sys.modules["defensivekv.cli.serve"], "find_spec", lambda _: object())
    monkeypatch.setattr(sys.modules["defensivekv.cli.serve"], "check_version", lambda: None)
    monkeypatch.setattr(os, "execv", lambda _, arguments: commands.append(arguments))
    return commands


def additional(command: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(command[command.index("--additional-config") + 1])
    return given


def test_a_model_is_served_by_vllm_with_our_option_and_its_own(started: list[list[str]]) -> None:
    arguments = ["serve", "some/model", "--policy", "snapkv", "--budget", "0.3", "--port", "8001", "--enforce-eager"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (command,) = started
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "some/model"]
    assert additional(command) == {"defensivekv": {"policy": "snapkv", "budget": "0.3", "head_groups": 1}}
    assert command[-3:] == ["--port", "8001", "--enforce-eager"]


def test_the_packaged_model_is_served_where_none_is_named(started: list[list[str]]) -> None:
    assert runner.invoke(app, ["serve", "--max-model-len", "2048"]).exit_code == 0
    (command,) = started
    assert command[4] == dkv.demo_model()
    assert command[-2:] == ["--max-model-len", "2048"]


def test_additional_configuration_of_others_stays(started: list[list[str]]) -> None:
    for given in (["--additional-config", '{"other": 1}'], ['--additional-config={"other": 1}']):
        assert runner.invoke(app, ["serve", "m", *given]).exit_code == 0
    for command in started:
        assert additional(command)["other"] == 1
        assert additional(command)["defensivekv"]["policy"] == "defensivekv"
        assert command.count("--additional-config") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "keeps nothing"),
        (["--policy", "kvzip"], "cannot be served"),
        (["--additional-config", "{"], "is not JSON"),
        (["--additional-config", '{"defensivekv": {}}'], "without 'defensivekv'"),
        (["--additional_config", '{"defensivekv": {}}'], "without 'defensivekv'"),
        (["--additional-conf", '{"x": 1}'], "would take the place of this command's options"),
        (["--additional_config.x", "1"], "would take the place of this command's options"),
        (["--budget", ""], "the budget is empty"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    started: list[list[str]], arguments: list[str], message: str
) -> None:
    result = runner.invoke(app, ["serve", "m", *arguments])
    assert message in str(result.exception)
    assert not started


def test_another_spelling_is_the_same_option(started: list[list[str]]) -> None:
    assert runner.invoke(app, ["serve", "m", '--additional_config={"other": 1}']).exit_code == 0
    assert additional(started[0])["other"] == 1
    assert started[0].count("--additional-config") == 1


def test_a_file_of_options_goes_along_unless_it_has_what_this_command_says(
    started: list[list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("port: 8001\n")
    for given in (["--config", str(path)], [f"--config={path}"]):
        assert runner.invoke(app, ["serve", "m", *given]).exit_code == 0
        assert started[-1][-2:] == ["--config", str(path)]
    path.write_text("additional_config: {x: 1}\n")
    result = runner.invoke(app, ["serve", "m", "--config", str(path)])
    assert "has an additional-config, which this command would replace" in str(result.exception)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["defensivekv.cli.serve"], "find_spec", lambda _: None)
    result = runner.invoke(app, ["serve", "m"])
    assert "pip install 'defensivekv[vllm]'" in str(result.exception)
