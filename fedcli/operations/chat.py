"""A conversation with models of a federation: one loaded base, whose adapter is the one of whoever answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedcli.algos import Arrays
from fedcli.client.runtimes import Runtimes
from fedcli.errors import ConfigError, UsageError
from fedcli.eval.requests import Generation
from fedcli.observer import Observer
from fedcli.scoring.targets import Target, Targets, find_targets
from fedcli.tasks.conversation import Turn
from fedcli.workspace.baselines import published_baselines
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import update_name
from fedcli.workspace.target_name import TargetName

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime
    from fedcli.eval.local_model import LocalModel

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Answering:
    """How models answer: greedily at temperature 0, else sampled from `seed`."""

    system: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ChatAnswer:
    """What a model answered to a prompt; `target` is its name, as in a table of scores."""

    target: str
    text: str
    num_prompt_tokens: int
    num_tokens: int
    is_cut: bool
    prompt_is_cut: bool


@dataclass(frozen=True)
class _Adapter:
    """The values of who answers."""

    arrays: Arrays
    beside: Mapping[str, Arrays]
    weight: float


@dataclass
class Chat:
    """A conversation with one model, or the same prompts to several, each of which sees its own answers.

    `notes` are what a reader must know of the models.
    """

    targets: Sequence[str]
    answering: Answering
    notes: Sequence[str]
    _adapters: dict[str, "_Adapter"]
    _runtime: "Runtime"
    _model: "LocalModel"
    _turns: dict[str, list[Turn]] = field(default_factory=dict)
    _current: str | None = None

    def ask(self, text: str, on_text: Callable[[str, str], None] = lambda target, piece: None) -> list[ChatAnswer]:
        """Return every model's answer to the next prompt; `on_text` hears a model's name and what is new of its answer.

        The first of that is empty. A prompt whose answer is empty is no part of the conversation. Raises ConfigError
        for a prompt that the template cannot write.
        """
        return [self._ask(target, text, on_text) for target in self.targets]

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns.clear()

    def _ask(self, target: str, text: str, on_text: Callable[[str, str], None]) -> ChatAnswer:
        self._use(target)
        on_text(target, "")
        turns = [*self._turns.get(target, _system(self.answering)), Turn("user", text)]
        how = self.answering
        request = Generation(tuple(turns), how.max_new_tokens, temperature=how.temperature, sample=how.seed)
        answer = self._model.stream(request, lambda piece: on_text(target, piece))
        if answer.text:  # else the template would have to write an empty turn
            self._turns[target] = [*turns, Turn("assistant", answer.text)]
        return ChatAnswer(target, **vars(answer))

    def _use(self, target: str) -> None:
        if self._current != target:
            from fedcli.model.finite import check_answers

            self._current = None
            adapted: Any = self._runtime.adapted
            adapter = self._adapters[target]
            adapted.load(adapter.arrays, adapter.beside, weight=adapter.weight)
            check_answers(adapted.model)
            self._current = target


def open_chat(
    federation: FederationState,
    asked: Targets,
    runtimes: Runtimes,
    *,
    compare: bool = False,
    answering: Answering,
    has_several_turns: bool = True,
    observer: Observer,
) -> Chat:
    """Load the base and the adapters of the models that are asked for: by default the latest round's.

    With `compare` the base, one client alone and a round answer side by side, and whatever else is named. Raises
    UsageError, NotReadyError as `find_targets` for a model that is not there, ConfigError where the federation's
    template cannot write a system turn that is given, or several turns where there may be some.
    """
    targets, notes = _find(federation, asked, compare)
    adapters = {target.name: _values(target) for target in targets}
    train = federation.head.manifest.train
    runtime = runtimes.load(observer=observer)
    encoder = runtime.encoder(train.template)
    _check_template(encoder, answering, has_several_turns)
    from fedcli.eval.local_model import LocalModel

    model = LocalModel(runtime.adapted.model, runtime.adapted.tokenizer, encoder)
    return Chat([target.name for target in targets], answering, notes, adapters, runtime, model)


def _find(federation: FederationState, asked: Targets, compare: bool) -> tuple[list[Target], list[str]]:
    """Return the models, and notes of them."""
    notes = []
    if compare:
        asked = replace(asked, base=True)
        if not (asked.alone or asked.clients):
            alone = _trained_alone(federation)
            asked = replace(asked, alone=alone[:1])
            if not alone:
                notes.append("no client was trained alone: `fedcli train-alone --id N` makes that baseline")
            elif len(alone) > 1:
                notes.append(f"client {alone[0]} answers, of {len(alone)} that were trained alone; --alone N: another")
    if asked == Targets() or (compare and not asked.rounds):
        asked = replace(asked, rounds=("latest",))
    targets = find_targets(federation, asked)
    if len(targets) > 1 and not compare:
        raise UsageError(
            f"{len(targets)} models are named: {', '.join(target.name for target in targets)}",
            hint="Name one, or say --compare to see their answers side by side.",
        )
    is_untrained = federation.config.adapter.init is None
    if is_untrained and any(target.name == update_name(0) for target in targets):
        notes.append("round 0's adapter is not trained yet: it answers as the base does")
    return targets, notes


def _trained_alone(federation: FederationState) -> list[int]:
    names = map(TargetName.parse, published_baselines(federation.workspace))
    return sorted(name.number for name in names if name.kind == "alone" and name.number is not None)


def _values(target: Target) -> _Adapter:
    assert target.arrays is not None  # neither folders, models nor endpoints are asked for
    return _Adapter(target.arrays(), target.beside(), target.weight)


def _system(answering: Answering) -> list[Turn]:
    return [Turn("system", answering.system)] if answering.system else []


def _check_template(encoder: Any, answering: Answering, has_several_turns: bool) -> None:
    """Raise ConfigError where the template cannot write what the conversation will hold."""
    system, question = _system(answering), Turn("user", "question")
    if system:
        hint = "Leave --system out, or put its text into the prompt."
        if unused := _unused(encoder, [*system, question], "a system turn", hint):
            raise ConfigError(f"the federation's template does not write a system turn: {unused[0]}", hint=hint)
    if has_several_turns:
        hint = "Ask one prompt at a time: `fedcli chat PROMPT`."
        _unused(encoder, [*system, question, Turn("assistant", "answer"), question], "a second prompt", hint)


def _unused(encoder: Any, turns: Iterable[Turn], what: str, hint: str) -> list[str]:
    try:
        return sorted(encoder.unused(tuple(turns)))
    except ConfigError as error:
        raise ConfigError(f"the federation's template does not write {what}: {error.message}", hint=hint) from error
