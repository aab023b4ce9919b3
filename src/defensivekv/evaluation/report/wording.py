"""Numbers and settings in the words that tables, figures and pages share."""

from defensivekv.budget import format_bytes
from defensivekv.evaluation.report.cell import Setting
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.statistics import Interval

NONE = "–"
"""Where there is no number."""

EXPLANATION = (
    "Scores are out of 100: the mean over a sample's questions, over samples, over tasks. With each mean stands its "
    "95 % bootstrap interval over samples. Loss: the share of the full cache's mean that is lost, on the samples that "
    "both answered; below zero, something was gained. KV held: the mean bytes of one sample's cache after "
    "compression. A token: the median decoding step, and how many times the full cache's. Cut: samples of whose "
    "document something was left out to fit. Kept: the share of entries held, of those that may be evicted. Bold: the "
    "best of its column, the full cache aside. Samples that failed are counted and never scored."
)


def percent(share: float) -> str:
    """A score or share from 0 to 1, out of 100 with one decimal."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def share_text(share: float) -> str:
    """A share from 0 to 1 with its sign."""
    return f"{100 * share:.3g} %"


def interval_text(interval: Interval | None, n: int) -> str:
    """The two ends, out of 100; how many samples there are where they are too few for an interval."""
    if interval is None:
        return ""
    if n < 2:
        return "1 sample"
    return f"{100 * interval.low:.0f} to {100 * interval.high:.0f}"


def failed_text(failures: int, n: int) -> str:
    """How many samples failed, of all; nothing where none did."""
    return f"{failures}/{failures + n} failed" if failures else ""


def bytes_text(count: float | None) -> str:
    """Bytes for people, or a dash."""
    return NONE if count is None else format_bytes(round(count))


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, or a dash."""
    if seconds is None:
        return NONE
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{1e3 * seconds:.0f} ms"


def seconds_text(seconds: float | None) -> str:
    """Seconds, or a dash."""
    return NONE if seconds is None else f"{seconds:.3g} s"


def counted(number: int, noun: str) -> str:
    """The number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def setting_label(setting: Setting, *, with_query: bool = False) -> str:
    """The model and the template; with_query: and whether the question was seen, where there is no bold to say it."""
    label = f"{one_line(setting.model, 60)}, {one_line(setting.template, 20)} template"
    return f"{label}, QUERY-AWARE" if with_query and setting.query_aware else label
