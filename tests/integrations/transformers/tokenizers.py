"""A word-level tokenizer for the tiny models: `w5` is token 5, and so on."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.integrations.transformers.models import VOCABULARY

BOS, USER, END, ASSISTANT = 1, 2, 3, 4


def small_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Unknown words are pads; a text begins with [BOS]. template: of a chat."""
    names = ["[PAD]", "[BOS]", "[USER]", "[END]", "[ASSISTANT]"] + [f"w{token}" for token in range(5, VOCABULARY)]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]")
    fast.chat_template = template
    return fast
