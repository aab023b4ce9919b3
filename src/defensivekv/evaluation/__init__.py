"""How good the answers are: the packaged model's suite, its runner, its statistics and its picture."""

from defensivekv.evaluation.needles import Cell, evaluate_cell, make_suite
from defensivekv.evaluation.ranking import PAPER_ORDER, order_disagreements
from defensivekv.evaluation.statistics import Interval, mean_interval

__all__ = [
    "PAPER_ORDER",
    "Cell",
    "Interval",
    "evaluate_cell",
    "make_suite",
    "mean_interval",
    "order_disagreements",
]
