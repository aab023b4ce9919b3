from pathlib import Path
from typing import Any

import pytest
import torch

from defensivekv.bench import runner
from defensivekv.bench.measures.peak import peak_of
from defensivekv.bench.plan import BenchPlan, make_plan
from defensivekv.bench.records import CellRecord
from defensivekv.bench.runner import bench
from defensivekv.bench.store import read_results
from defensivekv.bench.subject import Subject
from defensivekv.errors import InvalidInputError, RivalError
from tests.bench.fakes import fake_python


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defensivekv.bench.roofline._BUFFER", {"cpu": 2**20})
    monkeypatch.setattr("defensivekv.bench.roofline._MATRIX", {"cpu": 64})


def plan_of(**fields: Any) -> BenchPlan:
    return make_plan({"lengths": ["256"], "rivals": ["stock", "static", "flat-copy"], **fields}, quick=True)


def outcomes(cell: CellRecord) -> dict[str, str]:
    return {each.label: each.status for each in cell.outcomes}


def test_a_run_measures_every_cell_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(what=["prefill", "decode", "throughput", "capacity"], budgets=["0.2", "64"])
    threads = torch.get_num_threads()
    results = bench(plan, tmp_path)
    assert torch.get_num_threads() == threads
    assert [cell.key for cell in results.cells] == [
        ("prefill", 256, 1),
        ("steps", 256, 1),
        ("steps", 256, 2),
        ("capacity", 0, 0),
    ]
    prefill, single, double, capacity = results.cells
    assert outcomes(single) == outcomes(double)
    ours = ["defensivekv 20 %", "defensivekv 64 a head"]
    flat = ["flat-copy 20 %", "flat-copy 64 a head"]
    assert outcomes(single) == dict.fromkeys([*ours, "stock", "static", *flat], "ok")
    assert set(outcomes(prefill)) == {"layer-defensivekv 20 %", "layer-defensivekv 64 a head", "stock", "static"}
    held = {each.label: each.held_bytes or 0 for each in single.outcomes}
    assert held["stock"] == 256 * results.model["token_bytes"]
    assert held["defensivekv 64 a head"] == 64 * (results.model["token_bytes"] + 2 * 2 * 4), "positions count"
    assert {each.label: each.held_bytes for each in double.outcomes}["stock"] == 2 * held["stock"]
    fits = {each.label: each for each in capacity.outcomes}
    free = 2**30 - results.model["weight_bytes"]
    assert fits["stock"].longest == free // results.model["token_bytes"]
    assert fits["stock"].largest_batches == {256: free // results.model["token_bytes"] // 256}
    assert (fits["defensivekv 20 %"].longest or 0) > 4 * (free // results.model["token_bytes"])
    assert read_results(tmp_path) == results

    monkeypatch.setattr(runner, "measure_steps", lambda *_: pytest.fail("nothing is to be measured again"))
    assert bench(plan, tmp_path).cells == results.cells
    with pytest.raises(InvalidInputError, match="seed was 0 and is now 1"):
        bench(plan.model_copy(update={"seed": 1}), tmp_path)


def test_a_rival_in_another_process_takes_part_in_every_kind(tmp_path: Path) -> None:
    plan = plan_of(rivals=["kvpress"], what=["prefill", "decode"], pythons={"kvpress": fake_python(tmp_path)})
    results = bench(plan, tmp_path / "run")
    prefill, steps = results.cells
    kvpress = next(each for each in steps.outcomes if each.rival == "kvpress")
    assert (kvpress.status, kvpress.held_bytes, kvpress.note) == ("ok", 256, "kept 51")
    assert kvpress.seconds == pytest.approx(0.25, abs=0.01)
    assert next(each.seconds for each in prefill.outcomes if each.rival == "kvpress") == 0.256
    assert results.rivals["kvpress"]["versions"] == {"fake": "1"}
    assert (tmp_path / "run" / "models" / "config.json").exists()
    assert "loading: this is no answer" in (tmp_path / "run" / "logs" / "kvpress.log").read_text()


def test_lengths_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the packaged model has 4k positions: --lengths 8k is more"):
        bench(plan_of(shape=None, lengths=["8k"]), tmp_path)
    assert not list(tmp_path.iterdir())
    whole = bench(plan_of(lengths=["4k"], what=["decode"], rivals=["none"]), tmp_path).cells[0]
    assert (whole.length, whole.filled) == (4096, 4096 - plan_of().room)


def test_peaks_are_those_of_a_process_of_its_own() -> None:
    subject = Subject(None, "tiny", None, "float32", "cpu", 0)
    assert peak_of(subject, 1, "stock", 512, fills=8) > 8 * 512 * 512
    with pytest.raises(RivalError, match=r"status 1: .*unknown policy 'no'"):
        peak_of(subject, 1, "whole", 512, policy="no", share="0.2")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_steps_take_part_and_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[None] = []
    reset = torch.compiler.reset
    monkeypatch.setattr("torch.compiler.reset", lambda: forgotten.append(reset()))
    plan = plan_of(rivals=["compiled", "static-compiled"], lengths=["256", "300"], what=["decode"])
    for cell in bench(plan, tmp_path).cells:
        assert not [each.reason for each in cell.outcomes if each.reason]
        assert outcomes(cell) == dict.fromkeys(
            ["defensivekv 20 %", "defensivekv compiled 20 %", "static compiled"], "ok"
        )
        # What is compiled while warming up is not compiled again in a turn that counts.
        assert max(cell.outcomes[1].samples_s) < 1
    assert len(forgotten) == 2
