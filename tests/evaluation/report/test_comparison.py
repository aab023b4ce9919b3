from io import StringIO

import pytest
from rich.console import Console

from defensivekv.evaluation.report import Comparison, Results, compare, print_report
from defensivekv.evaluation.report.comparison_table import comparison_table
from defensivekv.evaluation.report.order import POLICIES
from defensivekv.evaluation.report.published import AUTHORS_README, PAPER, published_figures
from tests.evaluation.report.cases import HAYSTACK, LONGBENCH_ALL, NEEDLEWORLD, RULER_4K, failed, grid, record, split


def one(records: list[object], policy: str = "snapkv", task: str = "vt", suite: str = "ruler") -> Comparison:
    found = [
        comparison
        for comparison in compare(Results.from_records(records, []))  # type: ignore[arg-type]
        if (comparison.published.policy, comparison.published.task, comparison.published.suite) == (policy, task, suite)
        and comparison.published.model == "Llama-3.1-8B-Instruct"
    ]
    assert len(found) == 1
    return found[0]


def test_the_published_means_are_those_of_their_rows() -> None:
    rows: dict[str, list[float]] = {}
    for figure in published_figures():
        if figure.source == AUTHORS_README:
            rows.setdefault(figure.policy, []).append(figure.value)
    assert len(rows) == 5
    for values in rows.values():
        assert len(values) == 14
        assert sum(values[:13]) / 13 == pytest.approx(values[13], abs=0.06)


def test_published_figures_have_their_source_and_name_policies_of_the_papers_rows() -> None:
    figures = list(published_figures())
    assert len(figures) == 5 * 14 + 8 + 3 + 3
    assert {figure.source for figure in figures} == {AUTHORS_README, PAPER}
    assert {figure.policy for figure in figures} <= set(POLICIES)
    assert not any(figure.query_aware for figure in figures)


def test_in_the_same_setting_the_difference_is_given() -> None:
    comparison = one([record(sample=str(i), scores=[score]) for i, score in enumerate((0.3, 0.5))])
    assert comparison.differs == ()
    assert comparison.ours is not None
    assert comparison.ours.mean == pytest.approx(40)
    assert comparison.published.value == 38
    assert comparison.difference == pytest.approx(2)
    assert comparison.n == 2


@pytest.mark.parametrize("model", ["Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"])
def test_models_of_the_family_are_known_by_name(model: str) -> None:
    assert one([record(model=model)]).differs == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "Llama-3.1-70B-Instruct"}, "model Llama-3.1-70B-Instruct"),
        ({"model": "Llama-3.1-8B-Instruct-AWQ-INT4"}, "model Llama-3.1-8B-Instruct-AWQ-INT4"),
        ({"budget": "0.4"}, "budget 40 %"),
        ({"budget": "1024 entries per head"}, "budget 1024 entries per head"),
        ({"task": "ruler/vt@8192"}, "length 8192"),
        ({"query_aware": True}, "the question was seen"),
        ({"template": "plain"}, "template plain"),
        ({"split": "own"}, "split own"),
        ({"not_comparable": "own essays"}, "data: own essays"),
    ],
)
def test_what_differs_is_named_instead_of_a_difference(changes: dict[str, object], named: str) -> None:
    comparison = one([record(**changes)])
    assert comparison.differs == (named,)
    assert comparison.difference is None
    text = shown([comparison])
    assert named.split(": ")[-1] in text
    assert "+62.0" not in text


def test_the_nearest_run_is_shown_only_where_none_is_the_same() -> None:
    near, far = record(budget="0.4"), record(budget="0.4", template="plain", query_aware=True)
    assert one([far, near]).differs == ("budget 40 %",)
    assert one([far, near, record()]).differs == ()


def test_a_mean_wants_all_tasks() -> None:
    run = grid(("snapkv",), ("0.2",), RULER_4K, samples=2)
    records = [made for made, _ in run]
    assert one(list(records), task="mean").differs == ()
    assert one(list(records[2:]), task="mean").differs == ("12 of 13 tasks answered",)


def test_failures_stand_beside_our_figure() -> None:
    comparison = one([record(), failed(sample="1")])
    assert (comparison.n, comparison.failures) == (1, 1)
    assert "1/2 failed" in shown([comparison])
    assert one([failed()]).ours is None


def test_a_loss_wants_the_full_cache_and_all_seven_domains() -> None:
    tasks = (*LONGBENCH_ALL, HAYSTACK[0])
    run = [made for made, _ in grid(("full", "snapkv"), ("0.2",), tasks, samples=3)]
    whole = one(list(run), task="mean", suite="seven domains")
    assert whole.differs == ()
    assert whole.ours is not None
    assert whole.ours.low <= whole.ours.mean <= whole.ours.high
    without = [each for each in run if each.suite != "haystack"]
    assert one(list(without), task="mean", suite="seven domains").differs == ("no Needle-in-a-Haystack",)
    evicting = [each for each in run if each.policy != "full"]
    assert one(list(evicting), task="mean", suite="seven domains").differs == ("no full-cache row",)


def test_the_loss_is_the_mean_of_the_domains_losses() -> None:
    run = [made for made, _ in grid(("full", "snapkv"), ("0.2",), (*LONGBENCH_ALL, HAYSTACK[0]), samples=1)]
    # Code loses all and has two tasks, the other six domains nothing: a seventh, and not two seventeenths.
    scored = [
        each.model_copy(update={"scores": [0.0 if each.policy != "full" and each.domain == "code" else 0.5]})
        for each in run
    ]
    comparison = one(list(scored), task="mean", suite="seven domains")
    assert comparison.ours is not None
    assert comparison.ours.mean == pytest.approx(100 / 7)


def test_figures_that_nothing_was_run_for_are_counted_and_not_listed() -> None:
    results = Results.from_records(*split(grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD, samples=1)))
    table = comparison_table(compare(results))
    assert table.rows == ()
    assert "84 published figures of tasks or policies that were not run are left out." in table.notes
    out = StringIO()
    print_report(results, Console(file=out, width=120), against_paper=True)
    assert "84 published figures" in out.getvalue()


def shown(comparisons: list[Comparison]) -> str:
    table = comparison_table(comparisons)
    return "\n".join(f"{entry.text} {entry.detail}" for row in table.rows for entry in row)
