"""How a conversation becomes a text: templates by name, of the user, or of the models."""

import re
from collections import Counter
from collections.abc import Sequence

from fusion_bench.problems import ConfigError, did_you_mean

#: Each message between two marks, under its role.
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
#: Headings and paragraphs, without marks.
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] | trim + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' -}}
{%- else -%}{{- '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
#: A message of the system stands before the user's next one.
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set state.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + state.system + message['content'] + ' [/INST]' -}}{%- set state.system = '' -%}
{%- else -%}{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
#: Marks of what the model has written, which only transformers knows.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
TEMPLATES = {"chatml": _CHATML, "alpaca": _ALPACA, "llama3": _LLAMA3, "mistral": _MISTRAL}


def check_template(given: str | None) -> None:
    """Refuse what is no chat template.

    Raises:
        ConfigError: an unknown name, or a text that is not Jinja.
    """
    if given is None or given == "auto" or given in TEMPLATES:
        return
    if not isinstance(given, str) or "{" not in given:
        hint = did_you_mean(str(given), ("auto", *TEMPLATES))
        raise ConfigError(f"'{given}' is no chat template.", f"{hint} Or give a text in Jinja.")
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:  # with what transformers lets a template use
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            _GENERATION.sub("", given)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(f"it is not Jinja: {error.message} (line {error.lineno}).") from error


def chosen(given: str, of_models: Sequence[str | None]) -> str | None:
    """Return the text of a template: a name's, or with ``auto`` the most frequent of the models'.

    Of those that are equally frequent the first wins; None where no model has one.
    """
    if given != "auto":
        return TEMPLATES.get(given, given)
    known = Counter(text.strip() for text in of_models if text and text.strip())
    return known.most_common(1)[0][0] if known else None
