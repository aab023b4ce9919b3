import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app
from defensivekv.cli.evaluate import read_plan
from defensivekv.evaluation.runner import read_records
from defensivekv.evaluation.runner.examiner import Examiner
from defensivekv.needleworld import TASKS

runner = CliRunner()
SHORT = ["evaluate", "--tasks", "needleworld/single_key,needleworld/multi_key", "--num-samples", "2"]
SHORT += ["--lengths", "512", "--policies", "full,snapkv+window_size=16", "--budgets", "0.2", "--device", "cpu"]


def test_the_command_runs_reports_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*SHORT, "--output", str(tmp_path), "--against", "paper"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output.replace("\n", "")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    records = read_records(tmp_path)
    assert len(records) == 2 * 2 * 2
    assert {record.policy for record in records} == {"full", "snapkv+window_size=16"}
    assert {record.task for record in records} == {"needleworld/single_key@512", "needleworld/multi_key@512"}
    assert {record.status for record in records} == {"ok"}

    monkeypatch.setattr(Examiner, "examine", lambda *_: pytest.fail("nothing is to be asked again"))
    assert runner.invoke(app, arguments).exit_code == 0
    again = runner.invoke(app, ["evaluate", "--rescore", "--output", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert "0 records have other scores" in again.output
    stored = runner.invoke(app, ["evaluate", "--config", str(tmp_path / "run.json"), "--output", str(tmp_path)])
    assert stored.exit_code == 0, stored.output


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Examiner, "examine", interrupted)
    result = runner.invoke(app, [*SHORT, "--output", str(tmp_path)])
    assert result.exit_code == 130
    assert "the same command goes on" in result.output.replace("\n", " ")


def test_without_arguments_the_packaged_model_ranks_at_least_ten_methods_at_five_budgets() -> None:
    plan = read_plan(None, {})
    assert plan.model is None
    assert plan.tasks == ("needleworld",)
    assert plan.rows == 8
    settings = plan.settings()
    assert {setting.budget for setting in settings if not setting.is_stock} == {"0.1", "0.2", "0.4", "0.6", "0.8"}
    methods = {setting.title for setting in settings}
    assert {"full", "random", "snapkv", "defensivekv", "layer-defensivekv"} <= methods <= set(dkv.policies())
    assert len(methods) > 10
    assert len(TASKS) == 5


def test_options_come_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text("model: some/model\ntasks: [ruler]\npolicies: [snapkv]\nbudgets: [0.2]\nseed: 7\n")
    plan = read_plan(config, {"seed": 8, "budgets": ["0.4"]})
    assert (plan.model, plan.seed, plan.budgets, plan.rows) == ("some/model", 8, ("0.4",), 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["some/model"], dkv.InvalidInputError, "no tasks"),
        (["--tasks", "rulr"], dkv.InvalidInputError, "ruler"),
        (["--policies", "snapkw"], dkv.UnknownPolicyError, "snapkv"),
        (["--budgets", "1.5"], dkv.BudgetError, "above one"),
        (["--lengths", "long"], dkv.InvalidInputError, "lengths"),
        (["--tasks", "haystack", "--lengths", "8192"], dkv.InvalidInputError, "4096 positions"),
        (["--config", "nowhere.yaml"], dkv.InvalidInputError, "nowhere.yaml"),
        (["--against", "nature"], dkv.InvalidInputError, "paper"),
        (["--template", "chat"], dkv.InvalidInputError, "no chat template"),
        (["--rescore"], dkv.InvalidInputError, "no records"),
        (["--rescore", "--ray"], dkv.InvalidInputError, "--rescore runs nothing"),
        (["--rescore", "--budgets", "0.2"], dkv.InvalidInputError, "--rescore runs nothing"),
        (["--policies", "snapkv+aggregation=3"], dkv.InvalidInputError, "aggregation 3 is no part"),
        (["--policies", "snapkv+protect_window=no"], dkv.InvalidInputError, "must be True or False"),
        (["--policies", "snapkv+name=random"], dkv.InvalidInputError, "names a policy twice"),
        (["--policies", "duo-attention+profile=3"], dkv.InvalidInputError, "3 is no profile of heads"),
        (["/no/such/model", "--tasks", "needleworld"], dkv.InvalidInputError, "cannot load"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_run_is_refused_before_any_work(
    tmp_path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    start = time.perf_counter()
    device = [] if arguments == ["--rescore"] else ["--device", "cpu"]
    result = runner.invoke(app, ["evaluate", *arguments, "--output", str(tmp_path / "run"), *device])
    assert isinstance(result.exception, error), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "run" / "records").exists()
    assert time.perf_counter() - start < 60


def test_a_sample_that_fails_is_named_and_does_not_end_the_run(tmp_path: Path) -> None:
    # A tenth of 256 tokens is below the observation window, where the prompt is kept whole.
    arguments = ["evaluate", "--tasks", "needleworld/single_key", "--lengths", "256", "--num-samples", "1"]
    arguments += ["--policies", "full,snapkv+window_size=32", "--budgets", "0.1", "--device", "cpu"]
    result = runner.invoke(app, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "failed" in result.output
    assert json.loads((tmp_path / "run.json").read_text())["made_with"]["template"] == "plain"
    assert [record.status for record in read_records(tmp_path)] == ["ok", "failed"]


def test_a_run_in_which_nothing_was_answered_ends_with_status_one(tmp_path: Path) -> None:
    arguments = ["evaluate", "--tasks", "needleworld/single_key", "--lengths", "256", "--num-samples", "1"]
    arguments += ["--policies", "snapkv+window_size=32", "--budgets", "0.1", "--device", "cpu"]
    result = runner.invoke(app, [*arguments, "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "no sample was answered" in result.output
