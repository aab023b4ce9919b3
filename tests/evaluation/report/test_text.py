import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from defensivekv.evaluation.report.text import markdown_text, one_line, plain, sheet_text, shortened, slug

ANY = st.text(st.characters(exclude_categories=()))


@given(ANY)
def test_what_is_shown_can_be_encoded_and_controls_nothing(text: str) -> None:
    for shown in (plain(text), one_line(text), shortened(text, 10)):
        shown.encode("utf-8")
        assert all(character.isprintable() or character in "\n\t" or ord(character) > 159 for character in shown)


def test_controls_are_spelt_out_and_the_rest_stays() -> None:
    assert plain("a\x1b[31m\x00b\n\tc") == "a\\x1b[31m\\x00b\n\tc"
    assert plain("\ud800 \u202e Größe 漢字") == "\\ud800 \\u202e Größe 漢字"


@given(ANY, st.integers(2, 30))
def test_a_line_is_one_line_of_at_most_so_many_characters(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert len(line) <= limit
    assert "\n" not in line


def test_long_text_says_what_was_left_out() -> None:
    assert shortened("x" * 12, 10) == "x" * 10 + " … (2 more characters)"
    assert shortened("x" * 10, 10) == "x" * 10


@given(ANY)
def test_names_of_files_are_plain(text: str) -> None:
    assert set(slug(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert slug(text)
    assert slug(text)[0] != "."


@given(ANY)
def test_no_sheet_takes_a_name_for_a_formula(text: str) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([sheet_text(text), "end"])
    ((field, end),) = csv.reader(io.StringIO(out.getvalue()))
    assert end == "end"
    assert not field.startswith(("=", "+", "-", "@"))


def test_markdown_has_no_say() -> None:
    assert markdown_text("a|b*c<d>`e`") == "a\\|b\\*c\\<d\\>\\`e\\`"
