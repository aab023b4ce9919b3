from pathlib import Path
from typing import Any

import pytest

from defensivekv import Budget
from defensivekv.errors import BudgetError, InvalidInputError, UnknownPolicyError
from defensivekv.evaluation.runner import load_plan, make_plan
from tests.evaluation.runner.samples import plan_of


def test_a_policy_is_a_name_or_a_mapping_or_its_short_form() -> None:
    named, mapped, short = plan_of(
        [
            "snapkv",
            {"name": "adakv", "window_size": 16, "label": "Ada"},
            "criticalkv+window_size=8+protect_window=false",
        ]
    ).policies
    assert (named.title, mapped.title) == ("snapkv", "Ada")
    assert short.options == {"window_size": 8, "protect_window": False}
    assert short.make("0.5").policy.window_size == 8
    assert not short.make("0.5").policy.protect_window


def test_a_chunk_size_belongs_to_a_policy_and_is_held_against_it() -> None:
    setting = plan_of(["snapkv+chunk_size=64"]).policies[0].make("0.5")
    assert (setting.chunk_size, setting.policy.budget) == (64, Budget.parse(0.5))
    assert setting.parts["asked chunk_size"] == "64"
    for option, budget, reason in (
        ("snapkv+chunk_size=8", "0.5", "less than the window"),
        ("snapkv+chunk_size=yes", "0.5", "positive integer"),
        ("cake+chunk_size=64", "0.5", "cannot evict in steps"),
        ("kvzip", "1MiB", "cannot evict in steps"),
        ("snapkv+chunks=8", "0.5", "no option 'chunks'.*chunk_size"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            plan_of([option]).policies[0].make(budget)


def test_the_full_cache_runs_once_and_is_what_budget_one_means() -> None:
    settings = plan_of(["snapkv", "adakv"], budgets=[0.2, 1.0, "20%", 64]).settings()
    assert [(setting.title, setting.budget) for setting in settings] == [
        ("full", "1"),
        ("snapkv", "0.2"),
        ("snapkv", "64 entries per head"),
        ("adakv", "0.2"),
        ("adakv", "64 entries per head"),
    ]
    assert [setting.is_stock for setting in settings] == [True, False, False, False, False]
    assert len(plan_of(["full"], budgets=[0.2, 0.4]).settings()) == 1


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"policies": ["snapkw"]}, UnknownPolicyError, "snapkv"),
        ({"policies": ["snapkv+colour=red"]}, InvalidInputError, "no option 'colour'"),
        ({"policies": ["snapkv", "snapkv"]}, InvalidInputError, "named twice"),
        ({"policies": ["snapkv"], "budgets": []}, InvalidInputError, "needs a budget"),
        ({"policies": ["snapkv"], "budgets": ["much"]}, BudgetError, "not understood"),
        ({"policies": ["snapkv+window_size"]}, InvalidInputError, "name\\+option=value"),
        ({"policies": ["snapkv"], "batch_size": 0}, InvalidInputError, "batch_size"),
        ({"policies": ["snapkv"], "bugdets": [0.2]}, InvalidInputError, "bugdets.*fields are"),
        ({"policies": ["snapkv"], "template": "jinja"}, InvalidInputError, "template"),
        ({"policies": []}, InvalidInputError, "policies"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan({"tasks": ["ruler"], "budgets": [0.2]} | fields).settings()


def test_a_plan_is_read_from_yaml_and_from_the_json_of_a_run(tmp_path: Path) -> None:
    written = tmp_path / "plan.yaml"
    written.write_text(
        "tasks: ruler, longbench\npolicies: [snapkv, {name: adakv, label: Ada}]\nbudgets: [0.2, 64MiB]\n"
    )
    plan = make_plan(load_plan(written))
    assert plan.tasks == ("ruler", "longbench")
    assert plan.budgets == ("0.2", "64MiB")
    stored = tmp_path / "run.json"
    stored.write_text(f'{{"plan": {plan.model_dump_json()}}}')
    assert make_plan(load_plan(stored)) == plan


@pytest.mark.parametrize("text", ["tasks: [", "- ruler", "12", "", "1: 2", "\xff"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInputError, match="plan"):
        load_plan(path)
    with pytest.raises(InvalidInputError, match="cannot read"):
        load_plan(tmp_path / "missing.yaml")
    path = path.with_suffix(".json")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInputError, match="cannot read"):
        load_plan(path)


def test_the_full_caches_name_is_no_label() -> None:
    with pytest.raises(InvalidInputError, match="the label 'full' is the full cache's"):
        make_plan({"tasks": ["needleworld"], "policies": [{"name": "snapkv", "label": "Full"}], "budgets": [0.2]})


def test_a_label_that_no_file_can_be_called_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at most 120 characters"):
        make_plan({"tasks": ["needleworld"], "policies": [{"name": "snapkv", "label": "x" * 121}], "budgets": [0.2]})


def test_budgets_that_differ_have_cells_that_differ() -> None:
    budgets = ["0.2", "0.20004", "0.99999", "1.01MiB", "1.04MiB", "500KiB", "500.04KiB", "64", "1024"]
    plan = make_plan({"tasks": ["needleworld"], "policies": ["snapkv"], "budgets": budgets})
    assert len({setting.budget for setting in plan.settings()}) == len(budgets)
