import json
from pathlib import Path

from typer.testing import CliRunner

from defensivekv.cli import app
from defensivekv.cli.demo import AVERAGED, BUDGETS, POLICIES
from defensivekv.needleworld import TASKS

runner = CliRunner()


def test_the_demo_answers_ranks_the_methods_and_writes_what_it_measured(tmp_path: Path) -> None:
    arguments = ["demo", "--documents", "1", "--tokens", "512", "--output", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for heading in ("one document", "methods and budgets", "interval", "KV held", "a token"):
        assert heading in result.output
    assert "order" in result.output, "agreement with the paper's order, or what differs from it"
    assert (tmp_path / "score_vs_budget.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["plan"]["lengths"] == [512]
    assert record["versions"]["torch"]
    cells = {(cell["policy"], cell["budget"]): cell for cell in record["cells"]}
    assert len(cells) == 1 + len((*POLICIES, AVERAGED)) * len(BUDGETS)
    full = cells["full", 1.0]
    assert full["n"] == len(TASKS)
    assert full["score"]["mean"] >= 0.85
    for (policy, budget), cell in cells.items():
        assert (cell["n"], cell["failures"]) == (len(TASKS), 0)
        if policy != "full":
            # Positions are stored beside keys and values: 4 bytes for each entry of 256.
            assert cell["cache_bytes"] <= full["cache_bytes"] * budget * (1 + 4 / 256)
