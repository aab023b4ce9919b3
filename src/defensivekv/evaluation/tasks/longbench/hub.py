"""LongBench's data on the hub: one archive, at one revision. Nothing else here knows the network."""

import hashlib
from functools import cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from defensivekv.errors import InvalidInputError

REPOSITORY = "zai-org/LongBench"
"""Formerly THUDM/LongBench."""

REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
"""Commit of the repository."""

ARCHIVE_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
"""Of data.zip at that commit; 114 MB."""

_INSTEAD = "or unpack data.zip yourself and name its folder as the tasks' data folder"


@cache
def fetch_archive() -> Path:
    """Downloads data.zip, or finds it in the hub's own cache, and checks its hash.

    Raises InvalidInputError where it can't be had or is another file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(REPOSITORY, "data.zip", repo_type="dataset", revision=REVISION))
    except (OSError, EntryNotFoundError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(
            f"LongBench's data.zip can't be had from {REPOSITORY} on the hub ({first}): go online, {_INSTEAD}"
        ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise InvalidInputError(
            f"{path} is not LongBench's data.zip: its SHA-256 is {found}, not {ARCHIVE_SHA256}. Delete it and try "
            f"again, {_INSTEAD}"
        )
    return path


def read_member(dataset: str) -> bytes:
    """The JSON lines of one dataset. Raises InvalidInputError where the archive can't be had or lacks them."""
    archive = fetch_archive()
    try:
        with ZipFile(archive) as opened:
            return opened.read(f"data/{dataset}.jsonl")
    except (KeyError, BadZipFile) as error:
        raise InvalidInputError(
            f"{archive} holds no readable data/{dataset}.jsonl ({error}): delete it and try again, {_INSTEAD}"
        ) from error
