"""A random model, a tokenizer of numbers, and documents for them."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.contexts.settings import Settings
from defensivekv.bench.dtypes import dtype_of
from defensivekv.bench.shapes import shape_config
from defensivekv.bench.workers.random_model import random_model


def make_model(settings: Settings) -> PreTrainedModel:
    """The model, on the CPU; its stock attention is SDPA."""
    config = shape_config("llama-3.2-1b", **dict(settings.model))
    model: PreTrainedModel = random_model(config, dtype_of(settings.dtype), torch.device("cpu"), 0)
    model.generation_config.eos_token_id = None
    return model


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A word for each token."""
    words = {str(token): token for token in range(dict(settings.model)["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text(num_tokens: int, settings: Settings, seed: int = 0) -> str:
    """Random words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, dict(settings.model)["vocab_size"], (num_tokens,), generator=generator)
    return " ".join(str(token) for token in tokens.tolist())
