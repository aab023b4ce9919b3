"""A run in a process of its own, for a test that kills it: `python -m tests.evaluation.runner.killed_run FOLDER`."""

import sys
from pathlib import Path

import torch

from defensivekv.evaluation.runner import evaluate
from tests.evaluation.runner.samples import ListedTask, byte_model, byte_tokenizer, plan_of, sample

_SAMPLES = tuple(sample(number) for number in range(36))
_TASKS = [ListedTask(_SAMPLES), ListedTask(_SAMPLES, name="listed/again")]
_PLAN = plan_of(["full", {"name": "layer-defensivekv", "window_size": 8}], batch_size=3)


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    evaluate(_PLAN, folder, lambda _: (byte_model(), byte_tokenizer()), tasks=_TASKS)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
