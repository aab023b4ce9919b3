from pathlib import Path

import pytest

from defensivekv.cli.evaluate import read_plan

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_the_papers_three_models_have_a_file_each() -> None:
    assert {read_plan(path, {}).model for path in CONFIGS} == {
        "meta-llama/Llama-3.1-8B-Instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "Qwen/Qwen2.5-32B-Instruct",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_the_papers_grid_and_names_its_command(path: Path) -> None:
    plan = read_plan(path, {})
    settings = plan.settings()
    assert {setting.budget for setting in settings} == {"0.2", "0.4", "0.6", "0.8", "1"}
    policies = {"full", "streaming-llm", "snapkv", "adakv", "cake", "criticalkv", "defensivekv", "layer-defensivekv"}
    assert policies <= {setting.title for setting in settings}
    assert sum(setting.is_stock for setting in settings) == 1
    assert plan.dtype == "bfloat16"
    assert plan.rows == 1
    assert not plan.query_aware
    assert set(plan.tasks) == {"longbench", "ruler", "haystack"}
    assert f"defensivekv evaluate --config configs/{path.name}" in path.read_text()
