"""The report's files."""

from collections.abc import Iterable
from pathlib import Path

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.report.cell import CellKey
from defensivekv.evaluation.report.page import render_page
from defensivekv.evaluation.report.pictures import draw_pictures
from defensivekv.evaluation.report.rendering import scores_csv
from defensivekv.evaluation.report.results import Results


def write_report(
    records: Iterable[Record],
    timings: Iterable[tuple[CellKey | tuple[str, str, str, str, bool, str], Timing]],
    folder: Path,
    *,
    against_paper: bool = False,
) -> Path:
    """Writes `report.html`, `scores.csv` and the figures into the folder, made if need be; returns the page's path.

    The same input, in any order, gives the same files. against_paper: with the published figures beside ours. Raises
    InvalidInputError without any record, and as `Results.from_records` does.
    """
    return write_results(Results.from_records(records, timings), folder, against_paper=against_paper)


def write_results(results: Results, folder: Path, *, against_paper: bool = False) -> Path:
    """As `write_report`, of what was gathered already."""
    if not results.cells:
        raise InvalidInputError("there are no records to report: run an evaluation into the folder first")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {setting: draw_pictures(results, setting, folder) for setting in results.settings}
    # newline="": the csv module writes its own ends of lines.
    (folder / "scores.csv").write_text(scores_csv(results), encoding="utf-8", newline="")
    page = folder / "report.html"
    page.write_text(render_page(results, pictures, against_paper=against_paper), encoding="utf-8", newline="")
    return page
