"""A document compressed once, and questions that do not see each other."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers import is_enabled
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.tokenizers import BOS, USER, small_tokenizer

TEMPLATE = "[BOS]{% for m in messages %} [USER] {{ m['content'] | trim }} [END]{% endfor %} [ASSISTANT]"
DOCUMENT = " ".join(f"w{int(token)}" for token in prompt(300)[0].clamp_min(5))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


# ---------------------------------------------------------------------- what is read, and what is asked


def test_the_document_is_compressed_without_a_token_of_the_question(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "defensivekv", 0.3)
    assert context.document_ids.tolist() == [[BOS, *small_tokenizer()(DOCUMENT, add_special_tokens=False)["input_ids"]]]
    assert context.num_tokens == 301
    assert context.report().prompt_tokens == (301,)
    assert context.report().achieved == pytest.approx(0.3, abs=0.005)
    before = context.cache.nbytes, context.cache.lengths
    answer = context.answer("w7 w8 w9", max_new_tokens=5)
    assert (answer.question_tokens, answer.new_tokens) == (3, 5)
    assert answer.seconds > 0
    assert context.cache.nbytes == before[0]
    assert torch.equal(context.cache.lengths, before[1])


def test_an_answer_is_what_generate_says_after_document_and_question(model: PreTrainedModel) -> None:
    tokenizer = small_tokenizer()
    context = dkv.compress(model, tokenizer, DOCUMENT, "layer-defensivekv", 0.3)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    with torch.no_grad():
        model(context.document_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    ids = torch.cat((context.document_ids, torch.tensor([[7, 8, 9]])), 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **options)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert context.ask("w7 w8 w9", max_new_tokens=6) == expected.strip()


def test_the_full_budget_answers_as_the_stock_model(model: PreTrainedModel) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer(f"{DOCUMENT} w7 w8 w9", return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert dkv.compress(model, tokenizer, DOCUMENT, "full").ask("w7 w8 w9", max_new_tokens=6) == expected.strip()


def test_a_bounded_document_answers_within_its_bound(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", max_entries=96, chunk_size=64)
    assert int(context.cache.lengths.sum()) == (96 - 12) * 3 * 2
    assert context.report().bound == "96 entries per head"
    first = context.ask("w7 w8 w9", max_new_tokens=40)
    assert context.ask("w7 w8 w9", max_new_tokens=40) == first
    assert int(context.cache.lengths.sum()) == (96 - 12) * 3 * 2


def test_an_answer_may_be_bounded_by_itself(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", 0.3)
    held = context.cache.lengths
    assert context.ask("w7 w8 w9", max_new_tokens=60, max_entries=1000) == context.ask("w7 w8 w9", max_new_tokens=60)
    context.ask("w7 w8 w9", max_new_tokens=60, max_entries=160)
    assert torch.equal(context.cache.lengths, held)
    with pytest.raises(dkv.BudgetError, match=r"holds 91 entries per head .* a bound of 100"):
        context.ask("w7 w8 w9", max_entries=100)


def test_an_adaptive_budget_says_what_it_came_to(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", "auto:0.6,max=0.9")
    report = context.report()
    (share,) = report.shares
    assert 0.2 < share < 0.9
    assert report.achieved == pytest.approx(share, abs=0.001)
    assert f"auto:0.6,max=0.9 (came to {share:.2%})" in str(report)
    more = dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", "auto:0.8").report()
    assert more.achieved > report.achieved
    per_layer = dkv.compress(model, small_tokenizer(), DOCUMENT, "defensivekv", "auto:0.6,max=0.9").report()
    assert per_layer.achieved == pytest.approx(share, abs=0.005), "the mass is that of all layers, whoever competes"


def test_questions_do_not_see_each_other(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", 0.3)
    first = context.ask("w7 w8 w9")
    assert context.ask("w50 w60") != first
    assert context.ask("w7 w8 w9") == first
    assert dkv.compress(model, small_tokenizer(), DOCUMENT, "layer-defensivekv", 0.3).ask("w7 w8 w9") == first


def test_options_of_generate_are_passed_on(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3)
    torch.manual_seed(0)
    sampled = context.ask("w7", do_sample=True, temperature=2.0)
    torch.manual_seed(0)
    assert context.ask("w7", do_sample=True, temperature=2.0) == sampled
    assert context.ask("w7") != sampled
    beams = context.answer("w7", num_beams=3, max_new_tokens=4)
    with_details = context.answer("w7", num_beams=3, max_new_tokens=4, return_dict_in_generate=True)
    assert (with_details.text, with_details.new_tokens) == (beams.text, 4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_read_the_document_as_the_stock_models_do(model: PreTrainedModel, options: dict[str, int]) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 1.0)
    answer = context.ask("w7", max_new_tokens=6, **options)
    ids = torch.cat(
        (context.document_ids, torch.tensor([small_tokenizer()("w7", add_special_tokens=False)["input_ids"]])), 1
    )
    dkv.disable(model)
    stock = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=6,
        cache_implementation=None,
        **options,
    )
    assert answer == small_tokenizer().decode(stock[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_kind_of_cache_that_the_models_own_settings_name_is_no_obstacle(model: PreTrainedModel) -> None:
    model.generation_config.cache_implementation = "static"
    assert (
        dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3).answer("w7", max_new_tokens=4).new_tokens == 4
    )


# ---------------------------------------------------------------------- templates


def test_the_chat_template_is_used_where_there_is_one(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(TEMPLATE), DOCUMENT, "snapkv", 0.3)
    words = small_tokenizer()(DOCUMENT, add_special_tokens=False)["input_ids"]
    assert context.document_ids.tolist() == [[BOS, USER, *words]], "one beginning, and nothing of the question's end"
    assert context.answer("w7 w8", max_new_tokens=3).question_tokens == 4, (
        "the end of the turn comes after the question"
    )


def test_plain_takes_document_and_question_as_they_are(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(TEMPLATE), DOCUMENT, "snapkv", 0.3, template="plain")
    assert context.document_ids[0, :2].tolist() == [
        BOS,
        small_tokenizer()(DOCUMENT, add_special_tokens=False)["input_ids"][0],
    ]
    assert context.answer("w7 w8", max_new_tokens=3).question_tokens == 2


@pytest.mark.parametrize(
    ("chat_template", "template", "says"),
    [
        (None, "chat", "has no chat template: use template='plain'"),
        (TEMPLATE, "fancy", "unknown template 'fancy': use auto, chat, plain"),
        ("{{ messages[0]['content'] | upper }}", "auto", "does not keep the user's text"),
        ("nothing of it", "chat", "does not keep the user's text"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    model: PreTrainedModel, chat_template: str | None, template: Any, says: str
) -> None:
    with pytest.raises(dkv.InvalidInputError, match=says):
        dkv.compress(model, small_tokenizer(chat_template), DOCUMENT, "snapkv", 0.3, template=template)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("document", "options", "error", "says"),
    [
        ("", {}, dkv.InvalidInputError, "the document is empty"),
        (" \n ", {}, dkv.InvalidInputError, "the document is empty"),
        ("w7 " * 1023, {}, dkv.InvalidInputError, "the document: 1025 tokens, but the model has 1024 positions"),
        (DOCUMENT, {"budget": 0}, dkv.BudgetError, "keeps nothing"),
        (DOCUMENT, {"budget": None}, dkv.BudgetError, "needs a budget"),
        (DOCUMENT, {"policy": "defensive"}, dkv.UnknownPolicyError, "did you mean"),
        (DOCUMENT, {"budget": 0.01}, dkv.BudgetError, "below the observation window"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    model: PreTrainedModel, document: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    given: dict[str, Any] = {"policy": "snapkv", "budget": 0.3} | options
    with pytest.raises(error, match=says):
        dkv.compress(model, small_tokenizer(), document, **given)


def test_a_refused_document_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.InvalidInputError):
        dkv.compress(model, small_tokenizer(), "w7 " * 2000, "snapkv", 0.3)
    assert not is_enabled(model)


def test_a_text_that_the_tokenizer_makes_nothing_of_is_refused(model: PreTrainedModel) -> None:
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.pre_tokenizer = Split("~", behavior="removed")
    with pytest.raises(dkv.InvalidInputError, match="the document has no tokens"):
        dkv.compress(model, tokenizer, "~~~", "snapkv", 0.3)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "is a NoneType: give it as text"), ([7, 8], "is a list: give"), ("w7 \udc80", "has half a character at 3")],
)
def test_what_is_no_text_is_refused(model: PreTrainedModel, text: Any, says: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=f"the document {says}"):
        dkv.compress(model, small_tokenizer(), text, "snapkv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match=f"the question {says}"):
        dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3).ask(text)


def test_settings_that_use_no_cache_are_overruled(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3)
    expected = context.turn("w7 w8", max_new_tokens=6)
    model.config.use_cache = model.generation_config.use_cache = False
    found = context.turn("w7 w8", max_new_tokens=6)
    assert found[0].text == expected[0].text
    assert found[1].cache.get_seq_length() == expected[1].cache.get_seq_length()
    with pytest.raises(dkv.InvalidInputError, match="leave use_cache out"):
        context.ask("w7", use_cache=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_context_is_carried_by_files_alone(model: PreTrainedModel, copied: Callable[[Any], Any]) -> None:
    with pytest.raises(dkv.InvalidInputError, match=r"save\(\) and load_context\(\) carry it elsewhere"):
        copied(dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3))


def test_an_empty_question_and_one_that_is_too_long_are_refused(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3)
    for empty in ("", "  \n"):
        with pytest.raises(dkv.InvalidInputError, match="the question is empty"):
            context.ask(empty)
    with pytest.raises(dkv.InvalidInputError, match="document, question and answer: 1025 tokens"):
        context.ask("w7 " * 700, max_new_tokens=24)
    assert context.answer("w7 " * 700, max_new_tokens=23, min_new_tokens=23).new_tokens == 23


def test_stretched_positions_can_be_used(model: PreTrainedModel) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    stretched = tiny_model("llama", rope_parameters=rope)
    context = dkv.compress(stretched, small_tokenizer(), "w7 w9 " * 600, "snapkv", 0.3)
    assert context.num_tokens == 1201


def test_a_context_whose_model_was_disabled_says_so(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(), DOCUMENT, "snapkv", 0.3)
    first = context.ask("w7")
    dkv.disable(model)
    with pytest.raises(dkv.CacheError, match=r"call defensivekv.enable\(model\)"):
        context.ask("w7")
    dkv.enable(model)
    assert context.ask("w7") == first
