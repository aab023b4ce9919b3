"""The folder of a run: `results.json`, written anew after each cell, so that a stopped run goes on."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from defensivekv.bench.records import CellKey, CellRecord, Results
from defensivekv.errors import InvalidInputError
from defensivekv.folders import replace_file

FILE = "results.json"


class Store:
    """The results so far. Raises InvalidInputError where the folder's are of other settings."""

    def __init__(self, folder: Path, settings: dict[str, Any], made_with: dict[str, dict[str, Any]]) -> None:
        """settings: as of `Results`. made_with: its fields machine, model and roofline."""
        self._path = folder / FILE
        earlier = read_results(folder) if self._path.exists() else None
        if earlier is not None:
            _check_same(folder, earlier.settings, settings)
        self.results = Results(
            settings=settings,
            rivals={} if earlier is None else earlier.rivals,
            cells=() if earlier is None else earlier.cells,
            **made_with,
        )

    def is_done(self, key: CellKey, rivals: Collection[str]) -> bool:
        """Whether the cell was measured with all of these rivals, and none of them failed."""
        cell = self.results.cell(key)
        if cell is None:
            return False
        tried = {each.rival: each.status for each in cell.outcomes}
        return all(tried.get(name) in ("ok", "no room") for name in rivals)

    def add(self, cell: CellRecord, rivals: dict[str, dict[str, Any]]) -> None:
        """Adds the cell, in place of an earlier one, and what is known of the rivals; writes the file."""
        made = {name: self.results.machine.get(name, "") for name in ("date", "commit")}
        cell = cell.model_copy(update=made)
        others = tuple(each for each in self.results.cells if each.key != cell.key)
        self.results = self.results.model_copy(
            update={"cells": (*others, cell), "rivals": {**self.results.rivals, **rivals}}
        )
        self.write()

    def write(self) -> None:
        """The file, whole."""
        replace_file(self._path, self.results.model_dump_json(indent=1) + "\n")


def read_results(folder: Path) -> Results:
    """The results in a folder. Raises InvalidInputError where there are none."""
    path = folder / FILE
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InvalidInputError(f"cannot read {str(path)!r} as results ({said}): give another folder") from None


def _check_same(folder: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    names = sorted(earlier.keys() | settings.keys())
    pairs = [(name, earlier.get(name), settings.get(name)) for name in names]
    differences = [f"{name} was {before!r} and is now {now!r}" for name, before, now in pairs if before != now]
    if differences:
        raise InvalidInputError(
            f"{str(folder)!r} was measured otherwise: {'; '.join(differences)}. Give another folder, or the settings "
            "it was measured with"
        )
