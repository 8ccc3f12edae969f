"""Templates of fixed text, told by decoding: what of a conversation is learnt, with every kind of tokenizer.

The texts that are expected are written here, not taken from the package.
"""

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import sides
from support.tokenizer_kinds import (
    CONVERSATIONS,
    KINDS,
    byte_level,
    is_metaspace,
    merges,
    normalised,
    read_back,
    stretches,
    turns_of,
    with_every_kind,
)
from transformers import PreTrainedTokenizerFast

from fedcli.config import CustomTemplate, TemplateChoice
from fedcli.data.encoded import EncodedExample
from fedcli.data.encoding import Encoder
from fedcli.tasks.conversation import Example, Preference, Turn, instruct

HERE = Path("fedcli.yaml")

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
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


WITH_CONVERSATIONS = with_every_kind([(template, name) for template in TEMPLATES for name in CONVERSATIONS])
WITH_TEMPLATES = with_every_kind([(template,) for template in TEMPLATES])


@functools.cache
def made(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind](TEXTS)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level(TEXTS)


def one(
    tokenizer: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...], max_length: int = 10**6
) -> EncodedExample:
    encoded = Encoder(tokenizer, template).encode([Example(turns)], max_length)
    assert encoded.left_out.total() == 0
    (example,) = sides(encoded)
    return example


def text_of(tokenizer: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...]) -> str:
    return tokenizer.decode(one(tokenizer, template, turns).ids)


