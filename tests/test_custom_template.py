"""A template of one's own, from fedcli.yaml: what it must hold, and what it writes."""

from pathlib import Path

import pytest
from support.models import sides
from support.tokenizer_kinds import byte_level, turns_of
from transformers import PreTrainedTokenizerFast

from fedcli.config import TemplateChoice, parse_config, read_document
from fedcli.data.encoding import Encoder
from fedcli.errors import ConfigError
from fedcli.tasks.conversation import Example, Turn, instruct

HERE = Path("fedcli.yaml")


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level(["Q: what is it? A: it is blue"])


def text_of(tokenizer: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...]) -> str:
    (example,) = sides(Encoder(tokenizer, template).encode([Example(turns)], 999))
    return tokenizer.decode(example.ids)


def custom(**form: object) -> TemplateChoice:
    return parse_config({"data": {"template": form}}, HERE).data.template


def test_a_template_of_ones_own_needs_no_more_than_user_and_assistant(plain: PreTrainedTokenizerFast) -> None:
    form = custom(user="[{instruction}]", assistant="->")
    assert text_of(plain, form, turns_of("q1", "a1", "q2", "a2")) == "[q1]-> a1</s>[q2]-> a2</s>"
    assert text_of(plain, form, turns_of("q1", "a1", system="s")) == "s\n\n[q1]-> a1</s>"
    assert text_of(plain, form, instruct("q", "a", "i").turns) == "[q i]-> a</s>"


def test_a_template_from_the_file_is_the_template_that_is_used(plain: PreTrainedTokenizerFast) -> None:
    document = """
data:
  template:
    default_system: Be brief.
    default_system_with_input: Read it.
    system: "<{system}>\\n"
    user: "Q: {instruction}\\n"
    user_with_input: "Q ({input}): {instruction}\\n"
    assistant: "A:"
    separator: "\\n"
"""
    form = parse_config(read_document(document, HERE), HERE).data.template
    assert text_of(plain, form, turns_of("q", "a")) == "<Be brief.>\nQ: q\nA:\na</s>"
    assert text_of(plain, form, turns_of("q", "a", system="Why?")) == "<Why?>\nQ: q\nA:\na</s>"
    assert text_of(plain, form, instruct("q", "a", "i").turns) == "<Read it.>\nQ (i): q\nA:\na</s>"


def test_what_a_value_spells_is_not_filled_in(plain: PreTrainedTokenizerFast) -> None:
    form = custom(
        system="{system}|", user="{instruction}|", user_with_input="{input}+{instruction}|", assistant="{instruction}"
    )
    spelt = "{instruction}{input}{system}{{\\1}}"
    prompt = f"{spelt}|{spelt}+{spelt}|{{instruction}}"
    turns = (Turn("system", spelt), Turn("user", spelt, spelt), Turn("assistant", spelt))
    assert text_of(plain, form, turns) == f"{prompt} {spelt}</s>"


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"user": "Q:", "assistant": "A:"}, "user must hold {instruction} once"),
        ({"user": "{instruction} {instruction}", "assistant": "A:"}, "user must hold {instruction} once"),
        ({"user": "{instruction}", "assistant": "A:", "system": "none"}, "system must hold {system} once"),
        (
            {"user": "{instruction}", "assistant": "A:", "user_with_input": "{instruction}"},
            "user_with_input must hold {instruction} and {input} once",
        ),
    ],
)
def test_a_form_without_its_place_is_a_fault(form: dict[str, str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom(**form)
    assert caught.value.message == f"fedcli.yaml has 1 fault:\n  data.template: {fault}"


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"user": "{instruction}"}, "data.template.assistant: "),
        ({"assistant": "A:"}, "data.template.user: "),
        (
            {"user": "{instruction}", "assistant": "A:", "seperator": ""},
            "data.template.seperator: unknown key. Did you mean separator?",
        ),
        ({"user": "{instruction}", "assistant": 3}, "data.template.assistant: "),
    ],
)
def test_a_key_that_is_missing_or_unknown_is_a_fault(form: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom(**form)
    assert caught.value.message.startswith(f"fedcli.yaml has 1 fault:\n  {fault}")


def test_an_unknown_template_is_a_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"template": "vicunna"}}, HERE)
    assert "data.template: unknown template 'vicunna'. Did you mean vicuna?" in caught.value.message
