"""Tokenizers small enough to be made in a test: of words, and of pieces of them."""

from functools import cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from defensivekv.needleworld import demo_model

NAMES = ("words", "pieces")


@cache
def small_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """words: the packaged model's, a token for each word. pieces: a byte-level BPE of 400 tokens that adds <s>."""
    if name == "words":
        words: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_model())
        return words
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trained.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trained.train_from_iterator(
        ["the number of the city is what the people of the town say on the way"] * 20,
        BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    trained.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", trained.token_to_id("<s>"))])
    pieces: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>")
    return pieces


def count(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> int:
    """Tokens of a text."""
    return len(tokenizer(text, add_special_tokens=special)["input_ids"])
