"""A tokenizer's own chat template, followed response by response."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from fedcli.data.segments import (
    EARLIER,
    NO_CALLS,
    NO_END,
    NO_SYSTEM,
    NO_TEXT,
    NO_THOUGHTS,
    NO_TOOLS,
    Segment,
    learns,
)
from fedcli.data.template_errors import describe_template_error, is_broken_template
from fedcli.data.template_limits import limited
from fedcli.errors import ConfigError, FedError
from fedcli.tasks.conversation import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "fedcliprobe"
_THOUGHT = "fedclithought"
_ANSWER = Turn("assistant", _PROBE)
_IN_CONTENT = Turn("assistant", f"<think>\n{_THOUGHT}\n</think>\n\n{_PROBE}")
_APART = Turn("assistant", _PROBE, reasoning=_THOUGHT)
_AS_GIVEN = "the chat template does not write a response as it is given"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVDeFhklnrRsTt"
_FIXED_DATE = """
{%- macro strftime_now(format) -%}
    {%- set fedcli = namespace(text=format) -%}
    {%- for directive, text in fedcli_date -%}
        {%- set fedcli.text = fedcli.text | replace(directive, text) -%}
    {%- endfor -%}
    {{- fedcli.text -}}
{%- endmacro -%}{{ "" }}"""
"""Put in front of a template, it hides the clock of transformers' strftime_now behind the federation's date."""


@dataclass(frozen=True)
class _Response:
    """The last turn of a conversation: what is before it, what is learnt, and what is behind that."""

    prompt: str
    text: str
    tail: str
    is_rewritten: bool = False
    """Whether the template drops part of the turn once the conversation goes on."""


class ChatTemplate:
    """The tokenizer's own chat template.

    What a response adds is found by putting another, a probe, into its place: the constant text before and behind the
    probe is the prompt's and the end's. What follows the response up to its end token is learnt with it; what the
    template writes in front of every answer (an empty think block) is part of the prompt. Where thoughts or tool calls
    stand in that place, all behind the generation prompt is learnt. A response that the whole conversation has in
    another form (its thoughts are dropped, say) is not learnt. A template's own {% generation %} marks come first,
    where they hold responses with their ends.
    """

    parses_special = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, date: str | None = None) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.template is chat, and the base model's tokenizer has no chat template",
                hint="Use alpaca, alpaca-input or vicuna, or write a template of your own under data.template.",
            )
        source = str(tokenizer.chat_template)
        self.date = (date or today()) if asks_for_date(tokenizer) else None
        self._dates = _directives(self.date) if self.date else []
        self._has_marks = _MARKS.search(source) is not None
        self._parses_thoughts = "</think>" in source
        self._special = _special_texts(tokenizer)
        self._in_parts = False
        asked = (Turn("user", "question"), _ANSWER)
        try:
            tail = self._probed(asked)
        except ValueError as error:
            self._in_parts = True  # vision templates read lists of parts alone
            try:
                tail = self._probed(asked)
            except ValueError:
                hint = "Use another template: this one does not write a response as it is given."
                if is_broken_template(error.__cause__):
                    hint = "Mend the base's chat_template.jinja (or tokenizer_config.json), or use another template."
                raise ConfigError(
                    f"data.template is chat, and the tokenizer's chat template cannot be followed: {error}", hint=hint
                ) from error
        self._end, self._middle_end = self._ends(asked, tail)
        self._moves_thoughts = self._doubles_thoughts(asked[:1])
        self._writes_system = self._writes(Turn("system", _PROBE), *asked[:1], Turn("assistant", "answer"))
        self.end_id: int | None = None
        if self._end is not None:
            ids = tokenizer(self._end, add_special_tokens=False)["input_ids"]
            self.end_id = int(ids[-1])

    def has_thoughts(self, turns: Sequence[Turn]) -> bool:
        """Return whether the last turn has thoughts, which are written in a form of their own."""
        return bool(turns) and turns[-1].role == "assistant" and bool(self._thoughts(turns[-1])[0])

    def segments(
        self,
        turns: Sequence[Turn],
        *,
        last_only: bool = False,
        with_thoughts: bool = False,
        notes: set[str] | None = None,
    ) -> list[Segment]:
        """Return what TurnTemplate does; raise ValueError for turns that the template cannot write.

        With `with_thoughts` the last response begins where thoughts would, even if it has none.
        """
        notes = set() if notes is None else notes
        self._refuse_special(turns)
        turns = self._used(turns, notes)
        asks = not turns or turns[-1].role != "assistant"
        whole = (*turns, _ANSWER) if asks else turns
        last = len(whole) - 1
        if self._has_marks and (marked := self._marked(whole, asks, last_only, notes)):
            return marked
        text = self._render(whole)
        pieces, done = list[Segment](), 0
        for position, turn in enumerate(whole):
            if turn.role != "assistant":
                continue
            is_last = position == last
            written = text if is_last else None
            found = self._response(whole[: position + 1], written, with_thoughts and is_last, notes)
            if is_last:
                if not found.prompt.startswith(text[:done]):
                    pieces, done = [], 0
                    notes.add(EARLIER)
                text = found.prompt + found.text + found.tail
            elif turn.tool_calls and not text.startswith(found.prompt + found.text):
                # an empty think block is dropped once the conversation goes on; the call is the same without it
                found = replace(found, prompt=self._before_thoughts(whole[:position], found.prompt, _IN_CONTENT))
            start, end = len(found.prompt), len(found.prompt + found.text)
            is_learnt = learns(whole, position, last_only)
            if not is_last and (found.is_rewritten or not text.startswith(found.prompt + found.text)):
                if is_learnt:
                    notes.add(EARLIER)
                continue
            pieces.append(Segment(text[done:start]))
            done = start
            if asks and is_last:
                return pieces
            ends = (self._end, self._middle_end) if is_last else (self._middle_end, self._end)
            ending = next((one for one in ends if one and text.startswith(one, end)), "")
            done = end + len(ending)
            if is_learnt and self._end is not None and not (ending or self._is_ended(found.text)):
                notes.add(NO_END)
            pieces.append(Segment(text[start:done], is_supervised=is_learnt, ends=self._end is None))
        if done < len(text):
            pieces.append(Segment(text[done:]))
        return pieces

    def _response(self, turns: Sequence[Turn], whole: str | None, with_thoughts: bool, notes: set[str]) -> _Response:
        """Find the last turn in the conversation that ends with it, `whole` where that is rendered already."""
        *before, turn = turns
        if not before:
            self._render(before)  # which is refused: a response needs a prompt
        whole = self._render(turns) if whole is None else whole
        prompt, found, tail = self._render((*before, _ANSWER)).rpartition(_PROBE)
        if not found:
            raise ValueError(_AS_GIVEN)
        if prompt.endswith(" "):  # a space of the turn belongs to the token that follows it, one of the prompt to that
            kept = len(_common(prompt, self._render(before, asks=True)))
            prompt = prompt[:kept] + prompt[kept:].rstrip(" ")
        thoughts, answer = self._thoughts(turn)
        fits = whole.startswith(prompt) and whole.endswith(tail) and len(prompt + tail) <= len(whole)
        if not (thoughts or turn.tool_calls or with_thoughts):
            written = whole[len(prompt) : len(whole) - len(tail)]
            is_blank = not answer.strip() and (not answer or answer not in written)
            if not fits or is_blank or written.strip() != answer.strip():
                raise ValueError(_AS_GIVEN)
            return _Response(prompt, written, tail)
        if thoughts and fits and whole[len(prompt) : len(whole) - len(tail)].strip() == answer.strip():
            return self._without_thoughts(turns, prompt, whole, tail, with_thoughts, notes)
        if with_thoughts or not fits:
            prompt = self._before_thoughts(before, prompt, _APART if turn.reasoning else _IN_CONTENT)
            if not whole.startswith(prompt):
                raise ValueError(_AS_GIVEN)
        written = whole[len(prompt) :]
        if written.endswith(tail):
            written = written[: len(written) - len(tail)]
        else:  # a call has an end of its own
            stops = [match.end() for match in self._special.finditer(written) if not written[match.end() :].strip()]
            stop = stops[0] if stops else len(written)
            written, tail = written[:stop], written[stop:]
        names = _names_of_calls(turn)
        has_calls, has_answer = all(name in written for name in names), answer.strip() in written
        if names and not has_calls and not answer.strip():
            raise ValueError("the chat template does not write a tool's call")
        if not written.strip() or not (has_answer or (names and has_calls)):
            raise ValueError(_AS_GIVEN)
        unused = {NO_THOUGHTS: thoughts.strip() not in written, NO_CALLS: not has_calls, NO_TEXT: not has_answer}
        notes.update(note for note, is_so in unused.items() if is_so)
        return _Response(prompt, written, tail)

    def _without_thoughts(
        self, turns: Sequence[Turn], prompt: str, whole: str, tail: str, with_thoughts: bool, notes: set[str]
    ) -> _Response:
        """Return a response whose thoughts its template drops; they are put back where its prompt asks for them."""
        asked = self._render(turns[:-1], asks=True)
        turn = turns[-1]
        written = whole[len(prompt) : len(whole) - len(tail)]
        if not asked.rstrip().endswith("<think>") or not asked.startswith(prompt):
            if self._thoughts(turn)[0].strip():
                notes.add(NO_THOUGHTS)
            return _Response(prompt, written, tail)
        if turn.reasoning:
            text = f"{turn.reasoning.strip()}\n</think>\n\n{turn.content}"
        else:
            text = turn.content.lstrip().removeprefix("<think>")
            text = text.removeprefix("\n") if asked.endswith("\n") else text
        if with_thoughts:
            return _Response(prompt, asked[len(prompt) :] + text, tail, is_rewritten=True)
        return _Response(asked, text, tail, is_rewritten=True)

    def _before_thoughts(self, before: Sequence[Turn], prompt: str, thinking: Turn) -> str:
        """Return what stands before a response whether it thinks or not, and is no more than the generation prompt."""
        prompts = [prompt, self._render(before, asks=True)]
        start, found, _ = self._render((*before, thinking)).rpartition(_THOUGHT)
        return _common(*prompts, *([start] if found else []))

    def _marked(self, turns: Sequence[Turn], asks: bool, last_only: bool, notes: set[str]) -> list[Segment] | None:
        """Return the pieces by the template's own marks; None where those miss a response, its thoughts or its end."""
        text, spans = self._marked_text(turns)
        pieces, done, first, missed = list[Segment](), 0, 0, set[str]()
        last = len(turns) - 1
        for position, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            # with the turn behind it, for some templates mark an end of the whole conversation too
            following = position + (2 if position < last and turns[position + 1].role != "assistant" else 1)
            behind = len(self._marked_text(turns[:following])[1])
            own, first = spans[first:behind], behind
            learnt = "".join(text[start:end] for start, end in own)
            if not self._is_whole(turn, learnt):
                return None
            if asks and position == last:
                asked = self._render(turns[:-1], asks=True)
                prompt = asked if text.startswith(asked) else text[: own[0][0]]
                return [*pieces, Segment(prompt[done:])]
            thoughts, answer = (part.strip() for part in self._thoughts(turn))
            is_learnt = learns(turns, position, last_only)
            if thoughts not in learnt and position == last and self._asks_for_thoughts(turns[:-1]):
                return None
            if thoughts not in learnt:
                missed.add(NO_THOUGHTS if position == last else EARLIER)
                is_learnt = is_learnt and position == last
            if answer not in learnt:
                missed.add(NO_TEXT)
            if not all(name in learnt for name in _names_of_calls(turn)):
                missed.add(NO_CALLS)
            for start, end in own:
                pieces += [Segment(text[done:start]), Segment(text[start:end], is_learnt)]
                done = end
        notes |= missed
        return [*pieces, Segment(text[done:])] if done < len(text) else pieces

    def _is_whole(self, turn: Turn, learnt: str) -> bool:
        """Return whether what is marked holds a response, or its calls, and an end behind it."""
        names, answer, marked = _names_of_calls(turn), self._thoughts(turn)[1].strip(), learnt.rstrip()
        has_calls = bool(names) and all(name in learnt for name in names)
        has_answer = bool(answer) and answer in learnt
        ends = any(end and end.strip() in marked for end in (self._end, self._middle_end))
        return (ends or self._is_ended(marked)) and (has_calls or has_answer)

    def _is_ended(self, text: str) -> bool:
        return any(match.end() == len(text) for match in self._special.finditer(text))

    def _asks_for_thoughts(self, before: Sequence[Turn]) -> bool:
        return self._render(before, asks=True).rstrip().endswith("<think>")

    def _thoughts(self, turn: Turn) -> tuple[str, str]:
        """Return a response's thoughts, if it has any that the template looks for, and the rest of it."""
        if turn.reasoning.strip():
            return turn.reasoning, turn.content
        if turn.role == "assistant" and self._parses_thoughts and (found := _THOUGHTS.fullmatch(turn.text)):
            return found[1], found[2]
        return "", turn.text

    def _doubles_thoughts(self, before: Sequence[Turn]) -> bool:
        """Return whether an empty think block would stand before thoughts in the text, which are read apart from it."""
        try:
            plain, inside = (self._render((*before, turn)) for turn in (_ANSWER, _IN_CONTENT))
            apart = self._render((*before, _APART))
        except ValueError:
            return False
        prompt, _, tail = plain.rpartition(_PROBE)
        return "</think>" in prompt and _THOUGHT in apart and inside == prompt + _IN_CONTENT.content + tail

    def _refuse_special(self, turns: Sequence[Turn]) -> None:
        """Raise ValueError where a row's text would become a special token, the template's own think tags excepted."""
        texts = [text for turn in turns for text in (*self._thoughts(turn), turn.tools, turn.tool_calls)]
        texts += [str(json.loads(text)) for turn in turns for text in (turn.tools, turn.tool_calls) if text]
        if any(self._special.search(text) for text in texts):
            raise ValueError("a special token is spelt out in the text")

    def _used(self, turns: Sequence[Turn], notes: set[str]) -> tuple[Turn, ...]:
        """Return the turns as the template uses them; raise ValueError where it has no form for a tool's turn."""
        turns = tuple(turns)
        if not self._writes_system and any(turn.role == "system" and turn.content.strip() for turn in turns):
            notes.add(NO_SYSTEM)
        if self._moves_thoughts:
            parts = [(turn, *self._thoughts(turn)) for turn in turns]
            turns = tuple(
                replace(turn, reasoning=thoughts.strip("\n"), content=answer.lstrip("\n")) if thoughts else turn
                for turn, thoughts, answer in parts
            )
        for position, turn in enumerate(turns):
            if turn.role == "tool":
                other = (*turns[:position], replace(turn, content=_PROBE), *turns[position + 1 :])
                if _PROBE not in self._render(other):
                    raise ValueError("the chat template does not write a tool's turn")
        if turns and turns[0].tools and not self._uses_tools(turns):
            notes.add(NO_TOOLS)
            turns = _without_tools(turns)
        return turns

    def _uses_tools(self, turns: Sequence[Turn]) -> bool:
        without = self._render(_without_tools(turns))
        try:
            return self._render(turns) != without
        except ValueError:  # of tools that lack what the template reads of them
            return False

    def _probed(self, asked: Sequence[Turn]) -> str:
        """Return what stands behind the answer; raise ValueError where that is not written as it is given."""
        self._render(asked[:-1], asks=True)
        parts = self._render(asked).split(_PROBE)
        if len(parts) != 2:
            raise ValueError(f"a response is written {len(parts) - 1} times as it is given, not once")
        return parts[1]

    def _writes(self, *turns: Turn) -> bool:
        """Return whether a probe among the turns is written; of turns that are refused the reason is told later."""
        try:
            return _PROBE in self._render(turns)
        except ValueError:
            return True

    def _ends(self, asked: Sequence[Turn], tail: str) -> tuple[str | None, str | None]:
        """Return what ends the last response, and what ends those before it; None where no special token does."""
        end = next((tail[: match.end()] for match in self._special.finditer(tail)), None)
        try:
            more = (*asked, Turn("user", "again"))
            behind = [self._render(more, asks=True), self._render(more[:2], asks=True)]
            behind = [text.rpartition(_PROBE)[2] for text in behind]
        except ValueError:
            return end, end
        middle = behind[0]
        if end is not None and middle.startswith(end):  # tokens that follow at once, whatever comes next, belong to it
            same = _common(tail, middle)
            while (match := self._special.match(same, len(end))) is not None:
                end = same[: match.end()]
            return end, end
        same = _common(*behind)
        return end, next((same[: match.end()] for match in self._special.finditer(same)), None)

    def _render(self, turns: Sequence[Turn], *, asks: bool = False) -> str:
        render = partial(self._apply, turns, self._tokenizer.apply_chat_template, tokenize=False, asks=asks)
        try:
            return str(limited(self._tokenizer, render))
        except FedError:
            raise
        except Exception as error:  # a template is a program of the model's publisher: it may raise anything
            raise ValueError(f"the chat template refuses it: {describe_template_error(error)}") from error

    def _marked_text(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered conversation and the spans of its {% generation %} blocks, as characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: list[dict[str, Any]], **options: Any) -> Any:
            source = self._tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
            options = {**self._tokenizer.special_tokens_map, **options}
            return render_jinja_template(
                conversations=[messages], chat_template=source, return_assistant_tokens_mask=True, **options
            )

        try:
            (text,), (spans,) = limited(self._tokenizer, partial(self._apply, turns, render))
        except FedError:
            raise
        except Exception as error:
            raise ValueError(f"the chat template refuses it: {describe_template_error(error)}") from error
        return text, [(start, end) for start, end in spans if start < end]

    def _apply(self, turns: Sequence[Turn], render: Any, *, asks: bool = False, **options: Any) -> Any:
        """Render; calls have their arguments as a mapping, or else, where the template fails on that, as JSON."""
        if turns and turns[0].tools:
            options["tools"] = json.loads(turns[0].tools)
        if self.date is not None:
            source = self._tokenizer.get_chat_template(None, options.get("tools"))
            options |= {"chat_template": _FIXED_DATE + source, "fedcli_date": self._dates}
        try:
            return render([self._message(turn) for turn in turns], add_generation_prompt=asks, **options)
        except Exception:
            if not any(turn.tool_calls for turn in turns):
                raise
        messages = [self._message(turn, as_json=True) for turn in turns]
        return render(messages, add_generation_prompt=asks, **options)

    def _message(self, turn: Turn, *, as_json: bool = False) -> dict[str, Any]:
        text: Any = [{"type": "text", "text": turn.text}] if self._in_parts else turn.text
        message = {"role": turn.role, "content": text}
        if turn.reasoning.strip():
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = [_call(call, as_json) for call in json.loads(turn.tool_calls)]
        return message