def in_front(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return a text as its tokens say it: sentencepiece puts a space in front of a text that has none."""
    return f" {text}" if is_metaspace(tokenizer) and not text.startswith(" ") else normalised(tokenizer, text)


@pytest.mark.parametrize(("kind", "template", "name"), WITH_CONVERSATIONS)
def test_what_is_learnt_is_every_response_and_one_end_token_behind_it(kind: str, template: str, name: str) -> None:
    tokenizer = made(kind)
    encoder = Encoder(tokenizer, TEMPLATES[template])
    turns = CONVERSATIONS[name]
    row = one(tokenizer, TEMPLATES[template], turns)
    start = len(encoder.start_ids)
    assert row.ids[:start].tolist() == encoder.start_ids
    parts = stretches(EncodedExample(row.ids[start:], row.supervised[start:]))
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
    assert found == [(in_front(tokenizer, prompt), normalised(tokenizer, response)) for prompt, response in expected]


@pytest.mark.parametrize(("kind", "template", "name"), WITH_CONVERSATIONS)
def test_generation_sees_before_each_response_what_training_saw(kind: str, template: str, name: str) -> None:
    tokenizer = made(kind)
    encoder = Encoder(tokenizer, TEMPLATES[template])
    turns = CONVERSATIONS[name]
    parts = stretches(one(tokenizer, TEMPLATES[template], turns))
    seen: list[int] = []
    responses = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    for position, prompt, response in zip(responses, parts[::2], parts[1::2], strict=True):
        seen += prompt.ids
        assert encoder.prompts([turns[:position]])[0] == seen
        seen += response.ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_start_token_is_there_once(template: str) -> None:
    starts = {
        "byte-level with <s>": "<s>",
        "metaspace BPE, a space in front of the first": "<s>",
        "word piece": "[CLS]",
    }
    for kind, start in starts.items():
        tokenizer = KINDS[kind](TEXTS)
        encoder = Encoder(tokenizer, TEMPLATES[template])
        start_id = tokenizer.convert_tokens_to_ids(start)
        for name in ("one turn", "nine turns"):
            ids = one(tokenizer, TEMPLATES[template], CONVERSATIONS[name]).ids.tolist()
            assert (encoder.start_ids, ids[0], ids.count(start_id)) == ([start_id], start_id, 1)


@pytest.mark.parametrize(
    ("template", "turns", "text"),
    [
        (
            "alpaca",
            (Turn("user", "Add them.", "1 and 2"), Turn("assistant", "3")),
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd them. 1 and 2\n\n"
            "### Response: 3</s>",
        ),
        (
            "alpaca",
            turns_of("q1", "a1", "q2", "a2", system="Be brief."),
            "Be brief.\n\n### Instruction:\nq1\n\n### Response: a1</s>### Instruction:\nq2\n\n### Response: a2</s>",
        ),
        (
            "alpaca-input",
            (Turn("user", "Add them.", "1 and 2"), Turn("assistant", "3")),
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd them.\n\n"
            "### Input:\n1 and 2\n\n"
            "### Response: 3</s>",
        ),
        (
            "alpaca-input",
            turns_of("Add 1 and 2.", "3"),
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd 1 and 2.\n\n"
            "### Response: 3</s>",
        ),
        (
            "vicuna",
            turns_of("q1", "a1", "q2", "a2"),
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        ),
        ("vicuna", turns_of("q1", "a1", system="Be brief."), "Be brief. USER: q1 ASSISTANT: a1</s>"),
        ("vicuna", turns_of("q1", "a1", system=""), " USER: q1 ASSISTANT: a1</s>"),  # FastChat's, to the space
    ],
)
def test_a_template_writes_this_text(
    plain: PreTrainedTokenizerFast, template: TemplateChoice, turns: tuple[Turn, ...], text: str
) -> None:
    assert text_of(plain, template, turns) == text


def merging(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with tokens such as ":x", as far as its kind can have them."""
    return KINDS[kind](["q:x q::x q:\nx"] * 50 + ["Q: name it\nA: x\nx b"])


BEGINNINGS = ["x b", ": x", "\nx", " x"]


@pytest.mark.parametrize(
    ("kind", "separator", "response"),
    with_every_kind([(separator, response) for separator in ("", "\n", " ") for response in BEGINNINGS]),
)
def test_nothing_is_added_to_a_response_that_the_tokenizer_would_merge_with_its_prompt(
    kind: str, separator: str, response: str
) -> None:
    tokenizer = merging(kind)
    form = CustomTemplate(user="Q: {instruction}\n", assistant="A:", separator=separator)
    prompt, learnt = stretches(one(tokenizer, form, instruct("name it", response).turns))
    assert learnt.ids[-1] == Encoder(tokenizer, form).end_id
    assert read_back(tokenizer, learnt.ids[:-1]) == normalised(tokenizer, separator + response)
    assert prompt.ids == Encoder(tokenizer, form).prompts([(Turn("user", "name it"),)])[0]


def test_most_kinds_of_tokenizers_merge_a_prompt_with_what_follows() -> None:
    # Else the test above would prove nothing.
    merge = [
        kind for kind in KINDS if any(merges(merging(kind), "Q: name it\nA:", response) for response in BEGINNINGS)
    ]
    assert merge == [kind for kind in KINDS if kind.startswith(("byte-level", "metaspace BPE"))]


@pytest.mark.parametrize(("kind", "template"), WITH_TEMPLATES)
def test_a_conversation_that_is_cut_keeps_its_mask_and_loses_what_is_behind_the_cut(kind: str, template: str) -> None:
    tokenizer = made(kind)
    encoder = Encoder(tokenizer, TEMPLATES[template])
    example = Example(turns_of("What is it?", "Blue, of course.", "And then?", "Green."))
    (whole,) = sides(encoder.encode([example], 10**6))
    for length in range(1, len(whole.ids) + 1):
        encoded = encoder.encode([example], length)
        if length <= whole.prompt_length:
            assert (len(encoded), encoded.left_out) == (0, {"too long": 1})
            continue
        (cut,) = sides(encoded)
        assert encoded.num_truncated == (length < len(whole.ids))
        assert (cut.ids.tolist(), cut.supervised.tolist()) == (
            whole.ids[:length].tolist(),
            whole.supervised[:length].tolist(),
        )
    before_the_last, without_end = whole.ids.tolist().index(encoder.end_id), len(whole.ids) - 1
    for length, num_ends in [(before_the_last, 0), (before_the_last + 1, 1), (without_end, 1)]:
        (cut,) = sides(encoder.encode([example], length))
        assert cut.ids.tolist().count(encoder.end_id) == num_ends


@pytest.mark.parametrize(("kind", "template"), WITH_TEMPLATES)
def test_of_a_preference_only_the_last_response_is_learnt_on_both_sides(kind: str, template: str) -> None:
    tokenizer = made(kind)
    encoder = Encoder(tokenizer, TEMPLATES[template])
    prompt = turns_of("Name one.", "Red.", "Another?", "Green.", "And one more?", system="You name colours.")
    encoded = encoder.encode([Preference(prompt, "Blue, of course.", "\n\nWhat?")], 10**6)
    assert (len(encoded), encoded.num_truncated, encoded.left_out) == (1, 0, {})
    (pair,) = encoded
    for side, response in zip(pair.sides, ("Blue, of course.", "\n\nWhat?"), strict=True):
        before, learnt = stretches(side)
        (*_, (_, expected)) = written(template, (*prompt, Turn("assistant", response)))
        assert read_back(tokenizer, learnt.ids[:-1]) == normalised(tokenizer, expected)
        assert (learnt.ids[-1], before.ids.count(encoder.end_id)) == (encoder.end_id, 2)
        assert before.ids == encoder.prompts([prompt])[0]
        (whole,) = sides(encoder.encode([Example((*prompt, Turn("assistant", response)))], 10**6))
        assert side.ids.tolist() == whole.ids.tolist()


def test_a_pair_is_cut_and_left_out_as_rows_are(plain: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(plain, "vicuna")
    prompt = turns_of("Name one.", "Red.", "Another?")
    room = len(encoder.prompts([prompt])[0])
    pair = Preference(prompt, "Blue sky.", "Blue sea, I think.")
    cases = {
        room: (0, 0, {"too long": 1}),
        room + 1: (0, 0, {"same responses": 1}),
        room + 4: (1, 1, {}),
        999: (1, 0, {}),
    }
    for length, expected in cases.items():
        encoded = encoder.encode([pair], length)
        assert (len(encoded), encoded.num_truncated, encoded.left_out) == expected
        for row in encoded:
            assert [side.prompt_length for side in row.sides] == [room, room]
            assert max(len(side.ids) for side in row.sides) <= length


TEXT = st.text(max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    exchanges=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    system=st.none() | TEXT,
    template=st.sampled_from(list(TEMPLATES)),
    merges_all=st.booleans(),
)
def test_of_any_text_separator_response_and_end_token_are_learnt(
    exchanges: list[tuple[str, str]], system: str | None, template: str, merges_all: bool
) -> None:
    tokenizer = BYTE_LEVEL[merges_all]
    turns = turns_of(*[text for exchange in exchanges for text in exchange], system=system)
    parts = stretches(one(tokenizer, TEMPLATES[template], turns))
    assert [tokenizer.decode(part.ids) for part in parts] == [
        text for prompt, response in written(template, turns) for text in (prompt, response + "</s>")
    ]
    assert sum(part.ids.count(tokenizer.eos_token_id) for part in parts) == len(exchanges)


BYTE_LEVEL = {merges_all: byte_level(TEXTS, merges_all=merges_all) for merges_all in (False, True)}
