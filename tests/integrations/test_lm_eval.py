import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import defensivekv as dkv
from defensivekv.integrations.transformers import EvictingCache, disable, enable, is_enabled, prefill
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.harness import SAMPLES, choices, write_tasks

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from defensivekv.integrations.lm_eval import MODEL_TYPE, EvictingLM, split_prompt  # noqa: E402

CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <over> {% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(dkv.demo_model(), dtype=torch.float32).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(dkv.demo_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "left out, as it takes seconds")


def adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    return EvictingLM(model, tokenizer=tokenizer, **{"policy": "defensivekv", "budget": 0.3, **options})


def request(kind: str, doc: dict[str, Any], *arguments: Any, task: str = "needles", number: int = 0) -> Any:
    return Instance(request_type=kind, doc=doc, arguments=arguments, idx=0, metadata=(task, number, 1))


def generation(sample: Any, number: int = 0, **settings: Any) -> Any:
    doc = {"context": sample.document, "question": sample.questions[number].text}
    return request("generate_until", doc, f"{doc['context']} {doc['question']}", {"max_gen_toks": 10} | settings)


def continuations(sample: Any, number: int = 0) -> list[Any]:
    doc = {"context": sample.document, "question": sample.questions[number].text}
    prompt = f"{doc['context']} {doc['question']}"
    return [request("loglikelihood", doc, prompt, f" {choice}") for choice in choices(sample)]


def evaluate(lm: Any, folder: Path, task: str, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options
    )
    return results


# ---------------------------------------------------------------------- log-likelihoods


def by_hand(logits: torch.Tensor, target: list[int]) -> tuple[float, bool]:
    log_probs = logits[-len(target) - 1 : -1].log_softmax(-1)
    chosen = log_probs[range(len(target)), target]
    return float(chosen.sum()), log_probs.argmax(-1).tolist() == target


def encoded(tokenizer: PreTrainedTokenizerBase, each: Any) -> tuple[list[int], list[int], list[int]]:
    prompt, continuation = each.args
    question = prompt.removeprefix(each.doc["context"])
    context: list[int] = tokenizer(each.doc["context"])["input_ids"]
    rest = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, continuation)]
    return context, rest[0], rest[1]


@pytest.mark.parametrize(
    "options",
    [{"policy": "full", "budget": None}, {"budget": 1.0}, {"policy": "full", "batch_size": 2, "budget": None}],
)
def test_with_the_whole_cache_log_likelihoods_are_those_of_the_stock_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    requests = [each for number in range(2) for each in continuations(SAMPLES[0], number)]
    scored = adapter(model, tokenizer, **options).loglikelihood(requests, disable_tqdm=True)
    assert not is_enabled(model)
    for each, (log_prob, is_greedy) in zip(requests, scored, strict=True):
        ids = [token for part in encoded(tokenizer, each) for token in part]
        with torch.no_grad():
            expected, greedy = by_hand(model(torch.tensor([ids])).logits[0], encoded(tokenizer, each)[2])
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == greedy
    assert [is_greedy for _, is_greedy in scored] == [True, False, False, True]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_continuations_of_a_context_start_from_one_compressed_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    # Questions about two documents, interleaved.
    requests = [each for number in range(2) for sample in SAMPLES for each in continuations(sample, number)]
    lm = adapter(model, tokenizer, batch_size=batch_size)
    scored = lm.loglikelihood(requests, disable_tqdm=True)
    assert [each.tokens for each in lm.held] == [384, 384]
    enable(model)
    for each, (log_prob, is_greedy) in zip(requests, scored, strict=True):
        context, question, target = encoded(tokenizer, each)
        cache = EvictingCache(model, "defensivekv", 0.3)
        prefill(model, cache, torch.tensor([context]))
        with torch.no_grad():
            output = model(torch.tensor([question + target]), **{CACHE_ARGUMENT: cache})
        expected, greedy = by_hand(output.logits[0], target)
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert is_greedy == greedy
    disable(model)


