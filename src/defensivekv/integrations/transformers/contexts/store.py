"""Contexts kept by key, on this machine or in a bucket that many share."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import Budget
from defensivekv.errors import ContextError, DamagedContextError, DefensiveKVWarning, InvalidInputError
from defensivekv.integrations.transformers.bound import parse_bytes
from defensivekv.integrations.transformers.contexts.context import Context
from defensivekv.integrations.transformers.contexts.files import ContextFacts, ContextFile, read_facts, write_context
from defensivekv.integrations.transformers.contexts.folder import Folder, Held, check_key
from defensivekv.integrations.transformers.contexts.remote import Remote
from defensivekv.policies import Policy


@dataclass(frozen=True)
class StoredContext:
    """One entry of a store. facts: what its file says; None where that is damaged. nbytes: of its file."""

    key: str
    nbytes: int
    last_used: datetime
    facts: ContextFacts | None


class ContextStore:
    """Contexts by key: `Context.key`, a hash of everything that decides what is in them.

    Any number of processes may use a folder at once. An entry is whole or not there, whatever happens to the one that
    writes it; one whose bits have changed is named in a warning, dropped, and not answered from. Beyond `max_bytes`,
    the least recently used go.

    address: a folder, or an address of fsspec's such as "s3://bucket/contexts", whose files are copied to this machine
    when they are first asked for. max_bytes: of all entries together, such as "20GiB"; None: no limit. copies: folder
    of those copies, under the same limit; None: one in the user's cache. storage_options: for fsspec.

    Raises InvalidInputError for a place that cannot be used, BudgetError for a limit that means nothing.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        max_bytes: int | str | Budget | None = None,
        *,
        copies: str | os.PathLike[str] | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.address = os.fspath(address)
        self.max_bytes = parse_bytes("max_bytes", max_bytes)
        self._remote = None
        place = Path(self.address)
        if "://" in self.address and not self.address.startswith("file://"):
            self._remote = Remote(self.address, self.max_bytes, storage_options or {})
            place = _default_copies(self.address) if copies is None else Path(copies)
        elif copies is not None or storage_options:
            raise InvalidInputError("copies and storage_options are for addresses such as s3://bucket/contexts")
        elif self.address.startswith("file://"):
            place = Path(self.address.removeprefix("file://"))
        self._folder = Folder(place, self.max_bytes)

    def __repr__(self) -> str:
        return f"ContextStore({self.address!r})"

    def __contains__(self, key: object) -> bool:
        return self.contains(check_key(key))

    def contains(self, key: str) -> bool:
        """Whether there is an entry of that key."""
        return self._folder.place(key).exists() if self._remote is None else self._remote.has(key)

    def get(
        self, key: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, policy: Policy | None = None
    ) -> Context | None:
        """The context of that key, all of it checked; None where there is none, or where it was damaged and is gone.

        policy: as of `load_context`. Raises ContextError where it is another model's.
        """
        path = self._folder.place(key)
        try:
            if self._remote is not None and not path.exists():
                if not self._remote.has(key):
                    return None
                self._folder.put(key, self._remote.fetch(key))
            file = ContextFile(path)
            if file.facts.key != key:
                raise DamagedContextError(f"{path} holds the context of another key")
            file.verify(scores=True)
        except FileNotFoundError:
            return None
        except DamagedContextError as error:
            self.remove(key)
            warnings.warn(f"{error}; dropped from the store", DefensiveKVWarning, stacklevel=2)
            return None
        context = file.context(model, tokenizer, policy)
        self._folder.use(key)
        if self._remote is not None:
            self._remote.use(key)
        return context

    def put(self, context: Context) -> str:
        """Keeps a context, and gives its key. One that is there already is not written again.

        Raises InvalidInputError where it is larger than the store may be, or cannot be written.
        """
        key = context.key
        if not self.contains(key):
            path = self._folder.put(key, lambda file: write_context(context, file))
            if self._remote is not None:
                self._remote.put(key, path)
        self._folder.use(key)
        return key

    def list(self) -> "list[StoredContext]":
        """All entries, the most recently used first."""
        entries = (self._describe(one) for one in self._held())
        return [entry for entry in entries if entry is not None]

    def resolve(self, start: str) -> str:
        """The one key that begins with `start`. Raises InvalidInputError where there is none, or several."""
        keys = [one.key for one in self._held() if one.key.startswith(start)] if start else []
        if len(keys) != 1:
            raise InvalidInputError(f"{len(keys)} contexts of {self.address} have a key that begins with {start!r}")
        return keys[0]

    def describe(self, key: str) -> StoredContext:
        """The entry of that key. Raises InvalidInputError where there is none."""
        found = next((self._describe(one) for one in self._held() if one.key == check_key(key)), None)
        if found is None:
            raise InvalidInputError(f"{self.address} has no context of key {key}")
        return found

    def remove(self, key: str) -> bool:
        """Whether there was an entry of that key, which is gone now. Who answers from it goes on."""
        was_here = self._folder.remove(key)
        return was_here if self._remote is None else self._remote.remove(key)

    def prune(self, max_bytes: int | str | Budget | None = None) -> "list[str]":
        """Removes what writers that died left, and the least recently used entries beyond `max_bytes`, or the store's
        own limit; gives the keys of the entries.
        """
        most = self.max_bytes if max_bytes is None else parse_bytes("max_bytes", max_bytes)
        gone = self._folder.prune(most)
        return gone if self._remote is None else self._remote.prune(most)

    def _held(self) -> Sequence[Held]:
        return self._folder.held() if self._remote is None else self._remote.held()

    def _describe(self, one: Held) -> StoredContext | None:
        try:
            with self._folder.place(one.key).open("rb") if self._remote is None else self._remote.open(one.key) as file:
                facts: ContextFacts | None = read_facts(file, one.key)
        except FileNotFoundError:
            return None
        except ContextError:
            facts = None
        return StoredContext(one.key, one.nbytes, datetime.fromtimestamp(one.used, UTC), facts)


def _default_copies(address: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "defensivekv" / hashlib.sha256(address.encode()).hexdigest()[:16]
