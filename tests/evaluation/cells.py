"""Made-up cells for tests of what is drawn and said of them."""

from defensivekv.evaluation import Cell


def cell(policy: str, scores: list[float], budget: float = 0.2) -> Cell:
    """A cell with these document scores."""
    return Cell(policy, budget, tuple(scores), 1e6 * budget, 1e-3, budget, tuple(() for _ in scores))
