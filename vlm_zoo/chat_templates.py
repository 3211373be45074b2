"""Chat templates: the zoo's plain one, and the extension of a language model's own to image content.

A template of the zoo accepts a message's content as text or as a list of `{"type": "image"}` and `{"type": "text"}`,
and of `{"type": "video"}` where the architecture takes clips, in every role, and wraps what the assistant says, its
end-of-turn token included, in `{% generation %}`: with it `assistant_only_loss` is exact. The text of a conversation
of words alone is, to the letter, what the template that it extends makes of it.

    prelude     messages whose content is a list    ->  the same messages, their content a string
    own         those messages                      ->  text: the language model's template, unchanged
    generation  that text                           ->  the same text, the assistant's turns marked

The last step is needed only where the template has no marks and TRL knows no training variant of it. It finds the
turns by rendering: a turn is what the template adds to the generation prompt of the messages before it.
"""

import json
import logging
import re

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


logger = logging.getLogger(__name__)

# Turns content that is a list into a string, an image or video into its token and a line break; whatever else a
# message holds (tool calls, reasoning) stays. Tool results may be lists of anything; those are the language model's
# own business.
_PRELUDE = """\
{%- set zoo = namespace(messages=[], text='', keep=true, full='', end=0, asked=false) %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set zoo.keep = true %}
    {%- if content is defined and content is iterable and content is not string and content is not mapping %}
        {%- set zoo.text = '' %}
        {%- set zoo.keep = false %}
        {%- for item in content %}
            {%- if item is string %}
                {%- set zoo.text = zoo.text ~ item %}
            {%- elif item.type in ('image', 'image_url') or item.type is not defined and 'image' in item %}
                {%- set zoo.text = zoo.text ~ IMAGE_TOKEN ~ '\\n' %}
VIDEO_BRANCH\
            {%- elif item.type == 'text' or item.type is not defined and 'text' in item %}
                {%- set zoo.text = zoo.text ~ (item.text or '') %}
            {%- elif message.role == 'tool' %}
                {%- set zoo.keep = true %}
            {%- else %}
                {{- raise_exception('Content of type ' ~ item.type ~ ': expected KINDS.') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- set zoo.messages = zoo.messages + [message if zoo.keep else dict(message, content=zoo.text)] %}
{%- endfor %}
"""

# For architectures that take clips. Without it a video is content of an unknown type.
_VIDEO_BRANCH = """\
            {%- elif item.type == 'video' or item.type is not defined and 'video' in item %}
                {%- set zoo.text = zoo.text ~ VIDEO_TOKEN ~ '\\n' %}
"""

# For templates that carry their own marks.
_OWN = """\
{%- set messages = zoo.messages %}
OWN_TEMPLATE"""

# For templates without marks. Assistant turns that do not line up (a template that rewrites earlier turns) stay
# unmarked; the text is the same either way. Some templates put the end-of-sequence token behind the last turn only.
_OWN_MARKED = """\
{%- macro zoo_render(messages, add_generation_prompt) %}
OWN_TEMPLATE{{ '' }}{% endmacro %}
{%- set zoo.full = zoo_render(zoo.messages, add_generation_prompt) %}
{%- for message in zoo.messages %}
    {%- if message.role == 'user' %}
        {%- set zoo.asked = true %}
    {%- elif message.role == 'assistant' and zoo.asked %}
        {%- set start = zoo_render(zoo.messages[:loop.index0], true) %}
        {%- set stop = zoo_render(zoo.messages[:loop.index], false) %}
        {%- set stop = stop if zoo.full.startswith(stop) else stop.removesuffix(eos_token or '') %}
        {%- if stop.startswith(start) and zoo.full.startswith(stop) and start|length >= zoo.end %}
            {{- zoo.full[zoo.end:start|length] }}
            {%- generation %}
            {{- zoo.full[start|length:stop|length] }}
            {%- endgeneration %}
            {%- set zoo.end = stop|length %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{{- zoo.full[zoo.end:] }}"""

