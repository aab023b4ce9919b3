"""What a run found, as tables on the terminal and as figures."""

from defensivekv.bench.report.figures import draw_figures
from defensivekv.bench.report.tables import print_results

__all__ = ["draw_figures", "print_results"]