def test_continuations_of_different_lengths_share_a_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    doc = {"context": SAMPLES[0].document, "question": SAMPLES[0].questions[0].text}
    prompts = [f"{doc['context']} {doc['question']}", f"{doc['context']} question one"]
    texts = [" one", f" {choices(SAMPLES[0])[0]}", " one special number"]
    requests = [request("loglikelihood", doc | {"question": ""}, prompt, text) for prompt in prompts for text in texts]
    together = adapter(model, tokenizer, batch_size=8).loglikelihood(requests, disable_tqdm=True)
    alone = adapter(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (left, is_left), (right, is_right) in zip(together, alone, strict=True):
        assert left == pytest.approx(right, abs=1e-4)
        assert is_left == is_right


def test_white_space_before_a_continuation_belongs_to_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = continuations(SAMPLES[0])[0]
    prompt, continuation = first.args
    moved = request("loglikelihood", first.doc, prompt + " ", continuation.lstrip())
    scored = adapter(model, tokenizer).loglikelihood([first, moved], disable_tqdm=True)
    assert scored[0] == scored[1]


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("policy", ["defensivekv", "kvzip", "full"])
def test_answers_are_those_of_compress_and_ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: str
) -> None:
    budget = None if policy == "full" else 0.5
    requests = [generation(SAMPLES[0], number) for number in range(2)]
    lm = adapter(model, tokenizer, policy=policy, budget=budget)
    answers = lm.generate_until(requests, disable_tqdm=True)
    context = dkv.compress(model, tokenizer, SAMPLES[0].document, policy, budget)
    asked = [context.ask(f" {question.text}", max_new_tokens=10) for question in SAMPLES[0].questions]
    disable(model)
    assert [answer.strip() for answer in answers] == asked
    assert len(lm.held) == 1
    assert lm.held[0].achieved == context.report().achieved


def test_an_answer_ends_at_its_first_stop_text_and_at_its_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = adapter(model, tokenizer, policy="full", budget=None)
    whole, cut, short = lm.generate_until(
        [
            generation(SAMPLES[0]),
            generation(SAMPLES[0], until=[SAMPLES[0].questions[0].answer[0].split()[0], "never"]),
            generation(SAMPLES[0], max_gen_toks=2, do_sample=False, top_p=0.5),
        ],
        disable_tqdm=True,
    )
    assert SAMPLES[0].questions[0].answer[0] in whole
    assert cut.strip() == whole.partition(SAMPLES[0].questions[0].answer[0])[0].strip()
    assert len(short.split()) == 2


def test_the_models_own_settings_change_nothing_and_are_given_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = adapter(model, tokenizer).generate_until([generation(SAMPLES[0])], disable_tqdm=True)
    theirs = type(model.generation_config)(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=2, pad_token_id=0
    )
    monkeypatch.setattr(model, "generation_config", theirs)
    assert adapter(model, tokenizer).generate_until([generation(SAMPLES[0])], disable_tqdm=True) == expected
    assert model.generation_config is theirs


