"""Chat templates: the zoo's plain one, and the extension of a language model's own to image content.

A template of the zoo accepts a message's content as text or as a list of `{"type": "image"}` and `{"type": "text"}`,
and wraps what the assistant says, its end-of-turn token included, in `{% generation %}`: with it
`assistant_only_loss` is exact.
"""

# Writes a message's content: text as it is, an image as its token and a line break.
CONTENT_MACRO = """\
{%- macro zoo_content(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or item.type == 'image_url' or 'image' in item -%}
                {{- 'IMAGE_TOKEN\\n' -}}
            {%- elif item.type == 'text' or 'text' in item -%}
                {{- item.text -}}
            {%- else -%}
                {{- raise_exception('Unknown content of type ' ~ item.type ~ ': expected image or text.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# For language models without a template of their own: roles in plain words, so that no token has to be learned.
PLAIN_TEMPLATE = (
    CONTENT_MACRO
    + """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
        {{- ' ' + zoo_content(message.content) + eos_token -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message.role == 'system' -%}
        {{- zoo_content(message.content) + '\\n' -}}
    {%- else -%}
        {{- message.role | upper + ': ' + zoo_content(message.content) + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)


def plain_template(image_token: str) -> str:
    """The zoo's plain template, for this image token."""
    return PLAIN_TEMPLATE.replace("IMAGE_TOKEN", image_token)
