from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from defensivekv.evaluation.report import Results, Setting
from defensivekv.evaluation.report.figures import draw_curves
from defensivekv.evaluation.report.maps import draw_depths, draw_radar, suites_with_depths
from defensivekv.evaluation.report.pictures import draw_pictures, shown_budget
from defensivekv.evaluation.report.styles import styles
from tests.evaluation.report.cases import HAYSTACK, LLAMA, NEEDLEWORLD, RULER_4K, Made, failed, grid, record, split

UNSEEN = Setting(LLAMA, False, "chat")
SEEN = Setting(LLAMA, True, "chat")
RED, BLUE = "#b2182b", "#92c5de"


def results_of(*runs: list[Made]) -> Results:
    return Results.from_records(*split(pair for run in runs for pair in run))


def picture(path: Path) -> NDArray[np.float32]:
    image: NDArray[np.float32] = matplotlib.image.imread(path)
    return image


def pixels(path: Path, colour: str) -> int:
    return int((abs(picture(path)[..., :3] - mpl.colors.to_rgb(colour)) < 0.02).all(-1).sum())


def test_every_policy_is_drawn_and_no_other(tmp_path: Path) -> None:
    run = grid(("full", "snapkv", "layer-defensivekv"), ("0.2", "0.4"), NEEDLEWORLD, samples=3)
    path = tmp_path / "x.png"
    for is_bytes in (False, True):
        assert draw_curves(results_of(run), UNSEEN, path, is_bytes=is_bytes)
        assert pixels(path, RED) > 300
        assert pixels(path, BLUE) > 300
        assert draw_curves(results_of(run[: len(run) * 3 // 5]), UNSEEN, path, is_bytes=is_bytes)
        assert pixels(path, RED) == 0
        assert pixels(path, BLUE) > 300


def test_there_is_a_panel_for_each_suite_and_length(tmp_path: Path) -> None:
    tasks = (*NEEDLEWORLD, "ruler/vt@4096", "ruler/vt@8192", "ruler/vt@16384")
    assert draw_curves(results_of(grid(("full", "snapkv"), ("0.2",), tasks, samples=2)), UNSEEN, tmp_path / "4.png")
    assert draw_curves(
        results_of(grid(("full", "snapkv"), ("0.2",), tasks[-2:], samples=2)), UNSEEN, tmp_path / "2.png"
    )
    four, two = picture(tmp_path / "4.png"), picture(tmp_path / "2.png")
    assert four.shape[0] > 1.7 * two.shape[0]
    assert four.shape[1] > 1.4 * two.shape[1]


def test_query_aware_records_change_nothing_of_the_other_figure(tmp_path: Path) -> None:
    policies, budgets = ("full", "snapkv", "defensivekv"), ("0.2", "0.4")
    run = grid(policies, budgets, NEEDLEWORLD, samples=2)
    aware = grid((*policies, "layer-defensivekv"), budgets, NEEDLEWORLD, samples=2, query_aware=True)
    draw_curves(results_of(run), UNSEEN, tmp_path / "alone.png")
    draw_curves(results_of(run, aware), UNSEEN, tmp_path / "beside.png")
    draw_curves(results_of(run, aware), SEEN, tmp_path / "aware.png")
    alone, beside = picture(tmp_path / "alone.png"), picture(tmp_path / "beside.png")
    assert np.array_equal(alone, beside)
    assert pixels(tmp_path / "aware.png", RED) > 300


def test_a_line_ends_where_there_is_no_mean_and_nothing_is_drawn_without_any(tmp_path: Path) -> None:
    assert not draw_curves(Results.from_records([failed()], []), UNSEEN, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    records = [record(), failed(budget="0.4")]
    assert draw_curves(Results.from_records(records, []), UNSEEN, tmp_path / "x.png")


def test_points_that_leave_out_failures_are_hollow(tmp_path: Path) -> None:
    own = {"policy": "layer-defensivekv", "scores": [0.5]}
    whole = [record(budget=budget, **own) for budget in ("0.2", "0.4")]
    broken = [failed(**own | {"budget": budget, "sample": "1", "scores": []}) for budget in ("0.2", "0.4")]
    for name, records in (("filled", whole), ("hollow", whole + broken)):
        assert draw_curves(Results.from_records(records, []), UNSEEN, tmp_path / f"{name}.png")
    assert pixels(tmp_path / "hollow.png", RED) < pixels(tmp_path / "filled.png", RED) - 60


def test_against_bytes_one_budget_is_no_figure(tmp_path: Path) -> None:
    run = grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD, samples=2)
    assert not draw_curves(results_of(run), UNSEEN, tmp_path / "x.png", is_bytes=True)


def test_the_full_cache_alone_is_no_figure(tmp_path: Path) -> None:
    results = results_of(grid(("full",), ("1",), NEEDLEWORLD, samples=2))
    assert draw_pictures(results, UNSEEN, tmp_path) == []


def test_forty_policies_have_forty_styles() -> None:
    names = ["full", "snapkv", "defensivekv", *(f"mine-{i}" for i in range(38))]
    made = styles(names)
    assert set(made) == set(names) - {"full"}
    assert len(set(made.values())) == 40


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "漢字", "\x1b[31m", "a" * 300, "\ud800", r"\frac{"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    records = [
        record().model_copy(update={"policy": name, "task": f"{name}/{task}@1024", "suite": name, "domain": domain})
        for task, domain in (("a", f"{name}1"), ("b", f"{name}2"), ("c", "z"))
    ]
    records = [r.model_copy(update={"model": name, "metadata": {"depth": 10}}) for r in records]
    results = Results.from_records(records, [])
    drawn = draw_pictures(results, results.settings[0], tmp_path)
    assert len(drawn) == 3
    assert all(p.path.parent == tmp_path and p.path.name.isascii() for p in drawn)


def test_the_radar_needs_three_domains_and_shows_all_policies(tmp_path: Path) -> None:
    run = grid(("full", "snapkv", "layer-defensivekv"), ("0.2",), NEEDLEWORLD, samples=3)
    assert draw_radar(results_of(run), UNSEEN, "0.2", tmp_path / "x.png")
    assert pixels(tmp_path / "x.png", RED) > 300
    assert draw_radar(results_of(run[15:]), UNSEEN, "0.2", tmp_path / "no-full.png")
    assert not draw_radar(results_of(grid(("snapkv",), ("0.2",), NEEDLEWORLD[:2])), UNSEEN, "0.2", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_needles_are_mapped_by_depth_and_length(tmp_path: Path) -> None:
    worst, best = (mpl.colors.to_hex(mpl.colormaps["RdYlBu"](x)) for x in (0.0, 1.0))

    def needle(depth: int, length: int, score: float) -> object:
        task = f"haystack/city@{length}"
        own = {"sample": str(depth), "metadata": {"depth": depth, "length": length}, "scores": [score]}
        return record(task=task, suite="haystack", domain="haystack", **own)

    records = [needle(0, 4096, 1.0), needle(100, 4096, 1.0), needle(0, 8192, 1.0), needle(100, 8192, 0.0)]
    results = Results.from_records(records, [])  # type: ignore[arg-type]
    assert suites_with_depths(results, UNSEEN) == ["haystack"]
    assert draw_depths(results, UNSEEN, "haystack", "0.2", tmp_path / "x.png")
    # The bar of colours stands to the right of the map, which is broad.
    image = picture(tmp_path / "x.png")[..., :3]
    image = image[:, : image.shape[1] * 4 // 5]
    rows, columns = np.nonzero((abs(image - mpl.colors.to_rgb(worst)) < 0.02).all(-1))
    good_rows, good_columns = np.nonzero((abs(image - mpl.colors.to_rgb(best)) < 0.02).all(-1))
    # The one that was not found is deep and long: to the right and below.
    assert rows.min() > good_rows.min()
    assert columns.min() > good_columns.min()
    assert 2 < len(good_rows) / len(rows) < 4


def test_suites_without_depths_have_no_map(tmp_path: Path) -> None:
    results = results_of(grid(("full", "snapkv"), ("0.2",), RULER_4K[:2], samples=2))
    assert suites_with_depths(results, UNSEEN) == []
    assert not draw_depths(results, UNSEEN, "ruler", "0.2", tmp_path / "x.png")


def test_the_budget_of_single_figures_is_the_papers_or_what_most_policies_have() -> None:
    assert shown_budget(results_of(grid(("full", "snapkv"), ("0.1", "0.2"), HAYSTACK[:1])), UNSEEN) == "0.2"
    run = grid(("full", "snapkv"), ("0.4", "1024 entries per head"), HAYSTACK[:1])
    more = grid(("adakv",), ("1024 entries per head",), HAYSTACK[:1])
    assert shown_budget(results_of(run), UNSEEN) == "0.4"
    assert shown_budget(results_of(run, more), UNSEEN) == "1024 entries per head"
