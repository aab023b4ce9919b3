import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.evaluation.runner.protocol import Prompt, make_prompt
from defensivekv.evaluation.tasks.sample import Question, Sample
from defensivekv.integrations.transformers.contexts.wrapping import BARE, PLAIN, find_wrapping
from tests.evaluation.runner.samples import byte_model, byte_tokenizer, plan_of, records_of, sample

SMALL = {"name": "snapkv", "window_size": 8}


def prompt_of(tokenizer: PreTrainedTokenizerBase, asked: Sample) -> Prompt:
    wrapping = find_wrapping(tokenizer, "auto")
    return make_prompt(tokenizer, asked, wrapping, max_context_tokens=None, max_positions=None)


def test_a_chat_prompt_is_what_the_template_makes_of_document_and_question_with_the_prefix_after_it() -> None:
    tokenizer = byte_tokenizer()
    asked = Sample("a", " A document. ", (Question("What?", (), answer_prefix="It is"),), 4)
    prompt = make_prompt(
        tokenizer, asked, find_wrapping(tokenizer, "auto"), max_context_tokens=None, max_positions=None
    )
    assert tokenizer.decode(prompt.context) == "<|user|> A document. "
    assert tokenizer.decode(prompt.turns[0]) == "What?<|end|>\n<|assistant|>It is"


def test_plain_and_bare_prompts_have_no_template_and_bare_ones_no_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert find_wrapping(byte_tokenizer(template=None), "auto") is PLAIN
    assert find_wrapping(tokenizer, "plain") is PLAIN
    chat = find_wrapping(tokenizer, "chat")
    bare = make_prompt(tokenizer, sample(is_bare=True), chat, max_context_tokens=None, max_positions=None)
    assert bare.wrapping is BARE
    assert tokenizer.decode(bare.context) == sample().context
    assert tokenizer.decode(bare.turns[0]) == "what is it?"


def test_long_documents_lose_their_middle_and_the_loss_is_recorded() -> None:
    loaded = byte_model(), byte_tokenizer()
    whole = sample(context="abcdefghij" * 10)
    record = records_of(loaded, plan_of(["full"], max_context_tokens=31, template="plain"), [whole])[0]
    assert (record.context_tokens, record.truncated_tokens) == (30, 70)
    prompt = make_prompt(loaded[1], whole, PLAIN, max_context_tokens=31, max_positions=None)
    assert loaded[1].decode(prompt.context) == "abcdefghijabcde" + "fghijabcdefghij"


def test_a_document_past_the_model_fails_alone() -> None:
    loaded = byte_model(max_position_embeddings=200), byte_tokenizer()
    records = records_of(loaded, plan_of([SMALL]), [sample(0), sample(1, context="x" * 190), sample(2)])
    assert [record.status for record in records] == ["ok", "failed", "ok"]
    assert "200 positions" in records[1].error
    assert "max_context_tokens" in records[1].error


def _greedy(model: PreTrainedModel, ids: list[int], max_new_tokens: int) -> list[int]:
    tensor = torch.tensor([ids])
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    output = model.generate(tensor, attention_mask=torch.ones_like(tensor), **options)
    return [int(token) for token in output[0, len(ids) :]]


def test_the_full_cache_answers_as_the_stock_model_does_from_the_whole_text() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    asked = sample()
    record = records_of((model, tokenizer), plan_of(["full"]), [asked])[0]
    prompt = make_prompt(
        tokenizer, asked, find_wrapping(tokenizer, "auto"), max_context_tokens=None, max_positions=None
    )
    expected = [tokenizer.decode(_greedy(model, prompt.context + turn, 6)) for turn in prompt.turns]
    assert record.outputs == expected
    assert len(set(expected)) == 2, "a model that answers everything alike would prove nothing"


@pytest.mark.parametrize("ends", [False, True])
def test_turns_go_on_from_the_answer_before(ends: bool) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    asked = sample(in_turns=True)
    prompt = prompt_of(tokenizer, asked)
    assert tokenizer.decode(prompt.turns[1]) == "<|end|>\n<|user|>and who?<|end|>\n<|assistant|>"
    first = _greedy(model, prompt.context + prompt.turns[0], 6)
    if ends:
        # Its third token ends the answer; the template writes the end itself.
        model.generation_config.eos_token_id = first[2]
        first = first[:2]
    second = _greedy(model, prompt.context + prompt.turns[0] + first + prompt.turns[1], 6)
    record = records_of((model, tokenizer), plan_of(["full"]), [asked])[0]
    assert record.error == ""
    assert record.outputs[1] == tokenizer.decode(second, skip_special_tokens=True)
    if not ends:
        assert record.outputs[0] == tokenizer.decode(first)


def test_an_evicted_conversation_holds_its_budget_and_fills_turn_by_turn() -> None:
    loaded = byte_model(), byte_tokenizer()
    turns, apart = (records_of(loaded, plan_of([SMALL]), [sample(in_turns=in_turns)])[0] for in_turns in (True, False))
    assert turns.status == apart.status == "ok"
    assert turns.lengths == apart.lengths
    assert turns.outputs[0] == apart.outputs[0]
    assert turns.outputs[1] != apart.outputs[1], "the second turn must have seen the first"


def test_a_query_aware_compression_sees_the_question_and_the_full_cache_answers_the_same() -> None:
    loaded = byte_model(), byte_tokenizer()
    samples = [sample(0), sample(1)]
    blind, aware = (
        records_of(loaded, plan_of(["full"], query_aware=query_aware), list(samples)) for query_aware in (False, True)
    )
    assert [record.outputs for record in aware] == [record.outputs for record in blind]
    assert all(record.query_aware for record in aware)
    assert not any(record.query_aware for record in blind)
    evicted = records_of(loaded, plan_of([SMALL], query_aware=True), [samples[0]])[0]
    prompt = prompt_of(loaded[1], samples[0])
    assert evicted.context_tokens == len(prompt.context) + max(map(len, prompt.turns)) - 1
    assert {held for layer in evicted.lengths for held in layer} == {evicted.context_tokens // 2}


def test_stop_texts_end_an_answer_but_not_before_it_began() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    free = records_of((model, tokenizer), plan_of(["full"]), [sample(max_new_tokens=12)])[0].outputs[0]
    letter = next(letter for letter in free[1:] if letter.isalnum() and letter != free[0])
    stopped = records_of((model, tokenizer), plan_of(["full"]), [sample(max_new_tokens=12, stop=(letter,))])[0]
    assert stopped.outputs[0] == free[: free.index(letter)]
    assert stopped.outputs[0]
