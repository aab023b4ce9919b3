"""Contexts as files: one safetensors file each, mapped when it is loaded, refused where it does not fit.

docs/contexts.md has the format, for whoever reads it with something else.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.cache.tensor_file import Readable, TensorFile, Writable, read_header, write_tensors
from defensivekv.errors import BudgetError, ContextError, DamagedContextError, DefensiveKVError, InvalidInputError
from defensivekv.folders import whole_file
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.contexts import snapshot
from defensivekv.integrations.transformers.contexts.context import Context
from defensivekv.integrations.transformers.contexts.fingerprints import (
    ModelFingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
)
from defensivekv.integrations.transformers.contexts.recipe import FORMAT_VERSION, Recipe, key_of
from defensivekv.integrations.transformers.contexts.wrapping import Wrapping
from defensivekv.integrations.transformers.model import enable
from defensivekv.policies import Policy
from defensivekv.policies.encoding import decode, encode

FORMAT = "defensivekv-context"
_RECIPE = ("policy", "options", "chunk_size", "wrapping", "steps", "method_version")
_TEXTS = ("format", "key", "tokenizer")
_MADE_WITH = ("defensivekv", "torch", "transformers")


@dataclass(frozen=True)
class ContextFacts:
    """What a file says of its context.

    key: see `Context.key`. model: its name, where it had one. policy, budget: in words. num_tokens: of document and
    later steps. held: share of the document's entries. prefill_seconds: that reading it took. steps: what was done
    after the document was read. created: when, ISO 8601, UTC. made_with: versions of packages.
    """

    key: str
    model: str
    dtype: str
    policy: str
    budget: str
    num_tokens: int
    held: float
    prefill_seconds: float
    steps: tuple[str, ...]
    created: str
    made_with: dict[str, str]


class ContextFile:
    """A context's file, open and mapped. Raises DamagedContextError where it is not what was written."""

    def __init__(self, path: Path) -> None:
        self._tensors = TensorFile(path)
        self.path = path
        self.content = _content(self._tensors.metadata, str(path))

    @property
    def facts(self) -> ContextFacts:
        """What it says of its context."""
        return _facts(self.content, self.path)

    def verify(self, *, scores: bool) -> None:
        """Compares checksums, of each tensor once; of scores only where asked."""
        self._tensors.verify(name for name in self._tensors.names if scores or not snapshot.is_score(name))

    def context(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy | None = None
    ) -> Context:
        """The context, for the model that made it. Enables the model.

        Raises ContextError where it is another one, DamagedContextError where the file contradicts itself.
        """
        content, facts, now = self.content, self.facts, (model_fingerprint(model), tokenizer_fingerprint(tokenizer))
        self._tensors.verify(("lengths", "tokens"))
        with _making_sense(self.path):
            self._check(*now, policy)
            options = {name: value for name, value in content["options"].items() if value is not None}
            made = decode(content["policy"]) if policy is None else policy
            wrapping = Wrapping(**content["wrapping"])
            cache = EvictingCache(model, made, **options)
            snapshot.restore(cache, self._tensors.__getitem__, self._tensors.names, content["state"], model.device)
            ids = self._tensors["tokens"].to(model.device)[None]
            # The last token of an answer was not read.
            if cache.get_seq_length() not in (ids.shape[1], ids.shape[1] - 1):
                raise DamagedContextError(f"{ids.shape[1]} tokens, of which {cache.get_seq_length()} were read")
            recipe = Recipe(
                *(ids, made, content["options"], content["chunk_size"], wrapping, facts.steps),
                method=content["method_version"],
            )
        enable(model)
        return Context(model, tokenizer, cache, recipe, facts.prefill_seconds, self)

    def _check(self, model: ModelFingerprint, tokenizer: str, policy: Policy | None) -> None:
        there = ModelFingerprint(**self.content["model"])
        values = {name: self.content[name] for name in _RECIPE}
        if key_of(there, self.content["tokenizer"], self._tensors["tokens"][None], values) != self.content["key"]:
            raise DamagedContextError("its key is not that of what it says")
        if differ := there.differences(model):
            raise ContextError(
                f"{self.path} was made by another model ({', '.join(differ)}): {there.described} made it, and this is "
                f"{model.described}; load that model, or compress the document again"
            )
        if self.content["tokenizer"] != tokenizer:
            raise ContextError(
                f"{self.path} was made with another tokenizer (its rules, vocabulary or chat template): load that one, "
                "or compress the document again"
            )
        if policy is not None and encode(policy) != self.content["policy"]:
            raise ContextError(f"{self.path} was made by another policy than {policy.name!r} at {policy.budget}")


