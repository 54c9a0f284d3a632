"""Tokenizer files: beginning tokens, added tokens, chat templates. The oracle is transformers on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_server import TEMPLATE, write_tokenizer

from moesaic.launch.http.chat_template import ChatTemplate, ChatTemplateError
from moesaic.launch.http.tokenizer import Tokenizer, load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " well "}]


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def edit(folder: Path, **settings: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_no_files_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("setting", "starts"), [(True, 1), (False, 0), (None, 0)])
def test_the_beginning_token_is_as_the_settings_say(tmp_path: Path, setting: bool | None, starts: int) -> None:
    tokenizer = load(edit(write_tokenizer(tmp_path), add_bos_token=setting))
    assert tokenizer.encode("hi").count(0) == starts
    assert tokenizer.encode("<bos>hi").count(0) == 1
    assert tokenizer.encode("hi", add_special_tokens=False).count(0) == 0


def test_added_tokens_of_the_config_alone(tmp_path: Path) -> None:
    size = load(write_tokenizer(tmp_path)).vocab_size
    added = {str(size): {"content": "<|think|>", "special": True}}
    tokenizer = load(edit(tmp_path, added_tokens_decoder=added))
    assert tokenizer.encode("a<|think|>b", add_special_tokens=False)[1] == size
    assert size in tokenizer.special_ids


@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_templates_wherever_they_are(tmp_path: Path, form: str) -> None:
    write_tokenizer(tmp_path, template=None)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        edit(tmp_path, chat_template=TEMPLATE if form == "string" else named)
    template = load(tmp_path).chat_template
    assert template is not None
    assert template.render(MESSAGES[:1]) == "<bos><|user|>hi<eos><|assistant|>"


def test_transformers_makes_the_same_of_the_same_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    mine = load(tmp_path)
    text = oracle.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert mine.chat_template is not None
    assert mine.chat_template.render(MESSAGES) == text
    ids = mine.encode(text, add_special_tokens=False)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_templates_have_what_transformers_gives_them() -> None:
    source = (
        "{%- for m in messages %}\n    {% if m.content == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y')[:2] }}{{ flag }}"
    )
    text = ChatTemplate(source, {}).render([{"content": "skip"}, {"content": "x"}], extra={"flag": "F"})
    assert text.replace("\n", "").strip() == 'x{"a": "<é>"}20F'


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages[9].content.x }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"],
)
def test_refusals_and_escapes_are_errors_for_the_client(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_continuing_ends_inside_the_last_message() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": "<bos>", "eos_token": "<eos>"})
    assert template.render_to_continue(MESSAGES) == "<bos><|user|>hi<eos><|assistant|> well"


def test_a_broken_template_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat template"):
        load_tokenizer(write_tokenizer(tmp_path, template="{% if %}"))
