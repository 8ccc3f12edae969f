"""Chat templates in the forms that base models come with, and the texts that they write, written out again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedcli.tasks.conversation import Turn

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
{%- for message in (messages[-1:] if add_generation_prompt else messages[-2:]) %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""What was said before is dropped."""


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
