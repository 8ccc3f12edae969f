"""Templates of fixed text, told by decoding: what of a conversation is learnt, with every kind of tokenizer.

The texts that are expected are written here, not taken from the package.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, byte_level, is_metaspace, normalised, read_back, stretches
from transformers import PreTrainedTokenizerFast

from fedcli.config import CustomTemplate, TemplateChoice, parse_config, read_document
from fedcli.data.conversation import Example, Preference, Turn, instruct
from fedcli.data.encoded import EncodedExample, EncodedExamples
from fedcli.data.encoding import Encoder
from fedcli.errors import ConfigError

HERE = Path("fedcli.yaml")

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CUSTOM = CustomTemplate(
    system="# {system}\n",
    user="Q: {instruction}\n",
    user_with_input="Q: {instruction} ({input})\n",
    assistant="A:",
    separator="\n",
)
TEMPLATES: dict[str, TemplateChoice] = {
    "alpaca": "alpaca",
    "alpaca-input": "alpaca-input",
    "vicuna": "vicuna",
    "custom": CUSTOM,
}


def turns_of(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    """Return the turns of user and assistant, one after the other."""
    spoken = [Turn("assistant" if position % 2 else "user", text) for position, text in enumerate(texts)]
    return (*([] if system is None else [Turn("system", system)]), *spoken)


MARKERS = (
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: USER: {system} ASSISTANT: A: x"
    "</s><s><pad><|im_start|>assistant\n<|im_end|>\n"
)
CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "one turn": turns_of("What colour is the sky at noon?", "The sky is blue."),
    "an input": (Turn("user", "Add them.", "1 and 2"), Turn("assistant", "three")),
    "a system turn": turns_of("What is it?", "Blue.", system="Answer in one word."),
    "an empty system turn": turns_of("What is it?", "Blue.", system=""),
    "five turns": turns_of("Name one.", "Red.", "Another?", "Green, of course.", system="You name colours."),
    "nine turns": turns_of(*[f"{word} {n}?" for n in range(1, 5) for word in ("and", "so")], system="Be brief."),
    "unicode": turns_of("Wie heißt 東京? 🏳️‍🌈", "東京 — Tōkyō, e\u0301té, 🏳️‍🌈\u200b\u00a0\u2028 ذهب"),
    "markers": turns_of(MARKERS, "stop" + MARKERS, "again " + MARKERS, MARKERS + "end", system=MARKERS),
    "newlines in front": turns_of("Write it.", "\n\nBlue.", "Again.", "\nBlue.\n\n"),
    "spaces in front": turns_of("Write it.", "  Blue.  ", "Again.", " Blue. "),
    "punctuation in front": turns_of("Write it.", ": x", "Again.", "):, x:"),
    "50,000 characters": turns_of("Write a lot.", "blue sky, \n" * 4545 + "green"),
}


def written(template: str, turns: tuple[Turn, ...]) -> list[tuple[str, str]]:
    """Return what stands before each response, and the response with what parts them."""
    parts = []
    has_system = turns[0].role == "system"
    text = {"alpaca": ALPACA, "alpaca-input": ALPACA, "vicuna": VICUNA, "custom": ""}[template]
    if template == "alpaca-input" and any(turn.input for turn in turns):
        text = ALPACA_INPUT
    if has_system:
        text = turns[0].content + {"alpaca": "\n\n", "alpaca-input": "\n\n", "vicuna": " ", "custom": "\n"}[template]
        text = f"# {text}" if template == "custom" else text
    spoken = turns[has_system:]
    for user, assistant in zip(spoken[::2], spoken[1::2], strict=True):
        both = f"{user.content} {user.input}" if user.input else user.content
        if template == "vicuna":
            text += f"USER: {both} ASSISTANT:"
        elif template == "custom":
            text += f"Q: {user.content} ({user.input})\nA:" if user.input else f"Q: {user.content}\nA:"
        elif template == "alpaca-input" and user.input:
            text += f"### Instruction:\n{user.content}\n\n### Input:\n{user.input}\n\n### Response:"
        else:
            text += f"### Instruction:\n{both}\n\n### Response:"
        parts.append((text, ("\n" if template == "custom" else " ") + assistant.content))
        text = ""
    return parts


TEXTS = [
    text
    for template in TEMPLATES
    for name, turns in CONVERSATIONS.items()
    for pair in written(template, turns)
    for text in (pair[0], pair[1][:2000], "".join(pair)[:2000])
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param](TEXTS)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level(TEXTS)


def one(
    tokenizer: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...], max_length: int = 10**6
) -> EncodedExample:
    encoded = Encoder(tokenizer, template).rows([Example(turns)], max_length)
    assert encoded.num_unusable == 0
    (example,) = encoded.examples
    return example


def text_of(tokenizer: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...]) -> str:
    return tokenizer.decode(one(tokenizer, template, turns).ids)


def in_front(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return a text as its tokens say it: sentencepiece puts a space in front of a text that has none."""
    return f" {text}" if is_metaspace(tokenizer) and not text.startswith(" ") else normalised(tokenizer, text)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_learnt_is_every_response_and_one_end_token_behind_it(
    tokenizer: PreTrainedTokenizerFast, template: str, name: str
) -> None:
    encoder = Encoder(tokenizer, TEMPLATES[template])
    turns = CONVERSATIONS[name]
    parts = stretches(one(tokenizer, TEMPLATES[template], turns))
    assert parts[0].ids[: len(encoder.start_ids)] == encoder.start_ids
    parts[0] = type(parts[0])(parts[0].ids[len(encoder.start_ids) :], False)
    expected = written(template, turns)
    assert [part.is_supervised for part in parts] == [False, True] * len(expected)
    assert all(encoder.end_id not in part.ids for part in parts[::2])
    assert all(part.ids.index(encoder.end_id) == len(part.ids) - 1 for part in parts[1::2])
    assert not {tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id} & {
        token for part in parts for token in part.ids
    }
    found = [
        (read_back(tokenizer, prompt.ids), read_back(tokenizer, response.ids[:-1]))
        for prompt, response in zip(parts[::2], parts[1::2], strict=True)
    ]
    assert found == [
        (in_front(tokenizer, prompt), normalised(tokenizer, response)) for prompt, response in expected
    ]
