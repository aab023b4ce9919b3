"""The order of methods that was measured, held against the paper's."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from defensivekv.evaluation.report.cell import Setting
from defensivekv.evaluation.report.order import Group
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.statistics import Interval, mean_interval

PAPER_ORDER = ("streaming-llm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv")
"""Worst to best at a 20 % budget, Llama-3.1-8B, mean over seven domains (arXiv 2510.13334)."""


def order_disagreements(
    results: Results, setting: Setting, group: Group, budget: str, order: Sequence[str] = PAPER_ORDER
) -> list[tuple[str, str, Interval]]:
    """Pairs in `order` that came out the other way around: (expected worse, expected better, by).

    `by`: the mean difference "worse less better" over the samples that both answered, with its paired 95 % interval.
    Pairs without such samples are left out.
    """
    pairs = []
    for worse, better in combinations(order, 2):
        differences: list[float] = []
        for task in results.tasks(setting, group):
            lower, upper = (results.cell(setting, name, budget, task) for name in (worse, better))
            paired = None if lower is None or upper is None else lower.paired_with(upper)
            if paired is not None:
                differences.extend((paired[0] - paired[1]).tolist())
        if differences and np.mean(differences) > 0:
            pairs.append((worse, better, mean_interval(differences)))
    return pairs
