import random

import numpy as np
import pytest

from defensivekv import InvalidInputError
from defensivekv.evaluation.report import CellKey, Group, Results, Setting
from defensivekv.evaluation.report.bootstrap import mean_over_tasks
from tests.evaluation.report.cases import LLAMA, RULER_4K, failed, grid, record, split, timing

UNSEEN = Setting(LLAMA, False, "chat")
SEEN = Setting(LLAMA, True, "chat")
RULER = Group("ruler", 4096)
VT = "ruler/vt@4096"


def of(*scores: float, **changes: object) -> list[object]:
    return [record(sample=f"{i}", context_sha256=f"{i}", scores=[score], **changes) for i, score in enumerate(scores)]


def test_a_samples_score_is_the_mean_of_its_questions_and_a_cells_that_of_its_samples() -> None:
    records = [record(sample="a", scores=[1.0, 0.0, 0.5]), record(sample="b", scores=[0.0])]
    times = [timing("a", 0.03), timing("b", 0.01), timing("c", 9.0)]
    cell = Results.from_records(records, [(CellKey.of(records[0]), t) for t in times]).cell(UNSEEN, "snapkv", "0.2", VT)
    assert cell is not None
    assert cell.score is not None
    assert cell.score.mean == 0.25
    assert cell.score.low == 0.0
    assert cell.score.high == 0.5
    assert (cell.n, cell.failures, cell.truncations) == (2, 0, 0)
    assert cell.token_seconds == pytest.approx(0.02)
    assert cell.prefill_seconds == 0.5
    assert cell.achieved == pytest.approx(0.2)
    assert cell.full_bytes == record().full_bytes


def test_failures_are_counted_and_count_in_no_mean() -> None:
    records = [record(sample="a", scores=[0.8]), failed(sample="b", truncated_tokens=5)]
    times = [(CellKey.of(records[0]), timing(name, seconds)) for name, seconds in (("a", 0.01), ("b", 1.0))]
    cell = Results.from_records(records, times).cell(UNSEEN, "snapkv", "0.2", VT)
    assert cell is not None
    assert cell.score is not None
    assert cell.score.mean == 0.8
    assert (cell.n, cell.failures, cell.truncations) == (1, 1, 1)
    assert cell.cache_bytes == record().cache_bytes
    assert cell.token_seconds == 0.01


def test_a_cell_of_failures_has_no_score_and_leaves_its_suite_without_a_mean() -> None:
    records = [failed(sample="a"), record(task="ruler/cwe@4096", sample="a", scores=[0.7])]
    results = Results.from_records(records, [])
    cell = results.cell(UNSEEN, "snapkv", "0.2", VT)
    assert cell is not None
    assert cell.score is None
    assert cell.achieved is None
    aggregate = results.aggregate(UNSEEN, "snapkv", "0.2", RULER)
    assert aggregate.score is None
    assert aggregate.missing == (VT,)
    assert (aggregate.n, aggregate.failures) == (1, 1)
    assert [failure.sample for failure in results.failures()] == ["a"]


def test_an_aggregate_is_the_mean_of_task_means_however_many_samples_a_task_has() -> None:
    records = [*of(1.0, 1.0, 1.0, 1.0), *of(0.0, 0.5, task="ruler/cwe@4096")]
    aggregate = Results.from_records(records, []).aggregate(UNSEEN, "snapkv", "0.2", RULER)  # type: ignore[arg-type]
    assert aggregate.score is not None
    assert aggregate.score.mean == pytest.approx(0.625)
    # Only the task of two samples varies: its mean is 0, 0.25 or 0.5, each end in a quarter of the resamples.
    assert aggregate.score.low == pytest.approx(0.5)
    assert aggregate.score.high == pytest.approx(0.75)


def test_intervals_of_aggregates_hold_the_truth_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        score = mean_over_tasks([rng.uniform(0, 0.5, 25), rng.uniform(0.5, 1, 25)])
        hits += score.low <= 0.5 <= score.high
    # Resampling all samples as one would give intervals so wide that they all hold it.
    assert 0.91 * 300 <= hits <= 0.97 * 300