def save_context(context: Context, path: str | PathLike[str]) -> None:
    """See `Context.save`."""
    with _opening(str(path)), whole_file(Path(path)) as file:
        write_context(context, file)


def write_context(context: Context, file: Writable) -> None:
    """Writes a context at the beginning of an empty file."""
    recipe, cache = context.recipe, context.cache
    context.check_model()
    context.verify()
    tensors, state = snapshot.take(cache)
    tensors["tokens"] = recipe.ids[0].to(torch.int64)
    model, tokenizer = model_fingerprint(context.model), tokenizer_fingerprint(context.tokenizer)
    values = recipe.as_values()
    report = context.report()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "key": key_of(model, tokenizer, recipe.ids, values),
        "model": asdict(model),
        "tokenizer": tokenizer,
        **values,
        "state": state,
        "prefill_seconds": context.prefill_seconds,
        "about": {
            "policy": recipe.policy.name,
            "budget": report.asked,
            "num_tokens": context.num_tokens,
            "held": report.achieved,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_with": {name: version(name) for name in _MADE_WITH},
        },
    }
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
    write_tensors(file, tensors, metadata)


def load_context(
    path: str | PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Policy | None = None,
) -> Context:
    """The context of a file that `Context.save` wrote, for the model that made it. Enables the model.

    The file is mapped: on a CPU, what answering reads are the file's own pages, which all processes share; what is not
    read is never loaded. Checksums are compared when it is first read.

    policy: the one that it was made with, where it has parts that are not this package's own.
    Raises ContextError for another model, weights, dtype, tokenizer or policy, each by name; DamagedContextError for a
    file that is not what was written; InvalidInputError for one that cannot be opened.
    """
    with _opening(str(path)):
        file = ContextFile(Path(path))
    return file.context(model, tokenizer, policy)


def file_facts(path: Path) -> ContextFacts:
    """What a file says, of its first bytes alone. Raises as `load_context` does of the file."""
    with _opening(str(path)), path.open("rb") as file:
        return read_facts(file, str(path))


def read_facts(file: Readable, name: str) -> ContextFacts:
    """The same of an open file. name: for messages."""
    return _facts(_content(read_header(file, name)["__metadata__"], name), name)


@contextlib.contextmanager
def _making_sense(name: str | Path) -> Iterator[None]:
    """Says of a file whose checksums are right and whose content is not that it is damaged."""
    try:
        yield
    except DamagedContextError as error:
        raise DamagedContextError(f"{name} contradicts itself: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except BudgetError as error:
        raise DamagedContextError(f"{name} contradicts itself: {error}") from error
    except DefensiveKVError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedContextError(f"{name} contradicts itself: {error!r}") from error


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    try:
        yield
    except DefensiveKVError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot open {name!r}: {reason}") from None


def _content(metadata: dict[str, str], name: str) -> dict[str, Any]:
    """What the metadata hold, as values."""
    if metadata.get("format") != FORMAT:
        raise ContextError(f"{name} is no stored context")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ContextError(
            f"{name} has format version {metadata.get('format_version')}, and this release of defensivekv reads "
            f"{FORMAT_VERSION}: use the release that wrote it, or compress the document again"
        )
    try:
        return {
            key: text if key in _TEXTS else json.loads(text) for key, text in metadata.items() if "checksum" not in key
        }
    except (ValueError, RecursionError) as error:
        raise DamagedContextError(f"{name}: its metadata are damaged: {error}") from None


def _facts(content: dict[str, Any], name: str | Path) -> ContextFacts:
    with _making_sense(name):
        about, model = content["about"], content["model"]
        return TypeAdapter(ContextFacts).validate_python(
            about
            | {"key": content["key"], "model": model["name"], "dtype": model["dtype"], "steps": content["steps"]}
            | {"prefill_seconds": content["prefill_seconds"]}
        )
