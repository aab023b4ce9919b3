import pytest

import defensivekv as dkv
from defensivekv.integrations.transformers.contexts.wrapping import PLAIN, Wrapping, find_wrapping
from tests.integrations.transformers.tokenizers import small_tokenizer

CHAT = (
    "[BOS]{% for m in messages %}{% if m['role'] == 'user' %}[USER]{{ m['content'] }}[END][ASSISTANT]"
    "{% else %}{{ m['content'] }}[END]{% endif %}{% endfor %}"
)


def test_a_chat_template_is_cut_around_the_users_and_the_models_words() -> None:
    found = find_wrapping(small_tokenizer(CHAT), "auto")
    assert found == Wrapping("chat", "[BOS][USER]", "[END][ASSISTANT]", "[END][USER]", keeps_end=False)
    assert find_wrapping(small_tokenizer(CHAT), "chat") == found


# Of the shapes that the model families' own templates have.
FAMILIES = {
    "llama 3": (
        "{{- '[BOS]' }}{%- set today = strftime_now('%d %b %Y') %}"
        "{{- '<|h|>system<|/h|>\n\nToday Date: ' + today + '<|eot|>' }}"
        "{%- for m in messages %}{{- '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\n\n' }}{%- endif %}"
    ),
    "qwen 2.5": (
        "{%- if messages[0].role != 'system' %}{{- '<|s|>system\nYou are helpful.<|e|>\n' }}{%- endif %}\n"
        "{%- for m in messages %}\n{{- '<|s|>' + m.role + '\n' + m.content + '<|e|>\n' }}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|s|>assistant\n' }}{%- endif %}"
    ),
    "gemma": (
        "{{ '[BOS]' }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns') }}"
        "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{- '[BOS]' }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m.content | trim + '</s>' }}{%- endif %}{%- endfor %}"
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pieces_make_the_conversation_that_the_template_makes(name: str) -> None:
    template = FAMILIES[name].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    found = find_wrapping(small_tokenizer(FAMILIES[name]), "auto")
    said = [
        ("user", "A book.\n\nWho?"),
        ("assistant", "She."),
        ("user", "When?"),
        ("assistant", "Then."),
        ("user", "Why?"),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    whole = small_tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found.between is not None
    answers = " She." if name == "mistral" else "She.", " Then." if name == "mistral" else "Then."
    turns = [f"A book.\n\nWho?{found.after}{answers[0]}", f"When?{found.after}{answers[1]}", f"Why?{found.after}"]
    assert found.before + found.between.join(turns) == whole


def test_without_a_template_words_stand_as_they_are() -> None:
    assert find_wrapping(small_tokenizer(), "auto") is PLAIN
    assert find_wrapping(small_tokenizer(CHAT), "plain") is PLAIN


def test_a_template_of_one_turn_has_nothing_between_turns() -> None:
    once = "{{ messages[0]['content'] }}[END]"
    assert find_wrapping(small_tokenizer(once), "auto") == Wrapping("chat", "", "[END]", None, keeps_end=False)


def test_a_template_that_writes_todays_date_is_the_same_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHAT
    assert find_wrapping(small_tokenizer(dated), "auto").before == "26 Jul 2024[BOS][USER]"


def test_a_template_that_refuses_is_named_and_one_that_refuses_a_second_turn_serves_one() -> None:
    with pytest.raises(
        dkv.InvalidInputError, match=r"the chat template fails: no system message: use template='plain'"
    ):
        find_wrapping(small_tokenizer("{{ raise_exception('no system message') }}"), "auto")
    with pytest.raises(dkv.InvalidInputError, match="the chat template fails: "):
        find_wrapping(small_tokenizer("{% for %}"), "auto")
    several = small_tokenizer()
    several.chat_template = {"one": CHAT, "other": CHAT}
    with pytest.raises(dkv.InvalidInputError, match=r"the chat template fails: .*no default"):
        find_wrapping(several, "auto")
    once = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}[END]"
    assert find_wrapping(small_tokenizer(once), "auto") == Wrapping("chat", "", "[END]", None, keeps_end=False)


def test_a_template_that_is_missing_unknown_or_loses_the_text_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="no chat template"):
        find_wrapping(small_tokenizer(), "chat")
    with pytest.raises(dkv.InvalidInputError, match="does not keep"):
        find_wrapping(small_tokenizer("{{ messages[0].content | upper }}"), "auto")
    with pytest.raises(dkv.InvalidInputError, match="unknown template 'fancy'"):
        find_wrapping(small_tokenizer(), "fancy")  # type: ignore[arg-type]
