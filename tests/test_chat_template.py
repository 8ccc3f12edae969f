"""The template chat, told by decoding: the tokenizer's own chat template, with the mask on the responses alone.

The chat templates are written here in the forms that base models come with, and the texts that are expected too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import (
    CONVERSATIONS,
    KINDS,
    byte_level,
    is_metaspace,
    normalised,
    read_back,
    merges,
    stretches,
    turns_of,
)
from transformers import PreTrainedTokenizerFast

from fedcli.data.conversation import Example, Preference, Turn
from fedcli.data.encoded import EncodedExample
from fedcli.data.encoding import Encoder
from fedcli.errors import ConfigError

CHATML = """
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_WITH_MARKS = """
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else %}
    {%- set loop_messages = messages %}{% set system_message = false %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message != false %}
        {%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_3 = """
{%- for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {%- set content = content + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""

THINKS = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"""
"""A think block in the prompt for generation and in every turn."""

NO_GENERATION_PROMPT = """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}"""
"""Zephyr's, without the end that asks for a response."""

NO_END = """
{%- for message in messages %}
    {{- message['role'] + ': ' + message['content'] + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
"""A response ends with its line."""

THINKS_ONCE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Qwen 3's: a think block in the last turn, dropped once the conversation goes on."""

LAST_QUESTION = """
{%- for message in messages if loop.revindex <= 2 or add_generation_prompt and loop.last %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@dataclass(frozen=True)
class Chat:
    """A chat template, and what it writes of each turn, with what is learnt between [[ and ]]."""

    jinja: str
    user: str
    assistant: str
    system: str = ""
    begin: str = ""
    without_system: str = ""
    end: str = "<|im_end|>"
    strips: bool = False

    def parts(self, turns: Sequence[Turn]) -> list[str]:
        """Return what is not learnt and what is learnt, in turn; what is behind the last response comes last."""
        text = self.begin + (self.without_system if turns[0].role != "system" else "")
        for turn in turns:
            form = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn.role]
            text += form.replace("...", turn.text.strip() if self.strips else turn.text)
        return re.split(r"\[\[|\]\]", text.replace("<</SYS>>\n\n<s>[INST] ", "<</SYS>>\n\n"))


TURN = "<|im_start|>user\n...<|im_end|>\n"
SYSTEM = "<|im_start|>system\n...<|im_end|>\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
CHATS = {
    "chatml": Chat(
        CHATML,
        system=SYSTEM,
        user=TURN,
        assistant="<|im_start|>assistant\n[[...<|im_end|>]]\n",
        without_system="<|im_start|>system\nYou are helpful.<|im_end|>\n",
    ),
    "llama 2": Chat(
        LLAMA_2,
        system="<s>[INST] <<SYS>>\n...\n<</SYS>>\n\n",
        user="<s>[INST] ... [/INST]",
        assistant="[[ ... </s>]]",
        end="</s>",
        strips=True,
    ),
    "llama 3": Chat(
        LLAMA_3,
        begin="<s>",
        system="<|start_header_id|>system<|end_header_id|>\n\n...<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n[[...<|eot_id|>]]",
        end="<|eot_id|>",
        strips=True,
    ),
    "gemma": Chat(GEMMA, begin="<s>", user=TURN, assistant="<|im_start|>model\n[[...<|im_end|>]]\n", strips=True),
    "thinks": Chat(
        THINKS,
        system=SYSTEM,
        user=TURN,
        assistant="<|im_start|>assistant\n<think>\n\n</think>\n\n[[...<|im_end|>]]\n",
    ),
    "no generation prompt": Chat(
        NO_GENERATION_PROMPT,
        system="<|system|>\n...</s>\n",
        user="<|user|>\n...</s>\n",
        assistant="<|assistant|>\n[[...</s>]]\n",
        end="</s>",
    ),
    "no end": Chat(
        NO_END, system="system: ...\n", user="user: ...\n", assistant="assistant:[[ ...</s>]]\n", end="</s>"
    ),
}
NAMES = [name for name in CONVERSATIONS if name != "markers"]
PAIRS = [
    (chat, name)
    for chat in CHATS
    for name in NAMES
    if (CHATS[chat].system or CONVERSATIONS[name][0].role != "system")
    and (name != "50,000 characters" or chat in ("chatml", "llama 3"))
]
TEXTS = [text[:2000] for chat, name in PAIRS for text in CHATS[chat].parts(CONVERSATIONS[name])]


def made(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = KINDS[kind](TEXTS)
    if tokenizer.sep_token:  # BERT's has no start and end, which chat templates write
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def with_chat(tokenizer: PreTrainedTokenizerFast, jinja: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def any_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return made(kind)


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_level(TEXTS)


def one(tokenizer: PreTrainedTokenizerFast, turns: tuple[Turn, ...]) -> EncodedExample:
    encoded = Encoder(tokenizer, "chat").rows([Example(turns)], 10**6)
    assert encoded.left_out == {}
    (example,) = encoded.examples
    return example


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def comparable(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return a text without spaces where a tokenizer puts its own behind every special token."""
    return text.replace(" ", "") if is_metaspace(tokenizer) else text


@pytest.mark.parametrize(("chat", "name"), PAIRS)
def test_what_is_learnt_is_every_response_and_its_end_token(
    any_tokenizer: PreTrainedTokenizerFast, chat: str, name: str
) -> None:
    tokenizer = with_chat(any_tokenizer, CHATS[chat].jinja)
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


@pytest.mark.parametrize("chat", [chat for chat in CHATS if chat != "no end"])
def test_ids_are_the_tokenizers_own_and_the_mask_is_where_the_responses_are(
    any_tokenizer: PreTrainedTokenizerFast, kind: str, chat: str
) -> None:
    tokenizer = with_chat(any_tokenizer, CHATS[chat].jinja)
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
    if "merges" not in kind:
        print(kind, chat, sorted(set(NAMES) - compared))


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_that_of_a_template_with_generation_marks(plain: PreTrainedTokenizerFast, name: str) -> None:
    marked = plain.apply_chat_template(
        messages(CONVERSATIONS[name]), chat_template=CHATML_WITH_MARKS, return_assistant_tokens_mask=True
    )
    row = one(with_chat(plain, CHATML), CONVERSATIONS[name])
    if name == "newlines in front":  # the tokenizer would merge them with the prompt's
        assert plain.decode(row.ids) == plain.decode(marked["input_ids"])
        assert row.num_tokens > len(marked["input_ids"])
        return
    assert row.ids.tolist() == marked["input_ids"]
    assert row.supervised.astype(int).tolist() == marked["assistant_masks"]
