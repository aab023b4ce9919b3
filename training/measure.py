"""Full-cache accuracy of the packaged model: `python -m training.measure`. The model card quotes it."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from defensivekv.evaluation import evaluate_cell, make_suite
from defensivekv.evaluation.statistics import mean_interval
from defensivekv.needleworld import TASKS, demo_model
from defensivekv.policies import policy

SEED = 500
"""Apart from every seed that training draws from, and from the demo's."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=demo_model(), help="the checkpoint")
    parser.add_argument("--documents", type=int, default=50, help="documents of each task")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="their lengths")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    table = Table("tokens", *TASKS)
    record: dict[str, object] = {"documents_per_task": arguments.documents, "seed": SEED}
    for tokens in arguments.tokens:
        suite = make_suite(arguments.documents, num_tokens=tokens, seed=SEED)
        cell = evaluate_cell(model, tokenizer, suite, policy("full"))
        scores: dict[str, list[float]] = {task: [] for task in TASKS}
        for sample, value in zip(suite, cell.document_scores, strict=True):
            scores[sample.task].append(value)
        means = {task: mean_interval(values) for task, values in scores.items()}
        table.add_row(str(tokens), *(f"{m.mean:.1%} ({m.low:.1%} to {m.high:.1%})" for m in means.values()))
        record[str(tokens)] = {task: [m.mean, m.low, m.high] for task, m in means.items()}
    Console(width=140).print(table)
    Path(arguments.folder, "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
