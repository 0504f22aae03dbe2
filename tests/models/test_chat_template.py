"""The chat template of exports: messages become the token ids that the policy was trained on."""

from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from dpo import quickstart
from dpo.data.dialogue import DialoguePair, Role, Turn
from dpo.data.prompts import encode_prompt
from dpo.data.tokenization import PairEncoder, TextFormat
from dpo.models.chat_template import HH_TEMPLATE_COMMENT, make_hh_template
from dpo.models.generation import GREEDY_SAMPLING, generate_answers
from dpo.models.loading import ModelLoader
from dpo.models.origin import PolicyOrigin, save_policy

MESSAGES = [
    {"role": "user", "content": "What is\n\nthis? "},
    {"role": "assistant", "content": " A cup.\nOf tea"},
    {"role": "user", "content": "  Why? "},
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def export(base: Path, folder: Path, text_format: TextFormat, template: str | None = None) -> PreTrainedTokenizerFast:
    """Export a base model as it is, and return the tokenizer that others load from the export."""
    tokenizer = ModelLoader().load_tokenizer(str(base))
    tokenizer.chat_template = template
    used = PairEncoder(tokenizer, 256, text_format).format
    save_policy(folder, ModelLoader().load_model(str(base)), tokenizer, PolicyOrigin("a", "a", format=used))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["quickstart", "pretrained"])
def base(request: pytest.FixtureRequest) -> Path:
    return quickstart.POLICY_FOLDER if request.param == "quickstart" else request.getfixturevalue("pretrained")


@pytest.mark.parametrize("template", [None, CHATML], ids=["none", "own"])
def test_the_export_renders_messages_as_they_were_encoded(base: Path, template: str | None, tmp_path: Path) -> None:
    exported = export(base, tmp_path / "export", "auto", template)
    reader = ModelLoader().load_tokenizer(str(tmp_path / "export"))
    assert reader.chat_template == template, "what this package reads is the base's own"
    encoder = PairEncoder(reader, 256)
    stripped = [{**message, "content": message["content"].strip()} for message in MESSAGES]
    rendered = exported.apply_chat_template(stripped, add_generation_prompt=True)["input_ids"]
    assert rendered == encode_prompt(encoder, MESSAGES)
    if not template:
        assert rendered == exported.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    if template:
        assert exported.chat_template == template


def test_a_whole_dialogue_ends_as_in_training(base: Path, tmp_path: Path) -> None:
    exported = export(base, tmp_path / "export", "hh")
    pair = PairEncoder(ModelLoader().load_tokenizer(str(base)), 256).encode(
        DialoguePair((Turn(Role.HUMAN, " Why?"),), " So.", " No.")
    )
    dialogue = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert exported.apply_chat_template(dialogue)["input_ids"] == [*pair.prompt, *pair.chosen]
    assert exported.decode(exported("\n\nHuman: Why?\n\nAssistant:")["input_ids"]) == exported.decode(pair.prompt)


def test_a_role_that_was_never_trained_on_is_refused(tmp_path: Path) -> None:
    exported = export(quickstart.POLICY_FOLDER, tmp_path / "export", "hh")
    with pytest.raises(TemplateError, match="got the role system"):
        exported.apply_chat_template([{"role": "system", "content": "Be brief."}, *MESSAGES])


def test_an_export_of_an_export_has_the_template_too(tmp_path: Path) -> None:
    first = export(quickstart.POLICY_FOLDER, tmp_path / "first", "hh")
    second = export(tmp_path / "first", tmp_path / "second", "hh")
    assert first.chat_template == second.chat_template
    assert str(second.chat_template).startswith(HH_TEMPLATE_COMMENT)


def test_there_is_no_template_that_would_give_other_tokens() -> None:
    """Text after a control token is not split as text at the start, so no template could give the same ids."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER)
    assert make_hh_template(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>\n\n"]})
    assert make_hh_template(tokenizer) is None


@pytest.mark.parametrize("prompt", [MESSAGES[2:], "\n\nHuman: Why?\n\nAssistant:"], ids=["messages", "text"])
def test_a_pipeline_answers_like_this_package(prompt: str | list[dict[str, str]], tmp_path: Path) -> None:
    export(quickstart.POLICY_FOLDER, tmp_path / "export", "auto")
    ask = pipeline("text-generation", model=str(tmp_path / "export"), device="cpu")
    reply = ask(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
    loader = ModelLoader()
    encoder = PairEncoder(loader.load_tokenizer("quickstart"), 256)
    with torch.no_grad():
        asked = [encode_prompt(encoder, prompt)]
        ((answer,),) = generate_answers(loader.load_model("quickstart"), encoder, asked, GREEDY_SAMPLING, 0)
    assert answer.text.startswith(reply.strip()) and reply.strip()
