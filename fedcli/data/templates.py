"""Templates: a conversation as pieces of text, learnt or not; nothing is searched for in a row's text."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from fedcli.config import CustomTemplate, TemplateChoice, TemplateName
from fedcli.errors import ConfigError
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

TURN_TEMPLATES: dict[TemplateName, CustomTemplate] = {"alpaca": ALPACA, "alpaca-input": ALPACA_INPUT, "vicuna": VICUNA}


@dataclass(frozen=True)
class Segment:
    """A piece of text; the end token follows where `ends` is set, and is learnt as the text is."""

    text: str
    is_supervised: bool = False
    ends: bool = False


class TurnTemplate:
    """A template that writes each turn in its own form, the end token after every response."""

    parses_special = False
    """Whether special tokens are written in the text, as a tokenizer's own chat template does."""
    end_id: int | None = None
    """The token that ends a response; None: the tokenizer's end of sequence."""

    def __init__(self, form: CustomTemplate) -> None:
        self._form = form

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Return a conversation's pieces; where its last turn is no response, the last piece asks for one."""
        form = self._form
        pieces = []
        text = ""
        if not turns or turns[0].role != "system":
            system = form.default_system
            if form.default_system_with_input is not None and any(turn.input for turn in turns):
                system = form.default_system_with_input
            text = _filled(form.system, {"system": system}) if system else ""
        for turn in turns:
            if turn.role == "system":
                text += _filled(form.system, {"system": turn.content})
            elif turn.role == "user" and turn.input and form.user_with_input is not None:
                text += _filled(form.user_with_input, {"instruction": turn.content, "input": turn.input})
            elif turn.role == "user":
                text += _filled(form.user, {"instruction": turn.text})
            else:
                pieces.append(Segment(text + form.assistant))
                pieces.append(Segment(form.separator + turn.content, is_supervised=True, ends=True))
                text = ""
        if text:
            pieces.append(Segment(text + form.assistant))
        return pieces


class ChatTemplate:
    """The tokenizer's own chat template.

    Pieces are what each turn adds to the rendered text. The constant text before and after a response's content is
    learnt from a probe; of what follows the content, the first special token ends the response. A template that
    rewrites earlier turns (drops their thoughts, say) cannot be followed: of such a conversation the last response
    alone is learnt.
    """

    parses_special = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.template is chat, and the base model's tokenizer has no chat template",
                hint="Use alpaca, alpaca-input or vicuna, or write a template of your own under data.template.",
            )
        self._special = _special_texts(tokenizer)
        probe = (Turn("user", "question"), Turn("assistant", "fedcliprobe"))
        try:
            before, after = self._added(probe).split("fedcliprobe")
        except ValueError as error:
            raise ConfigError(
                f"data.template is chat, and the tokenizer's chat template cannot be followed: {error}",
                hint="Use another template: this one does not write a response as it is given, behind its prompt.",
            ) from error
        self._header = before.rstrip(" ")
        self._lead = before[len(self._header) :]  # a space belongs to the token that follows it
        self._end = next((after[: match.end()] for match in self._special.finditer(after)), None)
        self.end_id: int | None = None
        if self._end is not None:
            ids = tokenizer(self._end, add_special_tokens=False)["input_ids"]
            self.end_id = int(ids[-1])

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Return what TurnTemplate does; raise ValueError for turns that the template cannot write."""
        if any(self._special.search(turn.text) for turn in turns):
            raise ValueError("a special token is spelt out in the text")
        responses = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
        last = [position for position in responses if position == len(turns) - 1]
        pieces = self._followed(turns, responses) or self._followed(turns, last)
        assert pieces is not None  # one response cannot be rewritten by a later one
        return pieces

    def _followed(self, turns: Sequence[Turn], responses: Sequence[int]) -> list[Segment] | None:
        """Return the pieces with the named responses learnt; None where the template rewrites one of them later."""
        pieces = []
        known, rest = "", ""
        for position in responses:
            prompt = self._render(turns[:position], asks=True)
            if not prompt.startswith(known):
                return None
            added = self._added(turns[: position + 1])
            response = self._written(added, turns[position].content)
            pieces.append(Segment(rest + prompt[len(known) :] + self._header))
            pieces.append(Segment(response, is_supervised=True, ends=self._end is None))
            rest = added[len(self._header + response) :]
            known = prompt + added
        if not turns or turns[-1].role != "assistant":
            prompt = self._render(turns, asks=True)
            if not prompt.startswith(known):
                return None
            pieces.append(Segment(rest + prompt[len(known) :] + self._header))
        elif rest:
            pieces.append(Segment(rest))
        return pieces

    def _written(self, added: str, content: str) -> str:
        """Return a response as the template writes it, with what ends it; it may strip white space."""
        for text in (content, content.strip()):
            response = self._lead + text + (self._end or "")
            if text and added.startswith(self._header + response):
                return response
        raise ValueError("the chat template does not write a response as it is given")

    def _added(self, turns: Sequence[Turn]) -> str:
        """Return what a last, assistant, turn adds behind the prompt."""
        prompt, whole = self._render(turns[:-1], asks=True), self._render(turns, asks=False)
        if not whole.startswith(prompt):
            raise ValueError("the chat template writes a prompt differently once its response is there")
        return whole[len(prompt) :]

    def _render(self, turns: Sequence[Turn], *, asks: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # a template is a program of the model's publisher: it may raise anything
            raise ValueError(f"the chat template refuses it: {error}") from error
        return str(text)


Template: TypeAlias = TurnTemplate | ChatTemplate


def find_template(template: TemplateChoice, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Return a template by its name, or from its form; raise ConfigError where the tokenizer has none of its own."""
    if isinstance(template, CustomTemplate):
        return TurnTemplate(template)
    return ChatTemplate(tokenizer) if template == "chat" else TurnTemplate(TURN_TEMPLATES[template])


def alpaca(instruction: str) -> str:
    """Return the alpaca prompt of an instruction; the response follows it after one space."""
    (segment,) = TurnTemplate(ALPACA).segments([Turn("user", instruction)])
    return segment.text


def _filled(form: str, values: Mapping[str, str]) -> str:
    """Put values into {names}, in one pass: a value that spells {input} stays as it is."""
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in values), lambda found: values[found[0][1:-1]], form)


def _special_texts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


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
