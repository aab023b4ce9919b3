import csv
import io

from rich.console import Console

from defensivekv.evaluation.report import CellKey, Group, Results, Setting
from defensivekv.evaluation.report.rendering import html_table, markdown_table, rich_tables, scores_csv, table_csv
from defensivekv.evaluation.report.tables import Entry, Table, domain_table, overview_table, summary_table, task_table
from tests.evaluation.report.cases import (
    LLAMA,
    LONGBENCH_ALL,
    NEEDLEWORLD,
    RULER_4K,
    failed,
    grid,
    record,
    split,
    timing,
)

UNSEEN = Setting(LLAMA, False, "chat")
RULER = Group("ruler", 4096)


def results_of(*made: object) -> Results:
    return Results.from_records(*split([pair for run in made for pair in run]))  # type: ignore[attr-defined]


def column(table: Table, title: str) -> list[Entry]:
    place = [each.title for each in table.columns].index(title)
    return [row[place] for row in table.rows]


def shown(table: Table, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in rich_tables(table, width):
        console.print(part)
    return console.export_text()


def test_a_table_has_the_papers_rows_and_columns() -> None:
    policies = ("layer-defensivekv", "adakv", "full", "snapkv")
    table = task_table(results_of(grid(policies, ("0.2",), RULER_4K, samples=2)), UNSEEN, RULER, "0.2")
    assert [entry.text for entry in column(table, "policy")] == ["full", "snapkv", "adakv", "layer-defensivekv"]
    titles = "policy,KV held,a token,cwe,fwe,MK1,MK2,MK3,MQ,MV,S1,S2,S3,qa1,qa2,vt,mean,loss"
    assert [each.title for each in table.columns] == titles.split(",")
    assert table.ends == {0}


def test_longbench_is_grouped_by_domain() -> None:
    group = Group("longbench", None)
    results = results_of(grid(("full", "snapkv"), ("0.2",), LONGBENCH_ALL, samples=2))
    table = task_table(results, UNSEEN, group, "0.2")
    groups = list(dict.fromkeys(each.group for each in table.columns if each.group))
    assert groups == ["single-document QA", "multi-document QA", "summarisation", "few-shot", "synthetic", "code"]
    assert 'colspan="3">few-shot<' in html_table(table)
    domains = domain_table(results, UNSEEN, "0.2")
    assert domains is not None
    assert [each.title for each in domains.columns] == ["policy", *groups]


def test_scores_are_out_of_a_hundred_with_intervals_and_the_best_is_marked() -> None:
    records = [
        record(policy=policy, budget=budget, sample=str(i), context_sha256=str(i), scores=[score])
        for policy, budget, scores in (("full", "1", (1, 0.8)), ("snapkv", "0.2", (0.3, 0.6)), ("adakv", "0.2", (0, 0)))
        for i, score in enumerate(scores)
    ]
    table = task_table(Results.from_records(records, []), UNSEEN, RULER, "0.2")
    assert column(table, "vt") == [
        Entry("90.0", "80 to 100"),
        Entry("45.0", "30 to 60", is_best=True),
        Entry("0.0", "0 to 0"),
    ]
    assert [entry.text for entry in column(table, "loss")] == ["–", "50.0 %", "100.0 %"]


def test_bytes_and_times_stand_with_the_scores_and_only_equal_batches_are_compared() -> None:
    def timed(policy: str, budget: str, seconds: float, batch_size: int) -> object:
        made = record(policy=policy, budget=budget)
        return [(made, (tuple(made.model_dump()[k] for k in KEYS), timing(made.sample, seconds, batch_size)))]

    keys = ("model", "policy", "budget", "task", "query_aware", "template")
    KEYS = keys
    results = results_of(timed("full", "1", 0.04, 1), timed("snapkv", "0.2", 0.01, 1), timed("adakv", "0.2", 0.02, 8))
    table = task_table(results, UNSEEN, RULER, "0.2")
    assert [entry.text for entry in column(table, "a token")] == ["40 ms", "10 ms", "20 ms"]
    assert [entry.detail for entry in column(table, "a token")] == ["", "x0.25", "batch 8"]
    assert column(table, "KV held")[1] == Entry("102.4 MiB", "20 % of full")


def test_failures_stand_wherever_a_mean_does() -> None:
    results = results_of(grid(("full", "snapkv"), ("0.2",), RULER_4K[:2], samples=4, failures=1))
    for entries in (
        column(task_table(results, UNSEEN, RULER, "0.2"), "cwe"),
        column(task_table(results, UNSEEN, RULER, "0.2"), "mean"),
    ):
        assert all("failed" in entry.detail for entry in entries), entries
    assert [entry.text for entry in column(summary_table(results, UNSEEN, RULER), "failed")] == ["2", "2"]
    assert "4 samples failed" in shown(task_table(results, UNSEEN, RULER, "0.2"))


def test_a_cell_of_failures_only_and_a_task_that_was_not_run_leave_no_mean() -> None:
    records = [
        failed(sample="a"),
        record(task="ruler/cwe@4096", scores=[0.7]),
        record(policy="adakv", task="ruler/cwe@4096", scores=[0.5]),
    ]
    table = task_table(Results.from_records(records, []), UNSEEN, RULER, "0.2")
    assert column(table, "vt") == [Entry("–", "1/1 failed"), Entry("–", "not run")]
    assert column(table, "cwe") == [Entry("70.0", "1 sample", is_best=True), Entry("50.0", "1 sample")]
    assert [entry.text for entry in column(table, "mean")] == ["–", "–"]
    assert "1/2 tasks" in column(table, "mean")[1].detail


def test_a_run_of_the_full_cache_alone_has_a_table() -> None:
    results = Results.from_records([record(policy="full", budget="1")], [])
    assert [entry.text for entry in column(summary_table(results, UNSEEN, RULER), "mean")] == ["100.0"]
    assert len(task_table(results, UNSEEN, RULER, results.budgets(UNSEEN)[0]).rows) == 1


def test_query_aware_tables_say_so_in_bold_and_hold_nothing_else() -> None:
    run = grid(("full", "snapkv"), ("0.2",), RULER_4K[:2], samples=2)
    aware = grid(("full", "snapkv"), ("0.2",), RULER_4K[:2], samples=3, query_aware=True)
    results = results_of(run, aware)
    table = summary_table(results, Setting(LLAMA, True, "chat"), RULER)
    assert [entry.text for entry in column(table, "samples")] == ["6", "6"]
    assert "QUERY-AWARE" in shown(table)
    assert '<strong class="aware">query-aware</strong>' in html_table(table)
    assert ", query-aware**" in markdown_table(table)
    other = summary_table(results, UNSEEN, RULER)
    assert [entry.text for entry in column(other, "samples")] == ["4", "4"]
    assert "aware" not in shown(other).lower()


def test_a_table_is_broken_to_fit_and_loses_nothing() -> None:
    table = task_table(results_of(grid(("full", "snapkv"), ("0.2",), RULER_4K, samples=2)), UNSEEN, RULER, "0.2")
    text = shown(table, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for title in ("cwe", "MK1", "vt", "mean", "loss"):
        assert f" {title} " in text
    assert text.count("policy") == len(list(rich_tables(table, 80))) > 1


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    records = [record(policy="[bold red]x[/]", task="ruler/<b>|x@4096", model="\x1b[31m`m`")]
    results = Results.from_records(records, [])
    table = task_table(results, results.settings[0], RULER, "0.2")
    assert "[bold red]x[/]" in shown(table)
    assert "\x1b[31m`m`" not in shown(table)
    assert "<b>" not in html_table(table)
    assert "&lt;b&gt;|x" in html_table(table)
    assert "\\<b\\>\\|x" in markdown_table(table)


def test_the_sheet_has_a_line_for_each_cell_and_each_mean() -> None:
    results = results_of(grid(("full", "snapkv"), ("0.2", "0.4"), RULER_4K[:3], samples=3, failures=1))
    lines = list(csv.DictReader(io.StringIO(scores_csv(results))))
    tasks = [line for line in lines if line["level"] == "task"]
    assert [(line["policy"], line["budget"]) for line in tasks[::3]] == [
        ("full", "1"),
        ("snapkv", "0.2"),
        ("snapkv", "0.4"),
    ]
    assert {(line["n"], line["failures"]) for line in tasks} == {("2", "1")}
    (line,) = [each for each in lines if each["level"] == "suite" and each["budget"] == "0.4"]
    aggregate = results.aggregate(UNSEEN, "snapkv", "0.4", RULER)
    assert aggregate.score is not None
    assert aggregate.loss is not None
    assert float(line["mean"]) == float(f"{aggregate.score.mean:.6g}")
    assert float(line["loss"]) == float(f"{aggregate.loss.mean:.6g}")
    assert line["query_aware"] == "false"


def test_a_table_as_csv_has_its_details() -> None:
    table = summary_table(Results.from_records([record(policy="full", budget="1")], []), UNSEEN, RULER)
    header, row = csv.reader(io.StringIO(table_csv(table)))
    assert header[:2] == ["budget", "policy"]
    assert row[2] == "102.4 MiB (20 % of full)"


def test_the_overview_has_a_line_for_each_policy_and_a_column_for_each_budget() -> None:
    run = grid(("full", "snapkv", "defensivekv"), ("0.2", "0.4"), NEEDLEWORLD, samples=4, failures=1)
    results = results_of(run)
    (group,) = results.groups(UNSEEN)
    table = overview_table(results, UNSEEN, group)
    assert [column.title for column in table.columns] == ["policy", "20 %", "40 %"]
    assert [row[0].text for row in table.rows] == ["full", "snapkv", "defensivekv"]
    assert table.rows[0][2].text == "", "the full cache has no budget"
    for number, budget in enumerate(("0.2", "0.4"), start=1):
        score = results.aggregate(UNSEEN, "snapkv", budget, group).score
        assert score is not None
        expected = f"{100 * score.mean:.0f} {100 * score.low:.0f}-{100 * score.high:.0f} 5/20 failed"
        assert table.rows[1][number].text == expected
        assert sum(row[number].is_best for row in table.rows) == 1


def test_steps_of_one_batch_size_are_explained_once() -> None:
    made = [record(policy=policy, budget="0.2") for policy in ("snapkv", "adakv")]
    pairs = [(each, (CellKey.of(each), timing(each.sample, 0.01, 8))) for each in made]
    table = task_table(Results.from_records(*split(pairs)), UNSEEN, RULER, "0.2")
    assert [entry.detail for entry in column(table, "a token")] == ["", ""]
    assert table.notes == ("Decoding steps were timed in batches of 8.",)


def test_domains_that_are_the_tasks_of_one_suite_have_no_table_of_their_own() -> None:
    def made(domain: str, tasks: tuple[str, ...]) -> object:
        return grid(("full", "snapkv"), ("0.2",), tasks, samples=2, domain=domain)

    assert domain_table(results_of(made("a", NEEDLEWORLD[:1]), made("b", NEEDLEWORLD[1:2])), UNSEEN, "0.2") is None
    assert domain_table(results_of(made("a", NEEDLEWORLD[:2]), made("b", NEEDLEWORLD[2:3])), UNSEEN, "0.2") is not None
