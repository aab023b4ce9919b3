from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from defensivekv.bench.records import CellRecord, Outcome, Results
from defensivekv.bench.report import draw_figures, print_results

MACHINE = {"device": "a [CPU]", "threads": 2, "versions": {"torch": "2"}, "commit": "abc"}
MODEL = {
    "name": "a $shape",
    "layers": 2,
    "of_layers": 16,
    "parameters": 10**9,
    "dtype": "bfloat16",
    "weight_bytes": 2 * 10**9,
    "token_bytes": 4096,
}


def outcome(rival: str, seconds: float, label: str = "", **fields: Any) -> Outcome:
    fields |= {"samples_s": (seconds, 0.8 * seconds, 1.3 * seconds), "floor_s": seconds / 2, "held_bytes": 2**20}
    return Outcome(rival=rival, label=label or rival, **fields)


def cell(kind: Any, length: int, batch: int = 1, *extra: Outcome, **fields: Any) -> CellRecord:
    ours = outcome("defensivekv", 0.1 * batch, "defensivekv 20 %", peak_bytes=2**20 * length, note="by hand")
    stock = outcome("stock", 0.4 * length / 1024, peak_bytes=2**22 * length, note="by hand")
    outcomes = (ours, stock, *extra)
    return CellRecord(kind=kind, length=length, batch=batch, filled=length, outcomes=outcomes, **fields)


FAILED = Outcome(rival="kvpress", label="kvpress 20 %", status="failed", reason="RuntimeError: [bold] news")
MISSING = Outcome(rival="openvino", label="openvino 20 %", status="missing", reason="not installed: run it")


def results_of(*cells: CellRecord) -> Results:
    return Results(
        settings={},
        machine=MACHINE,
        model=MODEL,
        roofline={"read": 2e10, "copy": 1e10, "matmul": 2e11},
        rivals={"openvino": {"missing": "not installed: run it"}, "kvpress": {"versions": {"kvpress": "0.5.5"}}},
        cells=cells,
    )


def test_the_tables_say_what_was_measured_and_what_was_not(capsys: pytest.CaptureFixture[str]) -> None:
    capacity = Outcome(rival="stock", label="stock", held_bytes=4096, longest=300_000, largest_batches={1024: 9})
    results = results_of(
        cell("steps", 1024, 1, FAILED, MISSING, read_speeds=(2e10, 1e10)),
        cell("prefill", 1024),
        cell("memory", 1024),
        CellRecord(kind="capacity", length=0, batch=0, filled=0, memory_bytes=2**34, outcomes=(capacity,)),
    )
    print_results(results, Console(width=80))
    text = capsys.readouterr().out
    assert "2 layers of 16" in text
    assert "kvpress 20 %: RuntimeError: [bold] news" in text
    assert text.count("not installed: run it") == 1, "said at the head, and not in every table"
    assert "defensivekv 20 %, stock: by hand" in text
    assert "noisy" not in text
    assert "memory was read at 10.0 to 20.0 GB/s" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "defensivekv 20 % 100 80 to 130 10 1.00 1.0 MiB 50 50%" in rows
    assert "stock 400 320 to 520 2.5 4.00 1.0 MiB 200 50%" in rows
    assert "defensivekv 20 % 0.1 0.08 to 0.13 -75.0% 0.05" in rows
    assert "defensivekv 20 % 1.00 GiB 25%" in rows
    assert "what fits beside the weights into 16.00 GiB" in rows
    assert "stock 4.0 KiB 300,000 tokens 9" in rows


def test_a_noisy_cell_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    uneven = Outcome(rival="stock", label="stock", samples_s=(0.1, 0.25, 0.3))
    print_results(results_of(cell("steps", 1024, 1, uneven)), Console(width=120))
    assert "noisy: medians are up to 2.5 times the fastest" in capsys.readouterr().out


def test_every_figure_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    lengths = (1024, 4096, 32768)
    cells = [cell(kind, length) for kind in ("steps", "prefill", "memory") for length in lengths]
    cells += [cell("steps", 1024, batch, FAILED) for batch in (2, 4)]
    drawn = draw_figures(results_of(*cells), tmp_path)
    assert [path.name for path in drawn] == ["decode.png", "throughput.png", "prefill.png", "memory.png"]
    for path in drawn:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05, "not blank"


def test_one_length_alone_is_bars_and_nothing_is_nothing(tmp_path: Path) -> None:
    drawn = draw_figures(results_of(cell("steps", 1024, 1, FAILED, MISSING)), tmp_path)
    assert [path.name for path in drawn] == ["decode.png"]
    assert draw_figures(results_of(), tmp_path) == []
    failed = CellRecord(kind="steps", length=1024, batch=1, filled=1024, outcomes=(FAILED,))
    assert draw_figures(results_of(failed), tmp_path) == []
