"""Contexts kept by key, on this machine or in a bucket that many share."""

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

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
        place = local_folder(self.address)
        if place is None:
            self._remote = Remote(self.address, self.max_bytes, storage_options or {})
            place = _default_copies(self.address) if copies is None else Path(copies)
        elif copies is not None or storage_options:
            raise InvalidInputError("copies and storage_options are for addresses such as s3://bucket/contexts")
        self._folder = Folder(place.expanduser().absolute(), self.max_bytes)

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
        try:
            found = self._load(key, model, tokenizer, policy)
        except FileNotFoundError:
            return None
        except DamagedContextError as error:
            what = "dropped from the store"
            try:
                self.remove(key)
            except InvalidInputError as why:
                what = f"it stays in the store, since {why}"
            warnings.warn(f"{error}; {what}", DefensiveKVWarning, stacklevel=2)
            return None
        except OSError as error:
            raise InvalidInputError(f"cannot read from {self.address}: {error}") from error
        self._use(key)
        return found

    def _load(
        self, key: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy | None
    ) -> Context:
        """The context of that key. Raises FileNotFoundError where there is none, DamagedContextError, ContextError."""
        if self._remote is not None:
            if not self._remote.has(key):
                self._folder.remove(key)
                raise FileNotFoundError(key)
            if self._folder.place(key).exists():
                try:
                    return self._verified(key).context(model, tokenizer, policy)
                except DamagedContextError:
                    # The copy is; what it is a copy of may be whole.
                    self._folder.remove(key)
            self._folder.put(key, self._remote.fetch(key))
        return self._verified(key).context(model, tokenizer, policy)

    def _verified(self, key: str) -> ContextFile:
        file = ContextFile(self._folder.place(key))
        if file.facts.key != key:
            raise DamagedContextError(f"{file.path} holds the context of another key")
        file.verify(scores=True)
        return file

    def _use(self, key: str) -> None:
        self._folder.use(key)
        if self._remote is not None:
            self._remote.use(key)

    def put(self, context: Context) -> str:
        """Keeps a context, and gives its key. One that is there already, and whole, is not written again.

        Raises InvalidInputError where it is larger than the store may be, or cannot be written.
        """
        key = context.key
        was_whole = self._is_whole(key)
        if not was_whole:
            self._folder.put(key, lambda file: write_context(context, file))
        if self._remote is not None and not (was_whole and self._remote.has(key)):
            self._remote.put(key, self._folder.place(key))
        self._use(key)
        return key

    def offer(self, context: Context) -> None:
        """As `put`, of what should not be lost where it cannot be kept: a warning says why."""
        try:
            self.put(context)
        except InvalidInputError as error:
            warnings.warn(f"not put into {self.address}: {error}", DefensiveKVWarning, stacklevel=3)

    def _is_whole(self, key: str) -> bool:
        try:
            self._verified(key)
        except (ContextError, OSError):
            return False
        return True

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
        except (ContextError, OSError):
            facts = None
        return StoredContext(one.key, one.nbytes, datetime.fromtimestamp(one.used, UTC), facts)


def local_folder(address: str) -> Path | None:
    """The folder that an address names; None: it is fsspec's. Raises InvalidInputError for one that is neither."""
    protocol, found, rest = address.partition("://")
    if not found:
        # Path("s3://bucket") has one slash.
        if re.match(r"[a-z][a-z0-9]+:/", address):
            raise InvalidInputError(f"{address!r} was an address once: give it as text, with both slashes")
        return Path(address)
    if protocol != "file":
        return None
    if not rest.startswith("/"):
        raise InvalidInputError(f"{address!r} names a machine: a folder of this one begins file:///")
    return Path(url2pathname(rest))


def _default_copies(address: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "defensivekv" / hashlib.sha256(address.encode()).hexdigest()[:16]
