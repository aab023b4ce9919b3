from defensivekv.evaluation import PAPER_ORDER, order_disagreements
from defensivekv.policies import policies
from tests.evaluation.cells import cell


def test_the_papers_order_names_policies_that_exist() -> None:
    assert set(PAPER_ORDER) <= set(policies())


def test_nothing_is_said_of_an_order_that_agrees() -> None:
    cells = {name: cell(name, [0.1 * i, 0.1 * i + 0.05]) for i, name in enumerate(PAPER_ORDER)}
    assert order_disagreements(cells) == []


def test_a_pair_in_the_wrong_order_are_named_with_their_paired_difference() -> None:
    cells = {
        "snapkv": cell("snapkv", [0.5, 0.7, 0.6]),
        "adakv": cell("adakv", [0.4, 0.6, 0.5]),
        "defensivekv": cell("defensivekv", [0.9, 0.9, 0.9]),
        "random": cell("random", [1.0, 1.0, 1.0]),
    }
    ((worse, better, by),) = order_disagreements(cells)
    assert (worse, better) == ("snapkv", "adakv")
    assert abs(by.mean - 0.1) < 1e-9
    assert by.low > 0, "every document agrees, so the difference is clear"


def test_pairs_that_are_not_neighbours_in_the_papers_order_are_named_too() -> None:
    cells = {
        "criticalkv": cell("criticalkv", [0.6, 0.6]),
        "defensivekv": cell("defensivekv", [0.7, 0.7]),
        "layer-defensivekv": cell("layer-defensivekv", [0.5, 0.7]),
    }
    pairs = [(worse, better) for worse, better, _ in order_disagreements(cells)]
    assert pairs == [("defensivekv", "layer-defensivekv")]
    cells["layer-defensivekv"] = cell("layer-defensivekv", [0.5, 0.6])
    pairs = [(worse, better) for worse, better, _ in order_disagreements(cells)]
    assert ("criticalkv", "layer-defensivekv") in pairs
