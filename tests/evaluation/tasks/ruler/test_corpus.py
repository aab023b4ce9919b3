from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler.corpus import Essays, read_essays, read_words
from tests.evaluation.tasks.ruler.cases import own_text, samples, task, write_json


@given(st.integers(0, 5000))
def test_the_first_words_are_those_of_the_text_again_and_again(num_words: int) -> None:
    essays = read_essays(None)
    words = essays.text.split(" ")
    expected = (words * (num_words // len(words) + 1))[:num_words]
    assert " ".join(essays.first(num_words)).split(" ") == (expected or [""])


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = 'He met Dr. Lund. "Why?" she asked. It cost 3.50 then! They left, e.g. early... and came back. Then 2 more'
    assert Essays(text, "", is_own=False).sentences == (
        "He met Dr. Lund.",
        '"Why?" she asked.',
        "It cost 3.50 then!",
        "They left, e.g. early... and came back.",
        "Then 2 more",
    )


def test_essays_of_a_folder_replace_our_own_and_are_comparable(tmp_path: Path) -> None:
    write_json(tmp_path, "PaulGrahamEssays.json", {"text": "Startups  grow.\n\nThey do, or not. " * 40})
    assert read_essays(tmp_path).text.startswith("Startups grow. They do, or not. Startups")
    made = task("niah_single_2", data=tmp_path)
    assert made.not_comparable == ""
    assert "PaulGrahamEssays.json sha256:" in made.revision
    assert "Startups grow." in samples("niah_single_2", 1024, data=tmp_path)[0].context


def test_text_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "b.txt").write_text("Second.", "utf-8")
    (tmp_path / "essays" / "a.txt").write_text("First.\n", "utf-8")
    assert read_essays(tmp_path).text == "First. Second."
    before = task("niah_multivalue", data=tmp_path).revision
    (tmp_path / "essays" / "b.txt").write_text("Other.", "utf-8")
    assert task("niah_multivalue", data=tmp_path).revision != before


@pytest.mark.parametrize("content", ["{", "[]", '{"texts": ""}', '{"text": 3}', '{"text": " \\n"}', b"\xff\xfe{"])
def test_essays_of_another_schema_are_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "PaulGrahamEssays.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidInputError, match=r"PaulGrahamEssays\.json"):
        task("niah_single_3", data=tmp_path)


def test_a_folder_without_essays_is_refused_only_where_they_are_needed(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidInputError, match=rf"{folder.name} holds neither PaulGrahamEssays\.json nor essays/"):
            task("niah_multikey_1", data=folder)
        for name in ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"):
            assert task(name, data=folder, length=2048).not_comparable == ""


def test_our_essays_hold_no_digits_and_end_their_sentences() -> None:
    assert not any(letter.isdigit() for letter in own_text())
    assert 60 < len(read_essays(None).sentences) < 150


def test_the_word_lists_are_sorted_and_hold_each_word_once() -> None:
    words = read_words()
    for listed in (words.nouns, words.adjectives, words.verbs, words.all):
        assert list(listed) == sorted(set(listed))
        assert "" not in listed
    assert len(words.all) > 8000
    assert words.source.startswith("wonderwords ")
