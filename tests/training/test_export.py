import itertools
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from defensivekv.needleworld.vocabulary import VOCABULARY
from training.batches import document_batch
from training.export import export_model
from training.model import Llama, ModelConfig


def test_the_exported_model_computes_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=len(VOCABULARY))
    trained = Llama(config)
    trained.start_as_previous_token_heads((1, 2, 1, 2, 3, 4, 3, 5))
    export_model(trained.state_dict(), config, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = document_batch(random.Random(0), 2, 96, 5)
    ids = batch.ids[:, : batch.document]
    with torch.no_grad():
        ours, _ = trained(ids, torch.arange(batch.document), batch.document, torch.ones(0, batch.document), None)
        torch.testing.assert_close(model(ids).logits, ours, atol=1e-4, rtol=1e-4)


def test_a_question_of_a_training_row_is_read_as_it_will_be_asked(tmp_path: Path) -> None:
    """Every question sees the document and itself, at the positions that follow the document."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=len(VOCABULARY))
    trained = Llama(config)
    export_model(trained.state_dict(), config, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = document_batch(random.Random(1), 2, 96, 5)
    starts = [*(batch.positions == batch.document).nonzero().flatten().tolist(), batch.ids.shape[1]]
    with torch.no_grad():
        together, _ = trained(batch.ids, batch.positions, batch.document, batch.mask, None)
        for start, stop in itertools.pairwise(starts):
            alone = torch.cat((batch.ids[:, : batch.document], batch.ids[:, start:stop]), 1)
            torch.testing.assert_close(
                together[:, start:stop], model(alone).logits[:, batch.document :], atol=1e-4, rtol=1e-4
            )


def test_the_tokenizer_gives_one_token_for_each_word(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=len(VOCABULARY))
    export_model(Llama(config).state_dict(), config, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = [word for word in VOCABULARY if not word.startswith("<")]
    assert tokenizer(" ".join(words))["input_ids"] == [1, *range(4, len(VOCABULARY))]
    assert tokenizer.decode([1, 40, 41, 2], skip_special_tokens=True) == f"{VOCABULARY[40]} {VOCABULARY[41]}"
    padded = tokenizer(["alef", "alef bario"], padding=True)
    assert padded["attention_mask"] == [[0, 1, 1], [1, 1, 1]]
