import pytest

from defensivekv.budget import Budget
from defensivekv.evaluation.report.order import (
    Group,
    budget_label,
    budget_rank,
    budget_share,
    sorted_groups,
    sorted_policies,
    sorted_tasks,
    task_label,
    task_length,
)
from tests.evaluation.report.cases import LONGBENCH_ALL, NEEDLEWORLD, RULER_4K


def test_policies_stand_as_in_the_paper_variants_after_theirs_and_others_last() -> None:
    paper = ["full", "streaming-llm", "random", "snapkv", "adakv", "cake", "duo-attention", "criticalkv"]
    paper += ["ada-criticalkv", "defensivekv", "layer-defensivekv"]
    assert sorted_policies(sorted(paper)) == paper
    names = [
        "zebra",
        "apple",
        "snapkv window=64",
        "snapkv",
        "defensivekv-mean",
        "layer-defensivekv",
        "adakv",
        "snapkvs",
    ]
    expected = [
        "snapkv",
        "snapkv window=64",
        "adakv",
        "defensivekv-mean",
        "layer-defensivekv",
        "apple",
        "snapkvs",
        "zebra",
    ]
    assert sorted_policies(names) == expected


@pytest.mark.parametrize("tasks", [RULER_4K, LONGBENCH_ALL, NEEDLEWORLD])
def test_tasks_stand_as_in_the_table_of_their_suite(tasks: tuple[str, ...]) -> None:
    assert sorted_tasks(sorted(tasks)) == list(tasks)


def test_rulers_columns_have_the_short_names_of_the_authors_table() -> None:
    assert " ".join(map(task_label, RULER_4K)) == "cwe fwe MK1 MK2 MK3 MQ MV S1 S2 S3 qa1 qa2 vt"
    assert task_label("other/vt@4096") == "vt"


def test_unknown_tasks_stand_by_name_after_the_known_ones() -> None:
    assert sorted_tasks(["ruler/b@4096", "ruler/a@4096", "ruler/vt@4096"]) == [
        "ruler/vt@4096",
        "ruler/a@4096",
        "ruler/b@4096",
    ]


def test_a_length_is_what_stands_at_the_end_of_the_name() -> None:
    assert task_length("ruler/vt@4096") == 4096
    assert task_length("longbench/lcc") is None
    assert task_length("ruler/vt@4k") is None


def test_groups_stand_by_suite_and_then_by_length() -> None:
    groups = [Group("x", None), Group("ruler", 16384), Group("ruler", 4096), Group("longbench", None)]
    assert sorted_groups(groups) == [
        Group("longbench", None),
        Group("ruler", 4096),
        Group("ruler", 16384),
        Group("x", None),
    ]


def test_budgets_are_read_from_the_words_that_budgets_have_for_themselves() -> None:
    shares, entries, sizes = (0.05, 0.2, 1.0), (128, 1024), ("512 KiB", "64 MiB", "2 GiB")
    texts = [str(Budget.parse(value)) for value in (*shares, *entries, *sizes)]
    texts_by_letter = sorted(texts)
    assert texts_by_letter != texts
    assert sorted(texts_by_letter, key=budget_rank) == texts
    assert sorted(["0.2", "what?", "1024"], key=budget_rank) == ["0.2", "1024", "what?"]
    assert [budget_share(text) for text in texts[:3]] == list(shares)
    assert {budget_share(text) for text in texts[3:]} == {None}
    mixed = ["auto:0.9", "1024", "auto:0.5", "0.9", "1.0 MiB"]
    assert sorted(mixed, key=budget_rank) == ["0.9", "auto:0.5", "auto:0.9", "1024", "1.0 MiB"]
    assert (budget_share("auto:0.5"), budget_label("auto:0.5")) == (None, "auto:0.5")
    assert budget_label("0.2") == "20 %"
    assert budget_label("0.125") == "12.5 %"
    assert budget_label("1024 entries per head") == "1024 entries per head"
