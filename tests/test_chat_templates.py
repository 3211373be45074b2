"""Chat templates: images in every role, the language model's own text otherwise, and marks around the answers."""

from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

from vlm_zoo.chat_templates import (
    ChatTemplateError,
    check_template,
    extend_template,
    find_template,
    has_generation,
    plain_template,
)
from vlm_zoo.testing import tiny_tokenizer


TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
IMAGE = {"type": "image"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

# Templates as they are found in the wild, none of them known to TRL: name -> (template, special tokens, end of turn).
WILD = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' "
        "+ content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + "
        "eos_token }}{% endif %}{% endfor %}",
        (),
        "</s>",
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        (),
        "</s>",
    ),
    "ends once": (  # the end-of-sequence token stands behind the last turn only
        "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
        "<|end|>",
    ),
    "macros": (
        "  {%- macro turn(role, content) %}{{ '<|' ~ role ~ '|>' ~ content ~ '<|end|>' }}{% endmacro %}\n"
        "{{- bos_token }}\n{% set last = messages | length - 1 %}\n{% for message in messages %}\n"
        "  {{ turn(message.role, message.content) }}\n{% endfor %}\n{% if add_generation_prompt %}\n"
        "  {{ '<|assistant|>' }}{% endif %}\n\n",
        ("<|end|>",),
        "<|end|>",
    ),
}
KNOWN = {
    "llama3": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "llama3_2": "<|eot_id|>",
}


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def tokenizer_with(template: str | None, special: tuple[str, ...] = ()):
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def wild(name: str):
    template, special, _ = WILD[name]
    return tokenizer_with(template, special)


def known(name: str):
    return tokenizer_with((TRL_TEMPLATES / f"{name}.jinja").read_text(), (KNOWN[name],))


def render(tokenizer, template: str, messages: list, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)


def marked(tokenizer, template: str, messages: list) -> str:
    """The text of the tokens that carry a label when only the assistant is learned from."""
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mark in pairs if mark])


CHAT = [user("One?"), assistant("1."), user("Two?"), assistant("2.")]


# --- the plain template ----------------------------------------------------------------------------------------------


def test_the_plain_template_writes_roles_in_plain_words():
    messages = [{"role": "system", "content": "Be brief."}, user([IMAGE, text("What is this?")]), assistant("A cat.")]
    found = render(tiny_tokenizer(), plain_template("<image>"), messages)
    assert found == "Be brief.\nUSER: <image>\nWhat is this?\nASSISTANT: A cat.</s>\n"


def test_the_plain_template_marks_answers_and_their_end():
    assert marked(tiny_tokenizer(), plain_template("<image>"), CHAT) == " 1.</s> 2.</s>"


def test_the_plain_template_keeps_every_promise():
    assert check_template(tiny_tokenizer(), plain_template("<image>"), "<image>") == "</s>"


def test_a_tokenizer_without_template_gets_the_plain_one_and_is_told_so(caplog):
    template, ending = find_template(tokenizer_with(None), "<image>")
    assert (template, ending) == (plain_template("<image>"), "</s>")
    assert "no chat template" in caplog.text


def test_a_tokenizer_without_template_and_end_is_refused():
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match="no end-of-sequence token"):
        find_template(tokenizer, "<image>")


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_images_are_written_in_every_role(role):
    tokenizer = wild("chatml")
    template, _ = find_template(tokenizer, "<image>")
    messages = [user("Hm?"), {"role": role, "content": [text("a "), IMAGE, {"type": "image_url"}, text("b")]}]
    plain = [user("Hm?"), {"role": role, "content": "a <image>\n<image>\nb"}]
    assert render(tokenizer, template, messages) == render(tokenizer, WILD["chatml"][0], plain)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], ""),
        (["a", "b"], "ab"),
        ([{"image": "x.png"}, {"text": "a"}], "<image>\na"),
        ([{"type": "text", "text": None, "image": "x.png"}, {"type": "image", "text": "a"}], "<image>\n"),
        ("<image> is text", "<image> is text"),
    ],
)
def test_content_may_come_in_many_forms(content, expected):
    tokenizer = wild("chatml")
    template, _ = find_template(tokenizer, "<image>")
    assert render(tokenizer, template, [user(content)]) == f"<|im_start|>user\n{expected}<|im_end|>\n"


def test_content_of_an_unknown_type_is_refused_by_name():
    with pytest.raises(Exception, match="Content of type audio: expected image or text"):
        render(tiny_tokenizer(), plain_template("<image>"), [user([{"type": "audio"}])])
    with pytest.raises(Exception, match="Content of type audio: expected image, video or text"):
        render(tiny_tokenizer(), plain_template("<image>", "<video>"), [user([{"type": "audio"}])])


@pytest.mark.parametrize("video", [{"type": "video"}, {"type": "video", "video": "film.mp4"}, {"video": "film.mp4"}])
def test_a_video_is_refused_where_it_has_no_token(video):
    tokenizer = wild("chatml")
    template, _ = find_template(tokenizer, "<image>")
    with pytest.raises(Exception, match=r"Content of type (video)?: expected image or text"):
        render(tokenizer, template, [user([video])])
    template, _ = find_template(tokenizer, "<image>", video_token="<film>")
    assert render(tokenizer, template, [user([video])]) == "<|im_start|>user\n<film>\n<|im_end|>\n"


def test_the_image_token_may_hold_quotes_and_backslashes():
    token = "<\"im'\\g>"
    assert render(tiny_tokenizer(), plain_template(token), [user([IMAGE])]) == f"USER: {token}\n\n"


