"""Templates: a conversation as pieces of text, learnt or not; nothing is searched for in a row's text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedcli.config import CustomTemplate, TemplateChoice, TemplateName
from fedcli.data.conversation import Turn
from fedcli.errors import ConfigError

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
"""Stanford Alpaca's own form."""

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


class Template(Protocol):
    """How a conversation becomes text."""

    parses_special: bool
    """Whether special tokens are written in the text, as a tokenizer's own chat template does."""
    end_id: int | None
    """The token that ends a response; None: the tokenizer's end of sequence."""

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Return a conversation's pieces; where its last turn is no response, the last piece asks for one.

        Raises ValueError for turns that the template cannot write.
        """


class TurnTemplate:
    """A template that writes each turn in its own form, the end token after every response."""

    parses_special = False
    end_id: int | None = None

    def __init__(self, form: CustomTemplate) -> None:
        self._form = form

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Return a conversation's pieces."""
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
    learnt from a probe; of what follows the content, the first special token ends the response.
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
        self._header = before
        self._end = next((after[: match.end()] for match in self._special.finditer(after)), None)
        self._rest = after[len(self._end or "") :]
        self.end_id = None
        if self._end is not None:
            ids = tokenizer(self._end, add_special_tokens=False)["input_ids"]
            self.end_id = int(ids[-1])

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Return a conversation's pieces; raise ValueError where the template rewrites or refuses a turn."""
        if any(self._special.search(turn.text) for turn in turns):
            raise ValueError("a special token is spelt out in the text")
        pieces = []
        rendered = ""
        for position, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:position], rendered)
            added = self._added(turns[: position + 1])
            content = next((text for text in (turn.content, turn.content.strip()) if self._is_written(added, text)), "")
            if not content:
                raise ValueError("the chat template does not write a response as it is given")
            pieces.append(Segment(prompt[len(rendered) :] + self._header))
            pieces.append(Segment(content + (self._end or ""), is_supervised=True, ends=self._end is None))
            rest = added[len(self._header + content + (self._end or "")) :]
            if rest:
                pieces.append(Segment(rest))
            rendered = prompt + added
        if not turns or turns[-1].role != "assistant":
            pieces.append(Segment(self._render(turns, rendered)[len(rendered) :] + self._header))
        return pieces

    def _is_written(self, added: str, content: str) -> bool:
        return added.startswith(self._header + content + (self._end or ""))

    def _added(self, turns: Sequence[Turn]) -> str:
        """Return what a last, assistant, turn adds behind the prompt."""
        prompt = self._render(turns[:-1], "")
        whole = self._apply(turns, asks=False)
        if not whole.startswith(prompt):
            raise ValueError("the chat template writes a prompt differently once its response is there")
        return whole[len(prompt) :]

    def _render(self, turns: Sequence[Turn], known: str) -> str:
        """Return the text that asks for a response; it must go on from the text that is known already."""
        text = self._apply(turns, asks=True)
        if not text.startswith(known):
            raise ValueError("the chat template rewrites earlier turns")
        return text

    def _apply(self, turns: Sequence[Turn], *, asks: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return str(text)


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
