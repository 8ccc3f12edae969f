"""What a row teaches: the responses of a conversation, or which of two responses to a prompt is better."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    content: str
    input: str = ""
    """What Alpaca's rows give beside an instruction."""
    is_learnt: bool = True
    """Whether an assistant's turn is learnt; other turns never are."""
    reasoning: str = ""
    """The thoughts that an assistant's turn has apart from its content (`reasoning_content`)."""
    tool_calls: str = ""
    """The calls of an assistant's turn, OpenAI's list as JSON."""
    tools: str = ""
    """The tools that the conversation offers, OpenAI's list as JSON; on the first turn alone."""

    @property
    def text(self) -> str:
        """The content, and the input after a space, as OpenFedLLM's code joins them."""
        return f"{self.content} {self.input}" if self.content and self.input else self.content or self.input


Prompt: TypeAlias = tuple[Turn, ...]
"""The turns before a response."""


class Item(ABC):
    """What a row teaches: responses of conversations, and numbers beside them."""

    num_sides: ClassVar[int] = 1
    """The conversations of every such item, which must differ; each is a prompt, the same for all, and a response."""
    last_only: ClassVar[bool] = False
    """Whether the last turn of each conversation alone is learnt, not every response."""
    teaches_response: ClassVar[bool] = True
    """Whether the first conversation's response is always one to imitate."""
    has_response: ClassVar[bool] = True
    """Whether rows have responses; else the model answers by itself."""

    @property
    @abstractmethod
    def conversations(self) -> tuple[tuple[Turn, ...], ...]:
        """The conversations."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """What the loss is told of the row beside likelihoods: a label, a weight; as many numbers for every row."""
        return ()

    @property
    def check(self) -> str:
        """What a reward function compares an answer with; the empty text where answers are not checked."""
        return ""


@dataclass(frozen=True)
class Example(Item):
    """A conversation whose assistant turns are learnt; the last turn is one."""

    turns: tuple[Turn, ...]

    @property
    def conversations(self) -> tuple[tuple[Turn, ...]]:
        return (self.turns,)

    @property
    def prompt(self) -> Prompt:
        """All turns but the last."""
        return self.turns[:-1]

    @property
    def response(self) -> str:
        """The last turn."""
        return self.turns[-1].content


@dataclass(frozen=True)
class Preference(Item):
    """Two responses to one prompt, the better one first."""

    num_sides = 2
    last_only = True

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def conversations(self) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        return (*self.prompt, Turn("assistant", self.chosen)), (*self.prompt, Turn("assistant", self.rejected))


@dataclass(frozen=True)
class Judged(Item):
    """A response to a prompt, and whether it is desirable."""

    last_only = True
    teaches_response = False

    prompt: Prompt
    response: str
    is_desirable: bool

    @property
    def conversations(self) -> tuple[tuple[Turn, ...]]:
        return ((*self.prompt, Turn("assistant", self.response)),)

    @property
    def numbers(self) -> tuple[float]:
        return (float(self.is_desirable),)


@dataclass(frozen=True)
class Question(Item):
    """A prompt that the model answers by itself in training, and what a reward function checks of an answer."""

    last_only = True
    teaches_response = False
    has_response = False

    prompt: Prompt
    answer: str

    @property
    def conversations(self) -> tuple[tuple[Turn, ...]]:
        return ((*self.prompt, Turn("assistant", self.answer)),)

    @property
    def check(self) -> str:
        return self.answer


def instruct(instruction: str, response: str, input: str = "") -> Example:
    """Return the example of one instruction and its response."""
    return Example((Turn("user", instruction, input), Turn("assistant", response)))


def is_text(turns: Sequence[Turn]) -> bool:
    """Return whether a conversation is a text, a response to nothing, which is learnt whole and as it is."""
    return len(turns) == 1 and turns[0].role == "assistant"


def shown(turns: Sequence[Turn]) -> str:
    """Return turns as text for a reader; a single user turn is its bare text."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].text
    return "\n\n".join(f"{turn.role}: {turn.text}" for turn in turns)
