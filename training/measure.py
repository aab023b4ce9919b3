"""Full-cache accuracy of the packaged model: `python -m training.measure`. The model card quotes it."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from defensivekv.evaluation.report import Results
from defensivekv.evaluation.runner import evaluate, make_plan, read_records
from defensivekv.needleworld import TASKS, demo_model

SEED = 500
"""Apart from every seed that training draws from, and from the demo's."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=demo_model(), help="the checkpoint")
    parser.add_argument("--documents", type=int, default=50, help="documents of each task")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="their lengths")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    plan = make_plan(
        {
            "tasks": ["needleworld"],
            "policies": ["full"],
            "lengths": arguments.tokens,
            "num_samples": arguments.documents,
            "seed": SEED,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluate(plan, Path(folder), lambda _: (model, tokenizer))
        results = Results.from_records(read_records(Path(folder)), [])
    (setting,) = results.settings
    table = Table("tokens", *TASKS)
    record: dict[str, object] = {"documents_per_task": arguments.documents, "seed": SEED}
    for tokens in arguments.tokens:
        cells = [results.cell(setting, "full", "1.0", f"needleworld/{task}@{tokens}") for task in TASKS]
        means = {task: cell.score for task, cell in zip(TASKS, cells, strict=True) if cell is not None and cell.score}
        table.add_row(str(tokens), *(f"{m.mean:.1%} ({m.low:.1%} to {m.high:.1%})" for m in means.values()))
        record[str(tokens)] = {task: [m.mean, m.low, m.high] for task, m in means.items()}
    Console(width=140).print(table)
    Path(arguments.folder, "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
