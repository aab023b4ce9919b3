from pathlib import Path
from typing import Any

import pytest

from defensivekv.bench.records import CellRecord, Outcome
from defensivekv.bench.store import FILE, Store, read_results
from defensivekv.errors import InvalidInputError

SETTINGS = {"shape": "tiny", "seed": 0}
MADE: dict[str, dict[str, Any]] = {
    "machine": {"commit": "abc", "date": "today"},
    "model": {},
    "roofline": {"read": 1.0},
}


def cell(*outcomes: Outcome, length: int = 512) -> CellRecord:
    return CellRecord(kind="steps", length=length, batch=1, filled=length, outcomes=outcomes)


def outcome(rival: str, **fields: Any) -> Outcome:
    return Outcome(rival=rival, label=rival, **fields)


OURS = outcome("defensivekv", samples_s=(0.5, 0.1, 0.3), floor_s=0.15)


def test_a_folder_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTINGS, MADE)
    assert not store.is_done(("steps", 512, 1), {"defensivekv"})
    store.add(cell(OURS), {"kvpress": {"missing": "not installed"}})
    again = Store(tmp_path, SETTINGS, MADE)
    assert again.is_done(("steps", 512, 1), {"defensivekv"})
    assert not again.is_done(("steps", 1024, 1), {"defensivekv"})
    assert not again.is_done(("steps", 512, 1), {"defensivekv", "kvpress"}), "it has come since"
    again.add(cell(OURS, length=1024), {})
    results = read_results(tmp_path)
    assert [each.length for each in results.of_kind("steps")] == [512, 1024]
    assert results.cells[0].commit == "abc"
    assert results.rivals == {"kvpress": {"missing": "not installed"}}
    found = results.cells[0].outcomes[0]
    assert (found.seconds, found.achieved) == (0.3, 0.5)


@pytest.mark.parametrize(
    ("status", "is_done"), [("ok", True), ("no room", True), ("failed", False), ("missing", False)]
)
def test_what_failed_is_measured_again_in_place_of_the_old(tmp_path: Path, status: Any, is_done: bool) -> None:
    store = Store(tmp_path, SETTINGS, MADE)
    store.add(cell(OURS, outcome("stock", status=status, reason="because")), {})
    assert store.is_done(("steps", 512, 1), {"defensivekv", "stock"}) is is_done
    store.add(cell(OURS, outcome("stock", samples_s=(1.0,))), {})
    assert len(read_results(tmp_path).cells) == 1
    assert store.is_done(("steps", 512, 1), {"defensivekv", "stock"})


def test_other_settings_and_broken_files_are_refused(tmp_path: Path) -> None:
    Store(tmp_path, SETTINGS, MADE).write()
    with pytest.raises(InvalidInputError, match="seed was 0 and is now 1"):
        Store(tmp_path, SETTINGS | {"seed": 1}, MADE)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(InvalidInputError, match=r"cannot read .* as results"):
        Store(tmp_path, SETTINGS, MADE)
    with pytest.raises(InvalidInputError, match="give another folder"):
        read_results(tmp_path / "none")
