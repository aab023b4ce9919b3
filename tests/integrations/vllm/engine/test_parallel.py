"""Two ranks, on the CPU."""

from typing import Any

import pytest

from tests.integrations.vllm.engine.conftest import Run
from tests.integrations.vllm.engine.prompts import check_same, prompts

TWO = {"tensor_parallel_size": 2}
BOUND = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "layer-defensivekv", "budget": 0.2, "head_groups": 2},
        {"policy": "defensivekv", "budget": 0.2, "head_groups": 4},
        {"policy": "snapkv", "budget": 0.2},
    ],
)
def test_two_ranks_answer_as_one(run: Run, options: dict[str, Any]) -> None:
    given = prompts([700, 333, 901, 20, 1500])
    one = run({"options": options, "prompts": given})
    two = run({"options": options, "prompts": given, "engine": TWO}, processes=True, **BOUND)
    check_same(two["outputs"], one["outputs"], near_ties=1)
