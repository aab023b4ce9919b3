"""New scores for answers that are there already."""

from pathlib import Path

from defensivekv.evaluation.records import Record
from defensivekv.evaluation.runner.scribe import metric_version, score_outputs
from defensivekv.evaluation.runner.store import read_lines, record_files
from defensivekv.folders import locked, replace_file


def rescore(folder: Path) -> int:
    """Scores every answer of a run again, without a model; how many records changed.

    Each file is replaced whole. Raises InvalidInputError where the folder holds no run, another run is writing to
    it, or a metric is not known any more.
    """
    if not (folder / "records").is_dir():
        record_files(folder)
    with locked(folder):
        return sum(rescore_file(path, stale_only=False) for path in record_files(folder))


def rescore_file(path: Path, *, stale_only: bool) -> int:
    """Scores a file's answers again, or those by an older version of their metric; how many records changed."""
    records = read_lines(path, Record)[0]
    scored = [_scored(record, stale_only=stale_only) for record in records]
    changed = sum(old != new for old, new in zip(records, scored, strict=True))
    if changed:
        replace_file(path, "".join(record.line() for record in scored))
    return changed


def _scored(record: Record, *, stale_only: bool) -> Record:
    version = metric_version(record.metric)
    if stale_only and record.metric_version == version:
        return record
    update: dict[str, object] = {"metric_version": version}
    if record.status == "ok":
        update["scores"] = score_outputs(record.metric, record.outputs, record.references, record.choices)
    return record.model_copy(update=update)
