"""How good the answers are: tasks, metrics, the runner, and the report.

`tasks` says what is asked and `metrics` how answers are scored; `runner` answers it under policies and budgets, into a
folder of records; `report` tells what they say.
"""

from defensivekv.evaluation.ranking import PAPER_ORDER, order_disagreements
from defensivekv.evaluation.statistics import Interval, mean_interval

__all__ = ["PAPER_ORDER", "Interval", "mean_interval", "order_disagreements"]