# For language models without a template of their own: roles in plain words, so that no token has to be learned.
_PLAIN = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
        {{- ' ' ~ (message.content or '') ~ eos_token }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'system' %}
        {{- (message.content or '') ~ '\\n' }}
    {%- else %}
        {{- message.role|upper ~ ': ' ~ (message.content or '') ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}"""


class ChatTemplateError(ValueError):
    """A chat template that cannot be extended, or that does not keep what the zoo promises of its templates."""


def plain_template(image_token: str, video_token: str | None = None) -> str:
    """The zoo's plain template, for these tokens."""
    return extend_template(_PLAIN, image_token, video_token)


def extend_template(template: str, image_token: str, video_token: str | None = None) -> str:
    """
    Extends a template that takes content as strings.

    Args:
        template: the language model's own, with or without `{% generation %}`.
        image_token: what an image is written as.
        video_token: what a video is written as; without it videos are refused, as content of any unknown type.

    Returns:
        A template that also takes content as lists with images, and videos, and that marks the assistant's turns.
    """
    tokens = {"IMAGE_TOKEN": image_token, "VIDEO_TOKEN": video_token}
    takes_clips = video_token is not None
    prelude = _PRELUDE.replace("VIDEO_BRANCH", _VIDEO_BRANCH if takes_clips else "")
    prelude = prelude.replace("KINDS", "image, video or text" if takes_clips else "image or text")
    prelude = re.sub("|".join(tokens), lambda match: json.dumps(tokens[match[0]], ensure_ascii=False), prelude)
    template = re.sub(r"(\r\n|\r|\n)\Z", "", template)  # jinja drops one line break at the end, but not inside a macro
    return prelude + (_OWN if has_generation(template) else _OWN_MARKED).replace("OWN_TEMPLATE", template)


def has_generation(template: str) -> bool:
    """Whether a template marks what the assistant says."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def find_template(
    tokenizer: PreTrainedTokenizerBase, image_token: str, template: str | None = None, video_token: str | None = None
) -> tuple[str, str]:
    """
    Finds the template of a vision-language model whose language model has this tokenizer.

    It extends the given template, or TRL's training variant of the tokenizer's own, or the tokenizer's own, or, where
    there is none, takes the plain one of the zoo. Every result is checked with `check_template`; of those that pass,
    one whose marks start where the generation prompt ends is preferred. What was chosen is logged.

    Args:
        tokenizer: with the image token among its special tokens.
        template: instead of the tokenizer's own. One that writes images and marks turns itself is used as it is.
        video_token: what a video is written as, where the architecture takes clips.

    Returns:
        The template, and the token that ends the assistant's turn.

    Raises:
        ChatTemplateError: when there is no template and no end-of-sequence token for the plain one either, or when the
            check fails.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        logger.info("Of the tokenizer's chat templates (%s) only the default one is extended.", ", ".join(own))
        own = own.get("default")
    if template is not None:
        if has_generation(template) and _writes_images(tokenizer, template, image_token):
            return template, check_template(tokenizer, template, image_token)
        bases = [template]
    elif own is not None:
        bases = [base for base in (_training_variant(tokenizer), own) if base is not None]
    elif tokenizer.eos_token is not None:
        bases = [_PLAIN]
        logger.warning(
            "The language model's tokenizer has no chat template: the model gets the plain one of the zoo "
            "('USER: …', 'ASSISTANT: …%s').",
            tokenizer.eos_token,
        )
    else:
        raise ChatTemplateError(
            "The tokenizer has no chat template, and no end-of-sequence token with which the plain one of the zoo "
            "could end a turn."
        )
    results = [_extend_and_check(tokenizer, base, image_token, video_token) for base in bases]
    passed = [result for result in results if not isinstance(result, ChatTemplateError)]
    if not passed:
        raise results[-1]
    chosen = next((result for result in passed if _marks_are_exact(tokenizer, result[0])), passed[0])
    if chosen is results[0] and len(bases) == 2:
        logger.info("The chat template is TRL's training variant of the language model's own.")
    return chosen


def response_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int] | None:
    """
    The token ids with which a template opens the assistant's turn, as they stand in whole conversations too.

    Returns:
        The ids, or `None` where question and answer are not kept apart by tokens of their own.
    """
    opening = None
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        asked, answered = [_user(question)], [_user(question), _assistant(answer)]
        whole = _ids(tokenizer, template, answered, False)
        before = _common(_ids(tokenizer, template, asked, False), _ids(tokenizer, template, asked, True))
        found = _common(_ids(tokenizer, template, asked, True), whole)[len(before) :]
        opening = found if opening is None else _common(opening, found)
        places = [start for start in range(len(whole)) if whole[start : start + len(found)] == found]
        if not opening or places[0] != len(before):
            return None
    return opening


