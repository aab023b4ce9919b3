"""Loading a model by name for the command line."""

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from defensivekv.errors import InvalidInputError
from defensivekv.needleworld import demo_model

PACKAGED = "the packaged model"
"""What stored contexts call it, wherever it is installed."""

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | None, *, dtype: str, device: str, trust_remote_code: bool, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of that name or folder, and its tokenizer; the packaged model where none is named.

    dtype, device: as in `defensivekv ask --help`. Raises InvalidInputError for an unknown dtype, a device that is not
    there, and a model that cannot be loaded.
    """
    if dtype not in _DTYPES:
        raise InvalidInputError(f"unknown dtype {dtype!r}: use {', '.join(_DTYPES)}")
    logging.disable_progress_bar()
    source = name or demo_model()
    place = find_device(device)
    with console.status(f"loading {name or PACKAGED}"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=_DTYPES[dtype], trust_remote_code=trust_remote_code
            )
        except Exception as error:  # broken files fail in many ways
            raise InvalidInputError(f"cannot load {source!r}: {type(error).__name__}: {error}") from error
    if name is None:
        model.config._name_or_path = PACKAGED
    return model.to(place).eval(), tokenizer


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU where there is one. Raises InvalidInputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
