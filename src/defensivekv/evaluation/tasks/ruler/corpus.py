"""Words and essays that haystacks are made of, and where they come from.

A data folder holds `PaulGrahamEssays.json` ({"text": ...}, as RULER's downloader writes it) or `essays/*.txt`; with
no folder a few essays of our own serve. The word lists are those of the package wonderwords, as RULER's are.
"""

import hashlib
import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from defensivekv.errors import InvalidInputError

_ESSAYS_JSON = "PaulGrahamEssays.json"
_ESSAYS_FOLDER = "essays"
_OWN = "defensivekv.evaluation.tasks.ruler"
_SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*$")
_ABBREVIATIONS = frozenset({"Mr.", "Mrs.", "Ms.", "Dr.", "St.", "vs.", "e.g.", "i.e.", "cf."})


@dataclass(frozen=True)
class Words:
    """The word lists of wonderwords, each sorted and without repetition. source: package and version."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    source: str

    @cached_property
    def all(self) -> tuple[str, ...]:
        """Every word once, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))


@dataclass(frozen=True)
class Essays:
    """A running text. source: file and hash. is_own: of this package, so that figures are not comparable."""

    text: str
    source: str
    is_own: bool

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The text's sentences; a full stop before a small letter or after an abbreviation ends none."""
        words = self.text.split(" ")
        sentences, start = [], 0
        for i, word in enumerate(words, start=1):
            is_end = i == len(words) or not words[i][0].islower()
            if i == len(words) or (is_end and _SENTENCE_END.search(word) and word not in _ABBREVIATIONS):
                sentences.append(" ".join(words[start:i]))
                start = i
        return tuple(sentences)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends, total = [], 0
        for sentence in self.sentences:
            total += sentence.count(" ") + 1
            ends.append(total)
        return tuple(ends)

    def first(self, num_words: int) -> list[str]:
        """The sentences of the first so many words, the last one cut; the text is repeated where it is too short."""
        rounds, rest = divmod(num_words, self._ends[-1])
        whole = bisect_right(self._ends, rest)
        sentences = list(self.sentences) * rounds + list(self.sentences[:whole])
        missing = rest - (self._ends[whole - 1] if whole else 0)
        if missing:
            sentences.append(" ".join(self.sentences[whole].split(" ")[:missing]))
        return sentences


@lru_cache(maxsize=1)
def read_words() -> Words:
    """The word lists of wonderwords. Raises InvalidInputError where the package is missing."""
    try:
        folder = files("wonderwords.assets")
    except ModuleNotFoundError as error:
        message = "RULER's keys and word lists come from wonderwords: pip install defensivekv[eval]"
        raise InvalidInputError(message) from error
    nouns, adjectives, verbs = (
        tuple(sorted({line.rstrip() for line in (folder / f"{name}list.txt").read_text("utf-8").splitlines()} - {""}))
        for name in ("noun", "adjective", "verb")
    )
    return Words(nouns, adjectives, verbs, f"wonderwords {version('wonderwords')}")


def read_essays(data: Path | None) -> Essays:
    """Essays of a data folder, white space made single spaces; without a folder, our own.

    Raises InvalidInputError naming the file that is missing or holds something else.
    """
    if data is None:
        return _own_essays()
    file = data / _ESSAYS_JSON
    if file.is_file():
        loaded = parse_json(file, read_text(file))
        raw = loaded.get("text") if isinstance(loaded, dict) else None
        if not isinstance(raw, str):
            raise InvalidInputError(f'{file} must hold {{"text": "..."}}, as RULER\'s downloader writes it')
        name = _ESSAYS_JSON
    else:
        paths = sorted((data / _ESSAYS_FOLDER).glob("*.txt"))
        if not paths:
            what = f"neither {_ESSAYS_JSON} nor {_ESSAYS_FOLDER}/*.txt"
            raise InvalidInputError(f"{data} holds {what}: add one, or give no data folder to use our own few essays")
        raw = "\n".join(read_text(path) for path in paths)
        file, name = data / _ESSAYS_FOLDER, f"{_ESSAYS_FOLDER}/*.txt"
    text = " ".join(raw.split())
    if not text:
        raise InvalidInputError(f"{file} holds no words: fill it, or give no data folder to use our own few essays")
    return Essays(text, f"{name} {content_hash(text)}", is_own=False)


@lru_cache(maxsize=1)
def _own_essays() -> Essays:
    text = " ".join(read_own_text("essays.txt").split())
    return Essays(text, f"own essays {content_hash(text)}", is_own=True)


def read_own_text(name: str) -> str:
    """A file of this package's data."""
    return (files(_OWN) / "data" / name).read_text("utf-8")


def read_text(path: Path) -> str:
    """A text file. Raises InvalidInputError where it is missing or not UTF-8."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read ({error}): put a UTF-8 text file there") from error


def parse_json(path: Path, text: str) -> Any:
    """What the text of a JSON file holds. Raises InvalidInputError naming the file where it is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{path} is not JSON ({error}): download it again") from error


def content_hash(text: str) -> str:
    """The first twelve digits of a text's SHA-256."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