def _ids(tokenizer, template: str, messages: list, prompt: bool) -> list[int]:
    return tokenizer(_render(tokenizer, template, messages, prompt)[0], add_special_tokens=False)["input_ids"]


def _common(one: list[int], other: list[int]) -> list[int]:
    """What two lists begin with alike."""
    length = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


def _training_variant(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's variant, with marks, of the tokenizer's own template; None where it needs none or TRL knows none."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # a template that TRL does not know, or that fails while TRL probes it
        return None


def _extend_and_check(
    tokenizer, base: str, image_token: str, video_token: str | None
) -> tuple[str, str] | ChatTemplateError:
    extended = extend_template(base, image_token, video_token)
    try:
        return extended, check_template(tokenizer, extended, image_token, base, video_token)
    except ChatTemplateError as error:
        return error


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------

_QUESTIONS, _ANSWERS = ("Is this a quokka?", "And that, a numbat?"), ("It is an axolotl.", "No, two ocelots.")
_TOOL = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Counts animals.",
        "parameters": {"type": "object", "properties": {"animal": {"type": "string", "description": "Which."}}},
    },
}


def _user(content) -> dict:
    return {"role": "user", "content": content}


def _assistant(content) -> dict:
    return {"role": "assistant", "content": content}


_CHAT = [_user(_QUESTIONS[0]), _assistant(_ANSWERS[0]), _user(_QUESTIONS[1]), _assistant(_ANSWERS[1])]
_CALL = {"type": "function", "function": {"name": "count", "arguments": {"animal": "numbat"}}}
_CONVERSATIONS = (
    *(_CHAT[:length] for length in range(1, 5)),
    [{"role": "system", "content": "Be brief."}, *_CHAT],
    [{"role": "developer", "content": "Be brief."}, *_CHAT],
    [
        *_CHAT[:3],
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "count", "content": "7"},
        _assistant("Seven."),
    ],
)


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_token: str,
    reference: str | None = None,
    video_token: str | None = None,
) -> str:
    """
    Renders a template and checks that conversations without images come out as from `reference`, that images come out
    in their order, and that the marks hold the answers and what ends them, and nothing of the questions.

    Args:
        template: the template to check.
        reference: the template that it extends; without one the first of these checks is left out.
        video_token: what a video is written as, where the template takes videos; the first check is theirs too.

    Returns:
        The token that ends the assistant's turn.

    Raises:
        ChatTemplateError: that names the check which failed and what was rendered.
    """
    try:
        chat = _render(tokenizer, template, _CHAT)[0]
    except Exception as error:  # TemplateError, and whatever a template's own expressions raise
        raise ChatTemplateError(f"The chat template cannot be rendered ({type(error).__name__}: {error}).") from error
    lost = [text for text in (*_QUESTIONS, *_ANSWERS) if text not in chat]
    if lost:
        raise ChatTemplateError(f"The chat template loses what was said: no {lost[0]!r} in {chat!r}.")
    if reference is not None:
        _check_text(tokenizer, template, image_token, reference, video_token)
    if not _writes_images(tokenizer, template, image_token):
        raise ChatTemplateError(f"The chat template does not write images as {image_token!r}, in their order.")
    return _check_marks(tokenizer, template)


def _render(tokenizer, template: str, messages: list, prompt: bool = False, **kwargs) -> tuple[str, list]:
    """The text of a conversation, and the (start, end) of its marks."""
    texts, marks = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=has_generation(template),
        **kwargs,
        **tokenizer.special_tokens_map,
    )
    return texts[0], marks[0] if marks else []


