"""Templates: a conversation as pieces of text, learnt or not; nothing is searched for in a row's text."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from fedcli.config import CustomTemplate, TemplateChoice, TemplateName
from fedcli.data.chat_template import ChatTemplate
from fedcli.data.segments import NO_CALLS, NO_THOUGHTS, NO_TOOLS, Segment, learns
from fedcli.tasks.conversation import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = CustomTemplate(
    default_system="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    system="{system}\n\n",
    user="### Instruction:\n{instruction}\n\n",
    assistant="### Response:",
)
"""OpenFedLLM's alpaca template: instruction and input joined by a space, no "### Input:"."""

ALPACA_INPUT = ALPACA.model_copy(
    update={
        "default_system_with_input": "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the request.",
        "user_with_input": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
    }
)
"""Stanford Alpaca's form, but for the space that a response begins with."""

VICUNA = CustomTemplate(
    default_system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system="{system} ",
    user="USER: {instruction} ",
    assistant="ASSISTANT:",
)
"""FastChat's vicuna v1.1."""

TEXT = CustomTemplate(user="{instruction}", assistant="", separator="")
"""A text as it is, the end token behind it."""

TURN_TEMPLATES: dict[TemplateName, CustomTemplate] = {"alpaca": ALPACA, "alpaca-input": ALPACA_INPUT, "vicuna": VICUNA}


class TurnTemplate:
    """A template that writes each turn in its own form, the end token after every response."""

    parses_special = False
    """Whether special tokens are written in the text, as a tokenizer's own chat template does."""
    end_id: int | None = None
    """The token that ends a response; None: the tokenizer's end of sequence."""
    date: str | None = None
    """The date that is written, where one is."""

    def __init__(self, form: CustomTemplate) -> None:
        self._form = form

    def has_thoughts(self, turns: Sequence[Turn]) -> bool:
        """Return whether the last turn's thoughts are written in a form of their own: never."""
        return False

    def segments(
        self,
        turns: Sequence[Turn],
        *,
        last_only: bool = False,
        with_thoughts: bool = False,
        notes: set[str] | None = None,
    ) -> list[Segment]:
        """Return a conversation's pieces; where its last turn is no response, the last piece asks for one.

        With `last_only` only the last turn is learnt. `notes` gets what of the conversation is not used. Raises
        ValueError for turns that the template has no form for.
        """
        form = self._form
        notes = set() if notes is None else notes
        _note_unused(turns, notes)
        pieces = []
        text = ""
        if not turns or turns[0].role != "system":
            system = form.default_system
            if form.default_system_with_input is not None and any(turn.input for turn in turns):
                system = form.default_system_with_input
            text = _filled(form.system, {"system": system}) if system else ""
        for position, turn in enumerate(turns):
            if turn.role == "tool":
                raise ValueError("the template has no form for a tool's turn")
            if turn.role == "system":
                text += _filled(form.system, {"system": turn.content})
            elif turn.role == "user" and turn.input and form.user_with_input is not None:
                text += _filled(form.user_with_input, {"instruction": turn.content, "input": turn.input})
            elif turn.role == "user":
                text += _filled(form.user, {"instruction": turn.text})
            else:
                if turn.tool_calls and not turn.content.strip():
                    raise ValueError("the template has no form for a tool's call")
                pieces.append(Segment(text + form.assistant))
                is_learnt = learns(turns, position, last_only)
                pieces.append(Segment(form.separator + turn.content, is_supervised=is_learnt, ends=True))
                text = ""
        if text:
            pieces.append(Segment(text + form.assistant))
        return pieces


Template: TypeAlias = TurnTemplate | ChatTemplate


def find_template(
    template: TemplateChoice, tokenizer: "PreTrainedTokenizerBase", *, date: str | None = None
) -> Template:
    """Return a template by its name, or from its form; raise ConfigError where the tokenizer has none of its own.

    `date`, as 2026-11-29, is what a chat template writes that asks for the day; None: today.
    """
    if isinstance(template, CustomTemplate):
        return TurnTemplate(template)
    return ChatTemplate(tokenizer, date=date) if template == "chat" else TurnTemplate(TURN_TEMPLATES[template])


def alpaca(instruction: str) -> str:
    """Return the alpaca prompt of an instruction; the response follows it after one space."""
    (segment,) = TurnTemplate(ALPACA).segments([Turn("user", instruction)])
    return segment.text


def _note_unused(turns: Sequence[Turn], notes: set[str]) -> None:
    keys = {"tools": NO_TOOLS, "tool_calls": NO_CALLS, "reasoning": NO_THOUGHTS}
    notes |= {note for key, note in keys.items() if any(getattr(turn, key) for turn in turns)}


def _filled(form: str, values: Mapping[str, str]) -> str:
    """Put values into {names}, in one pass: a value that spells {input} stays as it is."""
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in values), lambda found: values[found[0][1:-1]], form)


def as_chat_template(form: CustomTemplate, *, start: str) -> str:
    """Return a template of turns as a tokenizer's chat template, in Jinja, with the start token's text in front.

    It writes the prompts that a model was trained on; the input of an instruction is part of the user's turn.
    """

    literal = partial(json.dumps, ensure_ascii=False)

    def around_content(text: str, name: str) -> str:
        return " + message['content'] + ".join(map(literal, text.split(f"{{{name}}}")))

    system, user = around_content(form.system, "system"), around_content(form.user, "instruction")
    default = literal(_filled(form.system, {"system": form.default_system}) if form.default_system else "")
    asks, separator = literal(form.assistant), literal(form.separator)
    return (
        f"{{{{- {literal(start)} }}}}"
        f"{{%- if not messages or messages[0]['role'] != 'system' %}}{{{{- {default} }}}}{{%- endif %}}"
        "{%- for message in messages %}"
        f"{{%- if message['role'] == 'system' %}}{{{{- {system} }}}}"
        f"{{%- elif message['role'] == 'user' %}}{{{{- {user} }}}}"
        f"{{%- else %}}{{{{- {asks} + {separator} + message['content'] + eos_token }}}}{{%- endif %}}"
        "{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {asks} }}}}{{%- endif %}}"
    )