def asks_for_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the tokenizer's chat template writes the day, as Llama 3.2's and gpt-oss's do."""
    return "strftime_now" in str(tokenizer.chat_template)


def today() -> str:
    """Return the day by this machine's clock, as 2026-11-29."""
    return datetime.now().astimezone().date().isoformat()


def _common(*texts: str) -> str:
    """Return what all texts begin with."""
    first, last = min(texts), max(texts)
    differs = (position for position, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differs, len(first))]


def _without_tools(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(replace(turn, tools="") for turn in turns)


def _call(call: Any, as_json: bool) -> Any:
    """Return a call with its arguments as a mapping, or as JSON."""
    inner = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping):
        return call
    arguments = inner.get("arguments", {})
    if as_json and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not as_json:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    return {"type": "function", **call, "function": {**inner, "arguments": arguments}}


def _names_of_calls(turn: Turn) -> list[str]:
    calls = json.loads(turn.tool_calls) if turn.tool_calls else []
    return [str(call.get("function", call).get("name", "")) for call in calls if isinstance(call, Mapping)]


def _directives(day: str) -> list[tuple[str, str]]:
    """Return what strftime makes of each directive at the start of a day, glibc's forms without padding first."""
    start = datetime.combine(date.fromisoformat(day), datetime.min.time())
    wanted = [f"%-{letter}" for letter in "dmyHIMSj"] + [f"%{letter}" for letter in dict.fromkeys(_DIRECTIVES)]
    return [(directive, start.strftime(directive)) for directive in wanted]


def _special_texts(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