def _check_text(tokenizer, template: str, image_token: str, reference: str, video_token: str | None) -> None:
    """Strings, lists of text, and lists with images and videos must come out as the strings that they stand for."""
    before = [{"type": "image"}, {"type": "text", "text": _QUESTIONS[0]}]
    among = [{"type": "text", "text": "This: "}, {"type": "image_url"}, {"type": "image"}, {"text": "?"}]
    films = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": _QUESTIONS[0]}]
    image, video = f"{image_token}\n", f"{video_token}\n"
    pairs = [
        ([_user(before), *_CHAT[1:]], [_user(image + _QUESTIONS[0]), *_CHAT[1:]]),
        ([*_CHAT[:2], _user(among), _CHAT[3]], [*_CHAT[:2], _user(f"This: {image}{image}?"), _CHAT[3]]),
    ]
    if video_token is not None:
        pairs.append(([_user(films), *_CHAT[1:]], [_user(video + image + _QUESTIONS[0]), *_CHAT[1:]]))
    for messages in _CONVERSATIONS:
        listed = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        pairs += [(messages, messages), (listed, messages)]
    for messages, plain in pairs:
        for prompt in (False, True):
            for tools in (None, [_TOOL]):
                try:
                    expected, _ = _render(tokenizer, reference, plain, prompt, tools=tools)
                except Exception:  # the language model has no such role, or no tools; a template may raise anything
                    continue
                try:
                    found, _ = _render(tokenizer, template, messages, prompt, tools=tools)
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                if found != expected:
                    raise ChatTemplateError(
                        f"The extended chat template changes the text of {messages}: expected {expected!r}, found "
                        f"{found!r}."
                    )


def _writes_images(tokenizer, template: str, image_token: str) -> bool:
    first = [{"type": "image"}, {"type": "text", "text": _QUESTIONS[0]}, {"type": "image"}]
    second = [{"type": "text", "text": _QUESTIONS[1]}, {"type": "image"}]
    listed = [{"type": "text", "text": _ANSWERS[0]}]
    try:
        text, _ = _render(tokenizer, template, [_user(first), _assistant(listed), _user(second)])
    except Exception:  # a template that takes strings only may raise anything
        return False
    pieces = (image_token, _QUESTIONS[0], image_token, _ANSWERS[0], _QUESTIONS[1], image_token)
    found = re.findall("|".join(map(re.escape, dict.fromkeys(pieces))), text)
    return tuple(found) == pieces


def _turns(tokenizer, template: str) -> tuple[str, list]:
    """The probe conversation, and the (start, end) of its marks, those that touch taken together."""
    text, marks = _render(tokenizer, template, _CHAT)
    turns = []
    for start, stop in marks:
        if turns and turns[-1][1] == start:
            start = turns.pop()[0]
        if start < stop:
            turns.append((start, stop))
    return text, turns


def _check_marks(tokenizer, template: str) -> str:
    """Every mark must hold the answer and the token that ends the turn, in characters and in tokens."""
    text, turns = _turns(tokenizer, template)
    marked = [text[start:stop] for start, stop in turns]
    endings = [mark.partition(answer)[2].strip() for mark, answer in zip(marked, _ANSWERS, strict=False)]
    if len(marked) != len(_ANSWERS) or not all(endings) or any(question in "".join(marked) for question in _QUESTIONS):
        raise ChatTemplateError(
            "The chat template does not show which part of a conversation is the assistant's: it marks "
            f"{marked} in {text!r}, expected the answers {list(_ANSWERS)} and what ends each of them. A template "
            "without {% generation %} that rewrites earlier turns, or does not continue its own generation prompt, "
            "cannot be marked from outside."
        )
    ending = tokenizer.tokenize(endings[-1])[0]
    if ending not in tokenizer.get_added_vocab():
        raise ChatTemplateError(
            "The assistant's turn must end with a special token inside of {% generation %}, or the model never learns "
            f"to stop; found {marked[-1]!r}, where {ending!r} comes after the answer."
        )
    encoded = tokenizer.apply_chat_template(
        _CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    decoded = tokenizer.decode([token for token, mark in pairs if mark])
    if any(answer not in decoded for answer in _ANSWERS) or any(question in decoded for question in _QUESTIONS):
        raise ChatTemplateError(
            f"The tokenizer does not carry the marks of the chat template over to its tokens: of {text!r}, "
            f"{decoded!r} is marked, expected {marked}."
        )
    prompt, _ = _render(tokenizer, template, _CHAT[:-1], prompt=True)
    if not text.startswith(prompt):
        logger.warning(
            "The generation prompt of the chat template, …%r, is not how an answer without reasoning begins in it, "
            "…%r: the model would be asked in another way than it is trained. An option of the template such as "
            "enable_thinking=False, or another template, may help.",
            prompt[-40:],
            text[: turns[-1][0]][-40:],
        )
    return ending


def _marks_are_exact(tokenizer, template: str) -> bool:
    """Whether every mark starts where the generation prompt ends."""
    text, turns = _turns(tokenizer, template)
    prompts = [_render(tokenizer, template, _CHAT[:length], prompt=True)[0] for length in (1, 3)]
    return [text[:start] for start, _ in turns] == prompts
