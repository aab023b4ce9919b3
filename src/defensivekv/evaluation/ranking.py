"""The order of methods that was measured, held against the paper's."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from defensivekv.evaluation.needles import Cell
from defensivekv.evaluation.statistics import Interval, mean_interval

PAPER_ORDER = ("streaming-llm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv")
"""Worst to best at a 20 % budget, Llama-3.1-8B, mean over seven domains (arXiv 2510.13334)."""


def order_disagreements(
    cells: Mapping[str, Cell], order: Sequence[str] = PAPER_ORDER
) -> list[tuple[str, str, Interval]]:
    """Pairs in `order` that came out the other way around: (expected worse, expected better, by).

    cells: by policy, all over the same documents. `by`: the mean difference "worse less better" with its paired
    95 % interval.
    """
    present = [name for name in order if name in cells]
    pairs = []
    for worse, better in combinations(present, 2):
        difference = np.subtract(cells[worse].document_scores, cells[better].document_scores)
        if difference.mean() > 0:
            pairs.append((worse, better, mean_interval(difference.tolist())))
    return pairs
