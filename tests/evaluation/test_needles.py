import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import defensivekv as dkv
from defensivekv.evaluation import evaluate_cell, make_suite
from defensivekv.integrations.transformers import is_enabled
from defensivekv.needleworld import MAX_NEW_TOKENS, TASKS

TOKENS = 512


@pytest.fixture(scope="module")
def packaged() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = dkv.demo_model()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_packaged_model_answers_from_its_whole_cache(
    packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    cell = evaluate_cell(*packaged, make_suite(4, num_tokens=TOKENS), dkv.policy("full"))
    assert len(cell.document_scores) == 4 * len(TASKS)
    assert cell.accuracy.mean > 0.97
    config = packaged[0].config
    entry = 2 * config.num_key_value_heads * config.head_dim * 4
    assert cell.cache_bytes == TOKENS * config.num_hidden_layers * entry


def test_an_evicting_cache_at_the_full_budget_answers_what_the_stock_one_does(
    packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    suite = make_suite(2, num_tokens=TOKENS)
    full = evaluate_cell(*packaged, suite, dkv.policy("full"))
    ours = evaluate_cell(*packaged, suite, dkv.policy("layer-defensivekv", 1.0))
    assert ours.answers == full.answers
    assert ours.document_scores == full.document_scores


def test_batched_answers_are_those_of_documents_one_at_a_time(
    packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    suite = make_suite(2, num_tokens=TOKENS)
    policy = dkv.policy("layer-defensivekv", 0.2)
    batched = evaluate_cell(*packaged, suite, policy, batch_size=2)
    assert evaluate_cell(*packaged, suite, policy, batch_size=1).answers == batched.answers


def test_answers_are_what_asking_the_compressed_document_gives(
    packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = packaged
    suite = make_suite(1, num_tokens=TOKENS)
    cell = evaluate_cell(model, tokenizer, suite, dkv.policy("defensivekv", 0.4))
    for sample, given in zip(suite, cell.answers, strict=True):
        context = dkv.compress(model, tokenizer, sample.document, "defensivekv", 0.4)
        asked = tuple(context.ask(question.text, max_new_tokens=MAX_NEW_TOKENS) for question in sample.questions)
        assert asked == given
    dkv.disable(model)


def test_a_cell_says_what_was_held_and_leaves_the_model_as_it_was(
    packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = packaged
    suite = make_suite(2, num_tokens=TOKENS)
    done: list[int] = []
    cell = evaluate_cell(model, tokenizer, suite, dkv.policy("snapkv", 0.25), advance=done.append)
    assert sum(done) == len(suite)
    assert cell.achieved == pytest.approx(0.25, abs=0.002)
    config = model.config
    entry = 2 * config.head_dim * 4 + 4
    assert cell.cache_bytes <= TOKENS * config.num_hidden_layers * config.num_key_value_heads * entry * 0.25
    assert cell.token_seconds > 0
    assert not is_enabled(model)
    assert torch.is_grad_enabled()


def test_a_suite_of_no_documents_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="at least one"):
        make_suite(0)


def test_a_budget_that_is_no_share_is_refused(packaged: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(dkv.InvalidInputError, match="not a share"):
        evaluate_cell(*packaged, make_suite(1, num_tokens=TOKENS), dkv.policy("snapkv", 128))
