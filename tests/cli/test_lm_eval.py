import json
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app
from tests.integrations.harness import write_tasks

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    broken = (folder / "needle_choice.yaml").read_text().replace("needle_choice", "needle_broken")
    (folder / "needle_broken.yaml").write_text(broken.replace("documents.jsonl", "missing.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "left out, as it takes seconds")
    # The harness reads its thousands of task files for seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def test_tasks_run_and_the_results_are_written_with_our_settings(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ["lm-eval", "--tasks", "needle_choice,needle_gen*", "--include-path", str(folder), "--limit", "2"]
    arguments += ["--policy", "snapkv", "--aggregation", "defensive", "--budget", "50%", "--batch-size", "2"]
    result = runner.invoke(app, [*arguments, "--device", "cpu", "--output", str(output), "--log-samples"])
    assert result.exit_code == 0, result.output
    assert "needle_choice" in result.output
    assert "50.0% of the entries kept in the mean of 2 contexts" in " ".join(result.output.split())
    written = json.loads(output.read_text())
    assert written["results"]["needle_choice"]["acc,none"] >= 0.5
    ours = written["config"]["defensivekv"]
    assert (ours["policy"], ours["budget"]["asked"]) == ("snapkv+aggregation=defensive", "0.5")
    assert ours["budget"]["achieved"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert ours["versions"]["lm_eval"]
    assert len(written["samples"]["needle_generate"]) == 2


def test_contexts_that_were_kept_whole_are_told(folder: Path) -> None:
    arguments = ["lm-eval", "--tasks", "needle_choice", "--include-path", str(folder), "--limit", "1"]
    result = runner.invoke(app, [*arguments, "--policy", "snapkv", "--budget", "1.0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "1 of them kept whole" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no tasks"),
        (["--tasks", "needle_nothing"], "no task 'needle_nothing'"),
        (["--tasks", "needle_choice", "--policy", "snapvk"], "did you mean 'snapkv'"),
        (["--tasks", "needle_choice", "--budget", "much"], "not understood"),
        (["--tasks", "needle_choice", "--allocation", "per-hed"], "did you mean 'per-head'"),
        (["--tasks", "needle_choice", "--template", "fancy"], "auto, chat or plain"),
        (["--tasks", "needle_choice", "--template", "chat"], "no chat template"),
        (["--tasks", "needle_choice", "--include-path", "no/such/folder"], "no folder"),
        (["--tasks", "needle_choice", "--output", "no/such/folder/file.json"], "cannot write"),
        (["--tasks", "needle_choice", "--log-samples"], "--output FILE"),
        (["--tasks", "needle_twice"], "task 'needle_twice', document 0"),
        (["--tasks", "needle_broken"], "the harness stopped"),
        (["--tasks", "needle_choice", "--context-field", "answer"], "--context-field"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(folder: Path, arguments: list[str], message: str) -> None:
    given = arguments if "--include-path" in arguments else [*arguments, "--include-path", str(folder)]
    result = runner.invoke(app, ["lm-eval", *given, "--device", "cpu"])
    assert isinstance(result.exception, dkv.DefensiveKVError), result.output
    assert message in str(result.exception)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("defensivekv.integrations.lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    result = runner.invoke(app, ["lm-eval", "--tasks", "needle_choice", "--include-path", str(folder)])
    assert isinstance(result.exception, dkv.InvalidInputError)
    assert "pip install defensivekv[lm-eval]" in str(result.exception)