def test_tool_results_that_are_lists_of_anything_reach_the_template_untouched():
    own = "{% for message in messages %}{{ message.content | tojson }}{% endfor %}"
    messages = [{"role": "tool", "content": [{"celsius": 7}, {"type": "wind", "knots": 3}]}]
    tokenizer = tiny_tokenizer()
    assert render(tokenizer, extend_template(own, "<image>"), messages) == render(tokenizer, own, messages)


def test_tool_calls_survive():
    tokenizer = known("qwen3")
    template, _ = find_template(tokenizer, "<image>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("One?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    found = render(tokenizer, template, messages, tools=[TOOL])
    own = (TRL_TEMPLATES / "qwen3_training.jinja").read_text()
    assert (
        found == render(tokenizer, own, messages, tools=[TOOL]) and '{"name": "add", "arguments": {"a": 1}}' in found
    )


# --- templates that TRL knows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_are_extended_and_end_with_their_own_token(name):
    assert find_template(known(name), "<image>")[1] == KNOWN[name]


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_write_a_first_turn_as_the_language_model_does(name):
    tokenizer = known(name)
    template, _ = find_template(tokenizer, "<image>")
    for messages in (CHAT[:1], CHAT[:2]):
        for prompt in (False, True):
            found = render(tokenizer, template, messages, add_generation_prompt=prompt)
            assert found == render(tokenizer, tokenizer.chat_template, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", KNOWN)
def test_trl_takes_extended_templates_as_they_are(name):
    tokenizer = known(name)
    tokenizer.chat_template, _ = find_template(tokenizer, "<image>")
    assert get_training_chat_template(tokenizer) is None
    assert is_chat_template_stop_token_trained(tokenizer)


def test_the_marks_start_where_the_generation_prompt_ends():
    # TRL's own variant for Qwen 2.5 marks the line break before the answer too
    tokenizer = known("qwen2_5")
    template, _ = find_template(tokenizer, "<image>")
    assert marked(tokenizer, template, CHAT) == "1.<|im_end|>\n2.<|im_end|>\n"


# --- templates that nobody knows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WILD)
def test_unknown_templates_are_marked_from_outside(name):
    assert not has_generation(WILD[name][0])
    template, ending = find_template(wild(name), "<image>")
    assert has_generation(template) and ending == WILD[name][2]


@pytest.mark.parametrize("name", WILD)
def test_the_prompt_and_what_is_marked_make_up_the_text(name):
    tokenizer = wild(name)
    template, _ = find_template(tokenizer, "<image>")
    prompt = render(tokenizer, template, CHAT[:1], add_generation_prompt=True)
    assert prompt + marked(tokenizer, template, CHAT[:2]) == render(tokenizer, template, CHAT[:2])


@pytest.mark.parametrize("name", WILD)
def test_every_answer_is_marked_up_to_its_end_and_no_question_is(name):
    tokenizer = wild(name)
    template, ending = find_template(tokenizer, "<image>")
    found = marked(tokenizer, template, CHAT)
    assert found.count(ending) == 2 and "?" not in found and found.index("1.") < found.index("2.")


@pytest.mark.parametrize("name", WILD)
@given(
    contents=st.lists(st.text(st.sampled_from("ab \n{}%<|'\\é"), max_size=12), min_size=1, max_size=5),
    prompt=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_text_stays_to_the_letter_what_the_language_model_makes_of_it(name, contents, prompt):
    template, tokenizer = WILD[name][0], wild(name)
    messages = [(user, assistant)[turn % 2](content) for turn, content in enumerate(contents)]
    found = render(tokenizer, extend_template(template, "<image>"), messages, add_generation_prompt=prompt)
    assert found == render(tokenizer, template, messages, add_generation_prompt=prompt)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = known("qwen3")
    tokenizer.chat_template += "{# a revision that TRL does not know #}"
    with pytest.raises(ChatTemplateError, match="rewrites earlier turns"):
        find_template(tokenizer, "<image>")


def test_a_turn_must_end_with_a_special_token():
    with pytest.raises(ChatTemplateError, match="must end with a special token"):
        find_template(tokenizer_with(WILD["chatml"][0]), "<image>")  # <|im_end|> is none of its tokens


def test_a_template_that_drops_what_was_said_is_refused():
    with pytest.raises(ChatTemplateError, match="loses what was said"):
        find_template(tokenizer_with("{{ messages[-1].content }}"), "<image>")


def test_a_template_that_cannot_be_compiled_is_refused():
    with pytest.raises(ChatTemplateError, match="cannot be rendered"):
        find_template(tokenizer_with("{% for message in messages %}"), "<image>")


def test_only_the_default_of_named_templates_is_extended():
    tokenizer = wild("chatml")
    expected = find_template(tokenizer, "<image>")
    tokenizer.chat_template = {"default": WILD["chatml"][0], "rag": "{{ documents }}"}
    assert find_template(tokenizer, "<image>") == expected


# --- a given template ------------------------------------------------------------------------------------------------


def test_a_given_template_goes_before_the_own_one():
    tokenizer = known("llama3")
    template, ending = find_template(tokenizer, "<image>", WILD["zephyr"][0])
    assert (template, ending) == (extend_template(WILD["zephyr"][0], "<image>"), "</s>")


def test_a_given_template_that_is_complete_is_used_as_it_is():
    given_template = plain_template("<image>").replace("USER", "HUMAN")
    assert find_template(tokenizer_with(None), "<image>", given_template)[0] == given_template


def test_a_generation_prompt_that_no_answer_continues_is_reported(caplog):
    given_template = plain_template("<image>").replace(
        "{{- 'ASSISTANT:' }}\n{%- endif", "{{- 'ASSISTANT: <think>' }}\n{%- endif"
    )
    find_template(tokenizer_with(None), "<image>", given_template)
    assert "asked in another way than it is trained" in caplog.text
