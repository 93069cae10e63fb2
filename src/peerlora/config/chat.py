"""Chat templates that ship with peerlora, by name, for base models whose tokenizer has none.

A template puts a special token, or the tokenizer's end-of-text token, behind every answer, since a model learns from
it where to stop.
"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

_MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + eos_token -}}
{%- else -%}{{- raise_exception('the template mistral knows the roles system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' -}}
{%- else -%}{{- raise_exception('the template alpaca knows the roles system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

TEMPLATES = {"chatml": _CHATML, "llama-3": _LLAMA_3, "mistral": _MISTRAL, "alpaca": _ALPACA}
"""Name -> Jinja text, in the dialect of ``apply_chat_template``."""


def resolve_template(given: str) -> str:
    """Return the Jinja text of ``data.template``: the text itself, or that of a name.

    Raises ValueError for what is neither.
    """
    if "{{" in given or "{%" in given:
        return given
    if given not in TEMPLATES:
        raise ValueError(f"{given!r} given; input should be {', '.join(TEMPLATES)}, or a Jinja text with {{{{ ... }}}}")
    return TEMPLATES[given]