def test_the_loss_is_relative_to_the_full_cache_on_the_samples_that_both_answered() -> None:
    full = of(0.8, 0.4, 1.0, policy="full", budget="1")
    own = [*of(0.4, 0.2), failed(sample="2", context_sha256="2")]
    aggregate = Results.from_records([*full, *own], []).aggregate(UNSEEN, "snapkv", "0.2", RULER)  # type: ignore[list-item]
    assert aggregate.loss is not None
    assert aggregate.loss.mean == pytest.approx(0.5)
    # Every sample loses half, so that every resample does.
    assert aggregate.loss.low == pytest.approx(0.5)
    assert aggregate.loss.high == pytest.approx(0.5)
    assert aggregate.paired == 2


@pytest.mark.parametrize(
    "changes", [{"split": "kvpress"}, {"seed": 1}, {"context_sha256": "other"}, {"dtype": "float32"}]
)
def test_there_is_no_loss_against_a_full_cache_of_other_data_or_weights(changes: dict[str, object]) -> None:
    records = [record(policy="full", budget="1", **changes), record(scores=[0.5])]
    assert Results.from_records(records, []).aggregate(UNSEEN, "snapkv", "0.2", RULER).loss is None
    records[0] = record(policy="full", budget="1")
    assert Results.from_records(records, []).aggregate(UNSEEN, "snapkv", "0.2", RULER).loss is not None


def test_there_is_no_loss_without_a_full_cache_nor_against_one_that_scores_nothing() -> None:
    assert Results.from_records([record()], []).aggregate(UNSEEN, "snapkv", "0.2", RULER).loss is None
    records = [record(policy="full", budget="1", scores=[0.0]), record(scores=[0.0])]
    assert Results.from_records(records, []).aggregate(UNSEEN, "snapkv", "0.2", RULER).loss is None


def test_query_aware_runs_lengths_templates_and_models_are_never_averaged_together() -> None:
    changes: list[dict[str, object]] = [
        {"scores": [0.1]},
        {"scores": [0.2], "query_aware": True},
        {"scores": [0.3], "task": "ruler/vt@8192"},
        {"scores": [0.4], "template": "plain"},
        {"scores": [0.5], "model": "other"},
    ]
    results = Results.from_records([record(**change) for change in changes], [])
    assert results.settings == [UNSEEN, Setting(LLAMA, False, "plain"), SEEN, Setting("other", False, "chat")]
    assert results.groups(UNSEEN) == [RULER, Group("ruler", 8192)]
    found = [
        results.aggregate(setting, "snapkv", "0.2", group).score
        for setting in results.settings
        for group in results.groups(setting)
    ]
    assert [score.mean for score in found if score] == [0.1, 0.3, 0.4, 0.2, 0.5]


def test_a_full_cache_that_saw_the_question_is_no_yardstick_for_one_that_did_not() -> None:
    records = [record(policy="full", budget="1", query_aware=True), record(scores=[0.5])]
    assert Results.from_records(records, []).cell(UNSEEN, "full", "0.2", VT) is None


def test_the_order_of_records_changes_nothing() -> None:
    records, times = split(grid(("full", "snapkv", "defensivekv"), ("0.2",), RULER_4K[:4], failures=1))
    ordered = Results.from_records(records, times)
    random.Random(0).shuffle(records)
    random.Random(1).shuffle(times)
    shuffled = Results.from_records(records, times)
    assert list(ordered.cells) == list(shuffled.cells)
    for policy in ("full", "snapkv", "defensivekv"):
        assert ordered.aggregate(UNSEEN, policy, "0.2", RULER) == shuffled.aggregate(UNSEEN, policy, "0.2", RULER)


def test_a_sample_that_is_twice_in_a_cell_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'0000' is twice in policy 'snapkv'"):
        Results.from_records([record(), record()], [])


@pytest.mark.parametrize("changes", [{"seed": 1}, {"revision": "x"}, {"dtype": "float32"}, {"split": "kvpress"}])
def test_records_of_two_runs_in_one_cell_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=f"more than one {next(iter(changes))}: report one run at a time"):
        Results.from_records([record(sample="a"), record(sample="b", **changes)], [])


def test_a_run_that_went_on_elsewhere_is_one_cell_and_names_both_devices() -> None:
    results = Results.from_records([record(sample="a"), record(sample="b", device="cpu")], [])
    (cell,) = results.cells.values()
    assert cell.facts.devices == {"cpu", record().device}


@pytest.mark.parametrize("scores", [[], [1.5], [-0.1], [float("nan")]])
def test_scores_that_are_none_are_refused(scores: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="not numbers from 0 to 1"):
        Results.from_records([record(scores=scores)], [])


def test_a_task_of_two_domains_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="more than one suite or domain"):
        Results.from_records([record(), record(policy="adakv", domain="other")], [])
