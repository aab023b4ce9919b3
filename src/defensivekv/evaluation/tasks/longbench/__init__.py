"""LongBench (arXiv 2308.14508): its 16 English datasets, from the hub or from files of the same schema."""

from defensivekv.evaluation.tasks.longbench.task import TASKS, LongBenchTask, make_task

__all__ = ["TASKS", "LongBenchTask", "make_task"]