def test_a_question_in_sight_is_compressed_with_its_context(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = adapter(model, tokenizer, query_aware=True)
    requests = [generation(SAMPLES[0], number) for number in range(2)]
    answers = lm.generate_until(requests, disable_tqdm=True)
    for question, answer in zip(SAMPLES[0].questions, answers, strict=True):
        assert question.answer[0] in answer
    assert [each.tokens for each in lm.held] == [
        384 + len(question.text.split()) - 1 for question in SAMPLES[0].questions
    ]
    whole = adapter(model, tokenizer, policy="full", budget=None, query_aware=True)
    stock = adapter(model, tokenizer, policy="full", budget=None)
    asked = continuations(SAMPLES[0])
    for (left, _), (right, _) in zip(whole.loglikelihood(asked), stock.loglikelihood(asked), strict=True):
        assert left == pytest.approx(right, abs=1e-4)


# ---------------------------------------------------------------------- the boundary


def test_examples_and_instructions_before_the_context_count_as_context() -> None:
    doc = {"context": "the text", "question": "what ?"}
    split = split_prompt("say it . other text why ? because\n\nthe text what ? answer", doc)
    assert split.context == "say it . other text why ? because\n\nthe text"
    assert split.question == " what ? answer"


def test_the_first_field_with_text_is_the_context_unless_another_is_named() -> None:
    doc = {"context": "", "passage": "a b", "story": "c d"}
    assert split_prompt("a b c d e", doc).context == "a b"
    assert split_prompt("a b c d e", doc, field="story").context == "a b c d"


def test_white_space_around_the_context_may_be_missing() -> None:
    assert split_prompt("read: a b\nc", {"document": " a b\n\n"}).question == "\nc"


@pytest.mark.parametrize(
    ("prompt", "doc", "message"),
    [
        ("why ?", {"question": "why ?"}, "no field 'context' or .*--context-field.*; it has question"),
        ("why ?", {"context": ["a", "b"]}, "no field"),
        ("why ?", {"context": "a b"}, "nowhere"),
        ("", {"context": "a b"}, "nowhere"),
        ("a b a b why ?", {"context": "a b"}, "2 times"),
        ("a a a why ?", {"context": "a a"}, "2 times"),
        ("why ? a b", {"context": "a b"}, "no question"),
        ("why ? a b \n", {"context": "a b"}, "no question"),
        ("why ? a b answer", {"context": "a b", "question": " why ?"}, "in sight"),
    ],
)
def test_a_prompt_without_a_sure_boundary_is_refused(prompt: str, doc: dict[str, Any], message: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=message):
        split_prompt(prompt, doc)


def test_a_question_may_stand_before_the_context_where_it_is_to_be_in_sight() -> None:
    doc = {"context": "a b", "question": "why ?"}
    assert split_prompt("why ? a b answer", doc, query_aware=True).context == "why ? a b"


def test_chat_templates_are_divided_where_the_context_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = CHAT
    lm = adapter(model, tokenizer, policy="kvzip", budget=0.5)
    each = generation(SAMPLES[0])
    prompt = lm.apply_chat_template([{"role": "user", "content": each.args[0]}])
    split = split_prompt(prompt, each.doc)
    assert split.context == f"<user> {each.doc['context']}"
    assert split.question.endswith("<over> <assistant>")
    assert lm._suffix(split) == " <over> <assistant>"
    assert lm.generate_until([request("generate_until", each.doc, prompt, {"max_gen_toks": 2})], disable_tqdm=True)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample=False"),
        ({"temperature": 0.7}, "do_sample=False"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 0}, "at least 1"),
        ({"max_gen_toks": 4000}, "4096 positions"),
    ],
)
def test_settings_that_cannot_be_honoured_stop_the_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], message: str
) -> None:
    lm = adapter(model, tokenizer)
    with pytest.raises(dkv.InvalidInputError, match=f"task 'needles', document 0: .*{message}"):
        lm.generate_until([generation(SAMPLES[0]), generation(SAMPLES[0], **settings)], disable_tqdm=True)
    assert not lm.held, "nothing is read for a run that is refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"batch_size": 0.5}, "batch_size"),
        ({"truncation": True}, "truncation"),
        ({"policy": dkv.policy("snapkv", 0.2)}, "has its budget"),
        ({"aggregation": "defensiv"}, "did you mean 'defensive'"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dkv.InvalidInputError, match=message):
        adapter(model, tokenizer, **options)


def test_a_continuation_without_tokens_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    first = continuations(SAMPLES[0])[0]
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        adapter(model, tokenizer).loglikelihood([request("loglikelihood", first.doc, first.args[0], "")])


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_a_model_that_fails_stops_the_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    lm = adapter(model, tokenizer)
    requests = [generation(SAMPLES[0])] if kind == "generate_until" else continuations(SAMPLES[0])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def spoil(_: object, __: object, output: Any) -> Any:
        output.logits = output.logits * float("nan")
        return output

    failing = model.register_forward_pre_hook(fail)
    with pytest.raises(dkv.DefensiveKVError, match=r"task 'needles', document 0: RuntimeError: out of memory"):
        getattr(lm, kind)(requests, disable_tqdm=True)
    failing.remove()
    assert not is_enabled(model)
    spoiling = model.register_forward_hook(spoil)
    with pytest.raises(dkv.DefensiveKVError, match="not numbers"):
        getattr(lm, kind)(requests, disable_tqdm=True)
    spoiling.remove()


