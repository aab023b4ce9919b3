from fractions import Fraction

import pytest

from defensivekv.bench.contenders import Contender, fillers, in_groups, readers
from defensivekv.bench.plan import make_plan
from defensivekv.budget import Budget
from tests.bench.fakes import FakeRival

PLAN = make_plan({"budgets": ["0.2", "1024"], "policies": ["snapkv", "defensivekv"]})


def test_budgets_multiply_what_evicts_and_policies_this_package_alone() -> None:
    rivals = [FakeRival("defensivekv", [], takes_budget=True), FakeRival("stock", [])]
    assert [each.label for each in fillers(rivals, PLAN)] == ["defensivekv 20 %", "defensivekv 1024 a head", "stock"]
    assert [each.label for each in readers(rivals, PLAN)] == [
        "snapkv 20 %",
        "defensivekv 20 %",
        "snapkv 1024 a head",
        "defensivekv 1024 a head",
        "stock",
    ]


def test_entries_per_head_are_a_share_of_the_tokens() -> None:
    contender = Contender(FakeRival("defensivekv", [], takes_budget=True), Budget.parse(1024))
    assert contender.share(4096) == Fraction(1, 4)
    assert contender.filling(4096, 2, PLAN).kept == 1024
    assert contender.filling(512, 2, PLAN).kept == 512
    assert Contender(FakeRival("stock", []), None).filling(512, 1, PLAN).kept == 512


@pytest.mark.parametrize(
    ("needs", "room", "groups", "unfit"),
    [
        ([1, 2, 3], 10, [[0, 1, 2]], []),
        ([1, 5, 5, 5], 11, [[0, 1, 2], [0, 3]], []),
        ([1, 9, 10, 2], 10, [[0, 1], [0, 3]], [2]),
        ([11, 1], 10, [], [0, 1]),
    ],
)
def test_groups_have_room_and_the_first_is_in_all_of_them(
    needs: list[int], room: int, groups: list[list[int]], unfit: list[int]
) -> None:
    assert in_groups(needs, room) == (groups, unfit)
