"""The template chat, told by decoding: the tokenizer's own chat template, with the mask on the responses alone.

The texts that are expected are not taken from the package: chat_templates.py writes them out.
"""

import functools
import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_templates import (
    CHATML,
    CHATML_WITH_MARKS,
    CHATS,
    GEMMA,
    LAST_QUESTION,
    LLAMA_2,
    THINKS_ONCE,
)
from support.chat_templates import NO_END as NO_END_CHAT
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

from fedcli.config import CustomTemplate
from fedcli.data.encoded import EncodedExample
from fedcli.data.encoding import Encoder
from fedcli.data.segments import EARLIER, NO_CALLS, NO_END, NO_SYSTEM, NO_THOUGHTS, NO_TOOLS
from fedcli.errors import ConfigError
from fedcli.tasks.conversation import Example, Preference, Turn

NAMES = [name for name in CONVERSATIONS if name != "markers"]
PAIRS = [
    (chat, name)
    for chat in CHATS
    for name in NAMES
    if (CHATS[chat].system or CONVERSATIONS[name][0].role != "system")
    and (name != "50,000 characters" or chat in ("chatml", "llama 3"))
]
TEXTS = [text[:2000] for chat, name in PAIRS for text in CHATS[chat].parts(CONVERSATIONS[name])]