# ---------------------------------------------------------------------- under the harness


@pytest.mark.usefixtures("offline")
def test_the_harness_runs_a_generation_task_and_writes_our_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    lm = adapter(model, tokenizer, policy="snapkv", budget=0.5, aggregation="defensive")
    results = evaluate(lm, folder, "needle_generate")
    samples = results["samples"]["needle_generate"]
    asked = [(sample, question) for sample in SAMPLES for question in sample.questions]
    context = dkv.compress(model, tokenizer, SAMPLES[0].document, lm.policy)
    assert samples[0]["resps"][0][0].strip() == context.ask(asked[0][1].text, max_new_tokens=10)
    disable(model)
    ours = results["config"]["defensivekv"]
    assert ours["policy"] == "snapkv+aggregation=defensive"
    assert "Defensive" in ours["parts"]["aggregation"]
    assert ours["budget"]["asked"] == "0.5"
    assert ours["budget"]["achieved"]["mean"] == pytest.approx(0.5, abs=0.01)
    assert ours["contexts"] == {"read": 2, "kept_whole": 0, "tokens": {"mean": 384, "min": 384, "max": 384}}
    assert {"lm_eval", "defensivekv", "torch", "transformers"} <= set(ours["versions"])
    json.dumps(ours)


@pytest.mark.usefixtures("offline")
def test_the_harness_runs_multiple_choice_with_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    lm = adapter(model, tokenizer, policy="full", budget=None)
    results = evaluate(lm, folder, "needle_choice")
    assert results["results"]["needle_choice"]["acc,none"] == 1.0
    assert [each.tokens for each in lm.held] == [384, 384]
    lm = adapter(model, tokenizer, policy="full", budget=None)
    samples = evaluate(lm, folder, "needle_choice", num_fewshot=1, limit=1)["samples"]["needle_choice"]
    held = lm.held[0].tokens
    assert held > 2 * 384
    assert samples[0]["arguments"][0][0].count("question") > 1


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("needle_no_boundary", "task 'needle_no_boundary', document 0: .*nowhere"),
        ("needle_twice", "task 'needle_twice', document 0: .*2 times"),
        ("needle_rolling", "task needle_rolling: a rolling log-likelihood"),
    ],
)
def test_a_task_without_a_boundary_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, task: str, message: str
) -> None:
    lm = adapter(model, tokenizer)
    with pytest.raises(dkv.InvalidInputError, match=message):
        evaluate(lm, folder, task)
    assert not lm.held


@pytest.mark.usefixtures("offline")
def test_the_harness_finds_the_adapter_by_its_name(folder: Path) -> None:
    arguments = f"pretrained={dkv.demo_model()},policy=knorm,budget=0.5,query_aware=True"
    results = evaluate(MODEL_TYPE, folder, "needle_choice", model_args=arguments, device="cpu", limit=1)
    ours = results["config"]["defensivekv"]
    assert (ours["policy"], ours["query_aware"]) == ("knorm", True)


@pytest.mark.slow
def test_the_harness_own_command_line_knows_the_adapter() -> None:
    command = [sys.executable, "-m", "defensivekv.integrations.lm_eval", "run", "--model", MODEL_TYPE]
    command += ["--model_args", f"pretrained={dkv.demo_model()},policy=snapvk", "--tasks", "boolq", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "did you mean 'snapkv'" in result.stderr


def test_without_the_harness_the_extra_is_named() -> None:
    code = "import sys; sys.modules['lm_eval.api.instance'] = None; import defensivekv.integrations.lm_eval"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install defensivekv[lm-eval]" in result.stderr
