"""The chat template that an export carries if its base has none: it renders dialogues as the policy saw them.

Others render messages with it. In this package the text itself is used, so `ModelLoader` leaves the template out.
"""

import json
from copy import deepcopy

from transformers import PreTrainedTokenizerBase

HH_TEMPLATE_COMMENT = "{#- Written by dpo-lightning: turns as in hh-rlhf, which the model was trained on. -#}"
_HH_TEMPLATE = """{{- PREFIX -}}
{%- set names = {'user': 'Human', 'assistant': 'Assistant'} -%}
{%- for message in messages -%}
    {%- if message['role'] not in names -%}
        {{- raise_exception('expected messages of user and assistant, got the role ' ~ message['role']) -}}
    {%- endif -%}
    {{- '\\n\\n' ~ names[message['role']] ~ ': ' ~ message['content'] | trim -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n\\nAssistant:' -}}
{%- elif messages[-1]['role'] == 'assistant' -%}
    {{- END -}}
{%- endif -%}
"""
_PROBE_MESSAGES = [{"role": "user", "content": "Hello"}]
_PROBE_TEXT = "\n\nHuman: Hello\n\nAssistant:"


def added_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: usually a begin-of-sequence token, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)])


def make_hh_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that renders messages as text of hh-rlhf, with the same token ids as that text.

    Returns:
        The template, or None if the tokenizer makes other tokens of the text where a control token stands before it.
    """
    prefix = added_prefix(tokenizer)
    literals = {"PREFIX": "".join(tokenizer.convert_ids_to_tokens(prefix)), "END": tokenizer.eos_token or ""}
    template = HH_TEMPLATE_COMMENT + _HH_TEMPLATE
    for name, text in literals.items():
        template = template.replace(name, json.dumps(text, ensure_ascii=False))
    trial = deepcopy(tokenizer)
    trial.chat_template = template
    rendered = trial.apply_chat_template(_PROBE_MESSAGES, tokenize=False, add_generation_prompt=True)
    ids, expected = (trial(text, add_special_tokens=False)["input_ids"] for text in (rendered, _PROBE_TEXT))
    return template if ids == [*prefix, *expected] else None


def remove_hh_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the chat template from a tokenizer if it is the one of an export."""
    if isinstance(tokenizer.chat_template, str) and tokenizer.chat_template.startswith(HH_TEMPLATE_COMMENT):
        tokenizer.chat_template = None
