"""Runs of model x policy x budget x task: what one is made of, how a sample is asked, and where it is written."""

from defensivekv.evaluation.runner.plan import PolicyPlan, RunPlan, load_plan, make_plan
from defensivekv.evaluation.runner.rescoring import rescore
from defensivekv.evaluation.runner.run import evaluate
from defensivekv.evaluation.runner.store import read_records, read_timings

__all__ = [
    "PolicyPlan",
    "RunPlan",
    "evaluate",
    "load_plan",
    "make_plan",
    "read_records",
    "read_timings",
    "rescore",
]
