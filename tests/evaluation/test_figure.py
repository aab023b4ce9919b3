from pathlib import Path

import matplotlib as mpl
import matplotlib.image

from defensivekv.evaluation.figure import draw_scores
from tests.evaluation.cells import cell

mpl.use("Agg")


def test_every_policy_is_drawn_in_a_colour_of_its_own(tmp_path: Path) -> None:
    names = ("layer-defensivekv", "snapkv")
    cells = [cell("full", [1.0, 1.0], 1.0)]
    cells += [cell(name, [0.2 + budget, 0.3 + budget], budget) for name in names for budget in (0.1, 0.4)]
    draw_scores(cells, tmp_path / "both.png", title="title")
    draw_scores(cells[:3], tmp_path / "one.png", title="title")
    both = matplotlib.image.imread(tmp_path / "both.png")
    one = matplotlib.image.imread(tmp_path / "one.png")
    assert both.shape[0] > 400
    assert both.shape[1] > 700

    def pixels(image: object, colour: str) -> int:
        rgb = mpl.colors.to_rgb(colour)
        return int((abs(image[..., :3] - rgb) < 0.02).all(-1).sum())  # type: ignore[index]

    assert pixels(both, "#b2182b") > 200
    assert pixels(one, "#b2182b") > 200
    assert pixels(both, "#92c5de") > 200
    assert pixels(one, "#92c5de") == 0
