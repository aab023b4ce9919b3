"""What an evaluation found, told: tables, figures, a page, and the published figures beside one's own.

Knows records and timings, no model and no file of theirs.
"""

from defensivekv.evaluation.report.aggregate import Aggregate
from defensivekv.evaluation.report.cell import Cell, CellKey, Setting
from defensivekv.evaluation.report.comparison import Comparison, compare
from defensivekv.evaluation.report.order import Group
from defensivekv.evaluation.report.results import Failure, Results
from defensivekv.evaluation.report.terminal import print_report
from defensivekv.evaluation.report.writing import write_report, write_results

__all__ = [
    "Aggregate",
    "Cell",
    "CellKey",
    "Comparison",
    "Failure",
    "Group",
    "Results",
    "Setting",
    "compare",
    "print_report",
    "write_report",
    "write_results",
]
