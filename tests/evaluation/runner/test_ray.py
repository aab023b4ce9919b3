import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from defensivekv.cli.evaluate import load_for
from defensivekv.errors import DefensiveKVError, InvalidInputError
from defensivekv.evaluation.runner import evaluate
from defensivekv.evaluation.runner.ray import RayCrew
from defensivekv.evaluation.runner.run import Step
from tests.evaluation.runner.samples import load_packaged, needle_task, plan_of

PLAN = plan_of(["full", "layer-defensivekv"], budgets=[0.2], seed=1, batch_size=2, device="cpu")
TASKS = [needle_task("multi_key", 3), needle_task("single_key", 2)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def _records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "records").iterdir()}


def test_a_cluster_writes_the_same_records_in_the_same_order(cluster: Any, tmp_path: Path) -> None:
    evaluate(PLAN, tmp_path / "local", load_packaged, tasks=TASKS)
    steps: list[Step] = []
    evaluate(PLAN, tmp_path / "ray", load_for, tasks=TASKS, on_ray=True, progress=steps.append)
    assert _records(tmp_path / "ray") == _records(tmp_path / "local")
    assert {step.cell.slug for step in steps if step.done == step.samples} == {
        name.removesuffix(".jsonl") for name in _records(tmp_path / "local")
    }
    assert len(steps) == 2 * (2 + 1), "results come batch by batch"
    assert cluster.is_initialized(), "a cluster that was there before is left alone"


@pytest.mark.slow
def test_errors_of_a_worker_are_those_of_this_process(cluster: Any, tmp_path: Path) -> None:
    missing = PLAN.model_copy(update={"model": str(tmp_path / "nowhere")})
    with pytest.raises(InvalidInputError, match="cannot load") as caught:
        evaluate(missing, tmp_path / "run", load_for, tasks=TASKS, on_ray=True)
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_a_run_whose_workers_are_all_lost_says_so_and_goes_on_later(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = RayCrew(load_for, PLAN)

    def lose(step: Step) -> None:
        for worker in crew._workers:
            cluster.kill(worker)

    monkeypatch.setattr("defensivekv.evaluation.runner.ray.RayCrew", lambda *_: crew)
    with pytest.raises(DefensiveKVError, match=r"were lost(.|\n)*run the same command"):
        evaluate(PLAN, tmp_path / "ray", load_for, tasks=TASKS, on_ray=True, progress=lose)
    assert len(_records(tmp_path / "ray")) == 1
    for folder in ("ray", "local"):
        evaluate(PLAN, tmp_path / folder, load_packaged, tasks=TASKS)
    assert _records(tmp_path / "ray") == _records(tmp_path / "local")


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'defensivekv\[ray\]'"):
        RayCrew(load_for, PLAN)
