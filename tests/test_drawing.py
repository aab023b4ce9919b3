import pytest
from matplotlib.lines import Line2D

from defensivekv.drawing import add_legend, drawing, panels


@pytest.mark.parametrize(("letters", "columns"), [(2, 4), (16, 3), (40, 1), (400, 1)])
def test_a_legend_has_as_many_columns_as_the_figure_is_wide_enough_for(letters: int, columns: int) -> None:
    with drawing():
        figure, _ = panels(1, width=5.6)
        add_legend(figure, {f"{number}" * letters: Line2D([], []) for number in range(9)}, 4)
        (legend,) = figure.legends
        figure.draw_without_rendering()
        assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
        assert columns == 1 or legend.get_window_extent().width <= figure.bbox.width


def test_nothing_has_no_legend() -> None:
    with drawing():
        figure, _ = panels(1)
        add_legend(figure, {}, 3)
        assert not figure.legends
