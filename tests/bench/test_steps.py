from types import SimpleNamespace
from typing import Any

import pytest
import torch

from defensivekv.bench.measures import steps
from defensivekv.bench.measures.prefill import measure_prefill
from defensivekv.bench.measures.steps import measure_steps
from defensivekv.bench.plan import make_plan
from defensivekv.bench.records import CellRecord
from defensivekv.bench.roofline import Roofline
from tests.bench.fakes import FakeRival

PLAN = make_plan({"repeats": 3})


def say_nothing(text: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_PAUSE_S", 0)
    monkeypatch.setattr("defensivekv.bench.roofline._BUFFER", {"cpu": 2**20})


def field_of(*rivals: FakeRival) -> Any:
    facts = SimpleNamespace(read_bytes=None)
    host = SimpleNamespace(device=torch.device("cpu"), facts=facts, model=None)
    stopped: list[set[str]] = []
    workers = SimpleNamespace(stop_all_but=stopped.append, stopped=stopped)
    return SimpleNamespace(rivals=list(rivals), host=host, workers=workers)


def measured(*rivals: FakeRival, room: int = 100) -> CellRecord:
    return measure_steps(field_of(*rivals), PLAN, 1024, 1000, 1, room, say_nothing)


def test_rivals_take_turns_and_warm_up_uncounted() -> None:
    log: list[str] = []
    cell = measured(FakeRival("defensivekv", log, takes_budget=True), FakeRival("stock", log))
    assert log == ["defensivekv", "stock"] * 5 + ["defensivekv closed", "stock closed"]
    ours, stock = cell.outcomes
    assert ours.samples_s == stock.samples_s == (3.0, 4.0, 5.0)
    assert (ours.label, ours.budget, ours.seconds, ours.held_bytes, ours.read_bytes) == (
        "defensivekv 20 %",
        "0.2",
        4.0,
        1000,
        2000,
    )
    assert len(cell.read_speeds) == 3
    assert ours.floor_s == pytest.approx(2000 / sorted(cell.read_speeds)[1])
    assert ours.achieved == pytest.approx(500 / sorted(cell.read_speeds)[1])
    assert (cell.key, cell.filled) == (("steps", 1024, 1), 1000)


def test_short_steps_are_taken_several_at_a_time_and_the_first_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_TURN_S", 4.5)
    log: list[str] = []
    cell = measured(FakeRival("defensivekv", log, takes_budget=True))
    # The warm-up's steps take 1 s, then (of five, four at most) 2, 3, 4 and 5 s, which make one of a turn enough.
    assert log.count("defensivekv") == 1 + 4 + 3
    assert cell.outcomes[0].samples_s == (6.0, 7.0, 8.0)


@pytest.mark.parametrize(("fails_at", "reason"), [(0, "cannot be filled"), (4, "RuntimeError: out of luck")])
def test_a_rival_that_fails_is_out_and_the_others_go_on(fails_at: int, reason: str) -> None:
    log: list[str] = []
    cell = measured(FakeRival("defensivekv", log, takes_budget=True), FakeRival("stock", log, fails_at=fails_at))
    ours, stock = cell.outcomes
    assert ours.samples_s == (3.0, 4.0, 5.0)
    assert (stock.status, stock.reason, stock.samples_s) == ("failed", reason, ())
    assert log.count("stock closed") == (1 if fails_at else 0)


def test_what_is_missing_or_has_no_room_is_said() -> None:
    log: list[str] = []
    rivals = [
        FakeRival("defensivekv", log, takes_budget=True),
        FakeRival("stock", log, takes=1000),
        FakeRival("kvpress", log, absent="not installed: install it"),
    ]
    _, stock, kvpress = measured(*rivals).outcomes
    assert (stock.status, stock.reason) == ("no room", "needs about 1000 B, and 100 B are there beside the model")
    assert (kvpress.status, kvpress.reason) == ("missing", "not installed: install it")


def test_rivals_without_room_for_each_other_are_measured_in_groups_beside_ours() -> None:
    log: list[str] = []
    rivals = [FakeRival("defensivekv", log, takes_budget=True)]
    rivals += [FakeRival(name, log, takes=60) for name in ("stock", "kvpress")]
    field = field_of(*rivals)
    cell = measure_steps(field, PLAN, 1024, 1000, 1, 100, say_nothing)
    assert [(each.rival, each.turns) for each in cell.outcomes] == [
        ("defensivekv", 1),
        ("defensivekv", 2),
        ("stock", 1),
        ("kvpress", 2),
    ]
    assert field.workers.stopped == [{"defensivekv", "stock"}, {"defensivekv", "kvpress"}]
    second = cell.ours(2)
    assert second is not None
    assert second.turns == 2


def test_prefills_are_read_in_turns_after_a_short_one() -> None:
    log: list[str] = []
    rivals = [FakeRival("defensivekv", log, takes_budget=True), FakeRival("stock", log)]
    rivals.append(FakeRival("kvpress", log, absent="not installed"))
    roofline = Roofline(1.0, 1.0, 1.0)
    cell = measure_prefill(field_of(*rivals), make_plan({"repeats": 6}), roofline, 2048, 2000, say_nothing)
    turn = ["defensivekv 2000", "stock 2000"]
    assert log == ["defensivekv 256", "stock 256", *turn, *turn]
    ours, stock, kvpress = cell.outcomes
    assert (ours.label, ours.policy, ours.samples_s) == ("layer-defensivekv 20 %", "layer-defensivekv", (2.0, 2.0))
    assert stock.samples_s == (2.0, 2.0)
    assert kvpress.status == "missing"
