"""The needle world: RULER in small, and the model of it that ships with the package.

Pure Python; knows no tensor and no model library.
"""

from pathlib import Path

from defensivekv.needleworld.questions import MAX_NEW_TOKENS, TASKS, Question, Sample, make_sample, score

__all__ = ["MAX_NEW_TOKENS", "TASKS", "Question", "Sample", "demo_model", "make_sample", "score"]


def demo_model() -> str:
    """The folder of the packaged model, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`."""
    return str(Path(__file__).parent / "checkpoint")
