from defensivekv.evaluation import PAPER_ORDER, order_disagreements
from defensivekv.evaluation.report import Results, Setting
from defensivekv.evaluation.report.order import Group
from defensivekv.policies import policies
from tests.evaluation.report.cases import record

SETTING = Setting("tiny", False, "plain")
GROUP = Group("needleworld", 1024)


def _results(scores: dict[str, list[float]]) -> Results:
    """Policies with the scores of the same documents, those of two tasks."""
    records = []
    for policy, values in scores.items():
        for number, value in enumerate(values):
            records.append(
                record(
                    model="tiny",
                    template="plain",
                    policy=policy,
                    suite="needleworld",
                    task=f"needleworld/{'single_key' if number % 2 else 'multi_key'}@1024",
                    sample=str(number),
                    context_sha256=str(number),
                    scores=[value],
                )
            )
    return Results.from_records(records, [])


def _pairs(scores: dict[str, list[float]]) -> list[tuple[str, str]]:
    return [(worse, better) for worse, better, _ in order_disagreements(_results(scores), SETTING, GROUP, "0.2")]


def test_the_papers_order_names_policies_that_exist() -> None:
    assert set(PAPER_ORDER) <= set(policies())


def test_nothing_is_said_of_an_order_that_agrees() -> None:
    assert _pairs({name: [0.1 * i, 0.1 * i + 0.05] for i, name in enumerate(PAPER_ORDER)}) == []


def test_a_pair_in_the_wrong_order_are_named_with_their_paired_difference() -> None:
    results = _results(
        {
            "snapkv": [0.5, 0.7, 0.6],
            "adakv": [0.4, 0.6, 0.5],
            "defensivekv": [0.9, 0.9, 0.9],
            "random": [1.0, 1.0, 1.0],
        }
    )
    ((worse, better, by),) = order_disagreements(results, SETTING, GROUP, "0.2")
    assert (worse, better) == ("snapkv", "adakv")
    assert abs(by.mean - 0.1) < 1e-9
    assert by.low > 0, "every document agrees, so the difference is clear"


def test_pairs_that_are_not_neighbours_in_the_papers_order_are_named_too() -> None:
    scores = {"criticalkv": [0.6, 0.6], "defensivekv": [0.7, 0.7], "layer-defensivekv": [0.5, 0.7]}
    assert _pairs(scores) == [("defensivekv", "layer-defensivekv")]
    assert ("criticalkv", "layer-defensivekv") in _pairs(scores | {"layer-defensivekv": [0.5, 0.6]})


def test_other_budgets_do_not_count() -> None:
    results = _results({"snapkv": [0.9, 0.9], "adakv": [0.1, 0.1]})
    assert order_disagreements(results, SETTING, GROUP, "0.4") == []