@functools.cache
def made(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = KINDS[kind](TEXTS)
    if tokenizer.sep_token:  # BERT's has no start and end, which chat templates write
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def with_chat(tokenizer: PreTrainedTokenizerFast, jinja: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_level(TEXTS)


def one(tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...]) -> EncodedExample:
    encoded = Encoder(tokenizer, "chat").encode([Example(turns)], 10**6)
    assert encoded.left_out == {}
    (example,) = sides(encoded)
    return example


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def comparable(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return a text without spaces where a tokenizer puts its own behind every special token."""
    return text.replace(" ", "") if is_metaspace(tokenizer) else text


@pytest.mark.parametrize(("kind", "chat", "name"), with_every_kind(PAIRS))
def test_what_is_learnt_is_every_response_and_its_end_token(kind: str, chat: str, name: str) -> None:
    tokenizer = with_chat(made(kind), CHATS[chat].jinja)
    turns = CONVERSATIONS[name]
    found = stretches(one(tokenizer, turns))
    expected = CHATS[chat].parts(turns)
    if not normalised(tokenizer, expected[-1]):
        expected.pop()
    assert [part.is_supervised for part in found] == [position % 2 == 1 for position in range(len(expected))]
    assert [comparable(tokenizer, read_back(tokenizer, part.ids)) for part in found] == [
        comparable(tokenizer, normalised(tokenizer, part, parses_special=True)) for part in expected
    ]
    end_id = tokenizer.convert_tokens_to_ids(CHATS[chat].end)
    assert Encoder(tokenizer, "chat").end_id == end_id
    assert all(part.ids.index(end_id) == len(part.ids) - 1 for part in found[1::2])


@pytest.mark.parametrize(("kind", "chat"), with_every_kind([(chat,) for chat in CHATS if chat != "no end"]))
def test_ids_are_the_tokenizers_own_and_the_mask_is_where_the_responses_are(kind: str, chat: str) -> None:
    tokenizer = with_chat(made(kind), CHATS[chat].jinja)
    compared = set()
    for name in [name for other, name in PAIRS if other == chat]:
        parts = CHATS[chat].parts(CONVERSATIONS[name])
        text = "".join(parts)
        assert text == tokenizer.apply_chat_template(messages(CONVERSATIONS[name]), tokenize=False)
        bounds = [len("".join(parts[:count])) for count in range(1, len(parts))]
        if any(merges(tokenizer, text[:bound], text[bound:]) for bound in bounds):
            continue
        compared.add(name)
        row = one(tokenizer, CONVERSATIONS[name])
        assert row.ids.tolist() == tokenizer.apply_chat_template(messages(CONVERSATIONS[name]))["input_ids"]
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert row.supervised.tolist() == [sum(bound <= start for bound in bounds) % 2 == 1 for start, _ in spans]
    # GPT-2's words part two newlines where a word follows, so that headers that end with two stand apart from it.
    if "merges" not in kind and (kind != "byte-level" or chat not in ("llama 3", "thinks")):
        assert compared >= {"one turn", "an input", "unicode", "punctuation in front"}


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_that_of_a_template_with_generation_marks(plain: PreTrainedTokenizerFast, name: str) -> None:
    marked = plain.apply_chat_template(
        messages(CONVERSATIONS[name]), chat_template=CHATML_WITH_MARKS, return_assistant_tokens_mask=True
    )
    row = one(with_chat(plain, CHATML), CONVERSATIONS[name])
    if name == "newlines in front":  # the tokenizer would merge them with the prompt's
        assert plain.decode(row.ids) == plain.decode(marked["input_ids"])
        assert len(row.ids) > len(marked["input_ids"])
        return
    assert row.ids.tolist() == marked["input_ids"]
    assert row.supervised.astype(int).tolist() == marked["assistant_masks"]


@pytest.mark.parametrize(
    ("kind", "chat", "name"),
    with_every_kind([(chat, name) for chat in CHATS for name in ("unicode", "newlines in front", "spaces in front")]),
)
def test_generation_sees_before_each_response_what_training_saw(kind: str, chat: str, name: str) -> None:
    tokenizer = with_chat(made(kind), CHATS[chat].jinja)
    turns = CONVERSATIONS[name]
    encoder = Encoder(tokenizer, "chat")
    seen: list[int] = []
    responses = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    for part in stretches(one(tokenizer, turns)):
        if part.is_supervised:
            assert encoder.prompts([turns[: responses.pop(0)]])[0] == seen
        seen += part.ids
    assert responses == []


@pytest.mark.parametrize(
    ("chat", "num_starts"), [("chatml", 0), ("llama 2", 4), ("llama 3", 1), ("gemma", 1), ("thinks", 0)]
)
def test_the_start_token_is_where_the_chat_template_writes_it(chat: str, num_starts: int) -> None:
    turns = turns_of(*"abcdefgh")
    for kind in ("byte-level", "byte-level with <s>", "metaspace BPE, always a space in front"):
        tokenizer = with_chat(made(kind), CHATS[chat].jinja)
        ids = one(tokenizer, turns).ids.tolist()
        assert ids.count(tokenizer.bos_token_id) == num_starts
        assert (ids[0] == tokenizer.bos_token_id) == (num_starts > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_that_is_cut_keeps_its_mask_and_loses_what_is_behind_the_cut(kind: str) -> None:
    encoder = Encoder(with_chat(made(kind), CHATML), "chat")
    example = Example(turns_of("What is it?", "Blue, of course.", "And then?", "Green."))
    (whole,) = sides(encoder.encode([example], 10**6))
    for length in range(1, len(whole.ids) + 1):
        encoded = encoder.encode([example], length)
        if length <= whole.prompt_length:
            assert (len(encoded), encoded.left_out) == (0, {"too long": 1})
            continue
        (cut,) = sides(encoded)
        assert encoded.num_truncated == whole.supervised[length:].any()  # losing what follows the end token is no cut
        assert cut.ids.tolist() == whole.ids[:length].tolist()
        assert cut.supervised.tolist() == whole.supervised[:length].tolist()
    first_end = whole.prompt_length + whole.supervised[whole.prompt_length :].tolist().index(False) - 1
    (cut,) = sides(encoder.encode([example], first_end))
    assert encoder.end_id == whole.ids[first_end]
    assert encoder.end_id not in cut.ids[whole.prompt_length :]


@pytest.mark.parametrize(("kind", "chat"), with_every_kind([(chat,) for chat in CHATS if CHATS[chat].system]))
def test_of_a_preference_only_the_last_response_is_learnt_on_both_sides(kind: str, chat: str) -> None:
    tokenizer = with_chat(made(kind), CHATS[chat].jinja)
    encoder = Encoder(tokenizer, "chat")
    prompt = turns_of("Name one.", "Red.", "Another?", "Green.", "And one more?", system="You name colours.")
    (pair,) = encoder.encode([Preference(prompt, "Blue, of course.", "What?")], 10**6)
    for side, response in zip(pair.sides, ("Blue, of course.", "What?"), strict=True):
        before, learnt, *rest = stretches(side)
        turns = (*prompt, Turn("assistant", response))
        expected = CHATS[chat].parts(turns)
        assert (before.is_supervised, learnt.is_supervised, len(rest) <= 1) == (False, True, True)
        assert comparable(tokenizer, read_back(tokenizer, learnt.ids)) == comparable(
            tokenizer, normalised(tokenizer, expected[-2], parses_special=True)
        )
        assert before.ids == encoder.prompts([prompt])[0]
        assert side.ids.tolist() == one(tokenizer, turns).ids.tolist()


# What a chat template does not write as it is given


def left_out(tokenizer: PreTrainedTokenizerFast, *conversations: tuple[Turn, ...]) -> dict[str, int]:
    encoded = Encoder(tokenizer, "chat").encode(map(Example, conversations), 10**6)
    assert len(encoded) == len(conversations) - encoded.left_out.total()
    return dict(encoded.left_out)


def chatml_of(content: str) -> str:
    return CHATML.replace("message['content']", content)


SHORT, LONG = turns_of("q1", "a1"), turns_of("q1", "a1", "q2", "a2")


@pytest.mark.parametrize(
    ("jinja", "conversation", "detail"),
    [
        (GEMMA, turns_of("q", "a", system="s"), "the chat template refuses it: System role not supported"),
        (LLAMA_2, (*SHORT[:1], *SHORT), "the chat template refuses it: Conversation roles must alternate"),
        (chatml_of("message['content'] | replace('x', '')"), turns_of("q", "axb"), "as it is given"),
        (chatml_of("message['content'][:12]"), turns_of("q", "a" * 13), "as it is given"),
        (CHATML, turns_of("q", ""), "the chat template does not write a response as it is given"),
        (CHATML, SHORT[1:], "Cannot apply chat template to an empty conversation"),
    ],
)
def test_what_a_template_refuses_is_left_out_and_nothing_else(
    plain: PreTrainedTokenizerFast, jinja: str, conversation: tuple[Turn, ...], detail: str
) -> None:
    tokenizer = with_chat(plain, jinja)
    assert left_out(tokenizer, SHORT, conversation, SHORT) == {"malformed": 1}
    with pytest.raises(ConfigError, match=re.escape(detail)):
        Encoder(tokenizer, "chat").prompts([(*conversation, Turn("user", "more"))])


@pytest.mark.parametrize("jinja", [THINKS_ONCE, LAST_QUESTION])
def test_where_a_template_rewrites_earlier_turns_the_last_response_alone_is_learnt(
    plain: PreTrainedTokenizerFast, jinja: str
) -> None:
    tokenizer = with_chat(plain, jinja)
    encoder = Encoder(tokenizer, "chat")
    (row,) = sides(encoder.encode([Example(LONG)], 10**6))
    before, learnt, *rest = stretches(row)
    assert (before.is_supervised, learnt.is_supervised, len(rest) <= 1) == (False, True, True)
    assert before.ids[: len(encoder.prompts([LONG[:-1]])[0])] == encoder.prompts([LONG[:-1]])[0]
    assert tokenizer.decode(learnt.ids).removeprefix("<think>\n\n</think>\n\n") == "a2<|im_end|>"
    rendered = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in LONG], tokenize=False
    )
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(row.ids.tolist()) == tokenizer.decode(whole)


PHI_4_MINI = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% else %}{{ eos_token }}{% endif %}"
)
"""The end of the whole conversation follows the last turn's at once."""
TWO_ENDS = PHI_4_MINI.replace("<|im_end|>", "<|eot_id|><|im_end|>")
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\n\n' %}{% set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.last or loop.revindex == 2 else '') + m['content'] + '[/INST]' }}
    {%- else %}{{ ' ' + m['content'] + eos_token }}{% endif %}
{%- endfor %}"""
"""The system turn stands before the last question."""


@pytest.mark.parametrize(("jinja", "end"), [(PHI_4_MINI, "<|im_end|>"), (TWO_ENDS, "<|eot_id|><|im_end|>")])
def test_of_several_turns_all_are_learnt_where_only_the_end_of_the_whole_differs(
    plain: PreTrainedTokenizerFast, jinja: str, end: str
) -> None:
    tokenizer = with_chat(plain, jinja)
    parts = stretches(one(tokenizer, LONG))
    assert [tokenizer.decode(part.ids) for part in parts if part.is_supervised] == [f"a1{end}", f"a2{end}"]
    assert tokenizer.decode(parts[-1].ids) == "</s>"
    assert Encoder(tokenizer, "chat").end_id == parts[-2].ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_responses_that_are_not_learnt_are_counted(plain: PreTrainedTokenizerFast) -> None:
    tokenizer = with_chat(plain, MISTRAL)
    rows = [turns_of("q1", "a1", "q2", "a2", system="s"), LONG, turns_of("q", "a", system="s")]
    encoded = Encoder(tokenizer, "chat").encode(map(Example, rows), 10**6)
    assert encoded.notes == {EARLIER: 1}
    learnt = [[plain.decode(part.ids) for part in stretches(row) if part.is_supervised] for row in sides(encoded)]
    assert learnt == [[" a2</s>"], [" a1</s>", " a2</s>"], [" a</s>"]]
    again = Encoder(with_chat(plain, THINKS_ONCE), "chat").encode(map(Example, [LONG, SHORT, LONG]), 10**6)
    assert again.notes == {EARLIER: 2}
    pairs = Encoder(plain, "chat").encode([Preference(LONG[:-1], "a", "b")], 10**6)
    assert (len(pairs), pairs.notes) == (1, {})  # of a preference the last alone is to be learnt


def test_a_system_turn_that_a_template_drops_is_counted(plain: PreTrainedTokenizerFast) -> None:
    jinja = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    encoded = Encoder(with_chat(plain, jinja), "chat").encode(
        [Example(turns_of("q", "a", system="s")), Example(SHORT)], 10**6
    )
    assert (len(encoded), encoded.notes) == (2, {NO_SYSTEM: 1})


def test_an_end_that_stands_behind_the_whole_alone_is_counted_as_missing_before(plain: PreTrainedTokenizerFast) -> None:
    tokenizer = with_chat(plain, NO_END_CHAT + "{%- if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    encoded = Encoder(tokenizer, "chat").encode(map(Example, [SHORT, LONG]), 10**6)
    assert encoded.notes == {NO_END: 1}
    learnt = [[plain.decode(part.ids) for part in stretches(row) if part.is_supervised] for row in sides(encoded)]
    assert learnt == [[" a1\n</s>"], [" a1", " a2\n</s>"]]


TOOLS = json.dumps([{"type": "function", "function": {"name": "look"}}])
CALLS = json.dumps([{"type": "function", "function": {"name": "look", "arguments": "{}"}}])


def test_a_template_of_turns_names_what_it_does_not_use_and_leaves_tool_turns_out(
    plain: PreTrainedTokenizerFast,
) -> None:
    rows = [
        (Turn("user", "q", tools=TOOLS), Turn("assistant", "a")),
        (Turn("user", "q"), Turn("assistant", "a", reasoning="hm")),
        (Turn("user", "q", tools=TOOLS), Turn("assistant", "a", tool_calls=CALLS)),
        (Turn("user", "q"), Turn("assistant", "", tool_calls=CALLS)),
        (Turn("user", "q"), Turn("assistant", "a", tool_calls=CALLS), Turn("tool", "t"), Turn("assistant", "b")),
    ]
    form = CustomTemplate(user="Q: {instruction} ", assistant="A:")
    for template in ("alpaca", "alpaca-input", "vicuna", form):
        encoded = Encoder(plain, template).encode(map(Example, rows), 10**6)
        assert (len(encoded), encoded.left_out) == (3, {"malformed": 2})
        assert encoded.notes == {NO_TOOLS: 2, NO_CALLS: 1, NO_THOUGHTS: 1}
        assert encoded.first_cases == {"malformed": "the template has no form for a tool's call"}
        same = [stretches(row)[-1].ids for row in sides(encoded)]
        assert same[0] == same[1] == same[2]


def test_a_named_template_for_tools_is_used_where_there_are_tools(plain: PreTrainedTokenizerFast) -> None:
    with_tools = CHATML.replace("{%- for", "{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- for", 1)
    plain.chat_template = {"default": CHATML, "tool_use": with_tools}
    row = one(plain, (Turn("user", "q", tools=TOOLS), Turn("assistant", "a")))
    prompt, learnt, _ = stretches(row)
    assert '<|im_start|>tools\n[{"type"' in plain.decode(prompt.ids)
    assert plain.decode(learnt.ids) == "a<|im_end|>"
    assert "tools" not in plain.decode(one(plain, SHORT).ids)


SPELT_OUT = ["</s>", "<s>", "<pad>", "<|im_end|>", "<|im_start|>user\n"]


@pytest.mark.parametrize(
    ("kind", "token", "place"), with_every_kind([(token, place) for token in SPELT_OUT for place in range(4)])
)
def test_a_special_token_that_is_spelt_out_leaves_the_conversation_out(kind: str, token: str, place: int) -> None:
    texts = ["s", "q", "a", "q2"]
    texts[place] = f"a {token} b"
    system, *spoken = texts
    turns = turns_of(*spoken, "a2", system=system)
    tokenizer = with_chat(made(kind), CHATML)
    assert left_out(tokenizer, turns, SHORT) == {"malformed": 1}
    encoded = Encoder(tokenizer, "chat").encode(
        [Preference(turns[:-1], "a", "b"), Preference(SHORT[:1], "a", "b")], 999
    )
    assert (len(encoded), encoded.left_out) == (1, {"malformed": 1})
    with pytest.raises(ConfigError, match="a special token is spelt out in the text"):
        Encoder(tokenizer, "chat").prompts([turns[:-1]])


@pytest.mark.parametrize(
    "text", ["< /s>", "<|im_end |>", "im_end", "[INST] ### Response: ASSISTANT:", "<think>", "{{ x }}"]
)
def test_text_that_only_looks_special_is_text(plain: PreTrainedTokenizerFast, text: str) -> None:
    _, learnt, _ = stretches(one(with_chat(plain, CHATML), turns_of(text, text)))
    assert plain.decode(learnt.ids) == f"{text}<|im_end|>"


def test_a_think_block_of_the_last_turn_is_part_of_its_prompt(plain: PreTrainedTokenizerFast) -> None:
    tokenizer = with_chat(plain, THINKS_ONCE)
    prompt, learnt, _ = stretches(one(tokenizer, SHORT))
    assert tokenizer.decode(prompt.ids) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(learnt.ids) == "a1<|im_end|>"
    assert Encoder(tokenizer, "chat").prompts([SHORT[:1]])[0] == prompt.ids


def test_what_a_template_writes_behind_the_end_token_is_not_learnt(plain: PreTrainedTokenizerFast) -> None:
    tail = "{%- if not add_generation_prompt %}</s>{% endif %}"
    tokenizer = with_chat(plain, CHATML.replace("{%- if add", tail + "{%- if add"))
    assert [tokenizer.decode(part.ids) for part in stretches(one(tokenizer, SHORT))] == [
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
        "a1<|im_end|>",
        "\n</s>",
    ]


@pytest.mark.parametrize(
    "jinja",
    [
        chatml_of("message['content'] | upper"),
        chatml_of("message['content'] + message['content']"),
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(plain: PreTrainedTokenizerFast, jinja: str) -> None:
    with pytest.raises(ConfigError, match="the tokenizer's chat template cannot be followed"):
        Encoder(with_chat(plain, jinja), "chat")


def test_a_tokenizer_without_a_chat_template_is_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder(plain, "chat")
    assert caught.value.message == "data.template is chat, and the base model's tokenizer has no chat template"
    assert "alpaca, alpaca-input or vicuna" in caught.value.hint


def test_templates_do_not_disturb_each_other_on_one_tokenizer(plain: PreTrainedTokenizerFast) -> None:
    encoders = [Encoder(with_chat(plain, CHATML), "chat"), Encoder(plain, "vicuna")]
    before = [encoder.prompts([SHORT[:1]])[0] for encoder in encoders]
    assert [encoder.prompts([SHORT[:1]])[0] for encoder in encoders[::-1]] == before[::-1]


TEXT = st.text(min_size=1, max_size=30)
BYTE_LEVEL = [with_chat(byte_level(TEXTS, merges_all=merges_all), CHATML) for merges_all in (False, True)]


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=TEXT, tokenizer=st.sampled_from(BYTE_LEVEL)
)
def test_of_any_text_response_and_end_token_are_learnt(
    texts: list[tuple[str, str]], system: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = turns_of(*[text for pair in texts for text in pair], system=system)
    parts = stretches(one(tokenizer, turns))
    assert [tokenizer.decode(part.ids) for part in parts] == CHATS["chatml"].parts(turns)
