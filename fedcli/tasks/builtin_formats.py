"""The formats that fedcli knows; a new one is a function and an entry of EXAMPLES or PREFERENCES (CONTRIBUTING.md)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedcli.tasks.conversation import Example, Preference, Prompt, Role, Turn, instruct
from fedcli.tasks.format import (
    EQUAL,
    MALFORMED,
    NOT_LEARNT,
    SHAREGPT,
    UNANSWERED,
    Context,
    Fields,
    Format,
    LeftOut,
    is_finite,
    is_given,
    opened,
    prompt_of,
    text,
    turns_of,
)

FORKED = "the dialogues fork before their last turn"
UNSCORED = "fewer than two scores"
TIED = "all scores tie"

NOT_READY = "tree not ready for export"
CALLS = "a response that calls tools"

CONTRADICTION = "prompt that is not the dialogues', not used"
PAIR_THOUGHTS = "thoughts of a pair's responses, not used"
OTHER_REPLIES = "replies that are not ranked best, not used"
BEST_TIED = "best score tied, one of the best taken at random"
COMPLETION_UNSCORED = "completions without a score, not used"


def _alpaca(fields: Fields, context: Context) -> Example:
    """Alpaca, Alpaca-GPT4, CodeAlpaca, FinGPT: instruction, input (may be absent or empty) and output.

    LLaMA-Factory's rows have a system prompt too, and a history of earlier questions and answers.
    """
    extra = text(fields, "input") if fields.get("input") is not None else ""
    example = instruct(text(fields, "instruction"), text(fields, "output"), extra)
    earlier: list[Turn] = []
    if is_given(history := fields.get("history")):
        if isinstance(history, list) and all(map(_is_pair, history)):
            earlier = [turn for question, answer in history for turn in instruct(question, answer).turns]
        else:
            context.unused.add("history")
    return Example(opened((*earlier, *example.turns), fields, context))


def _is_pair(said: object) -> bool:
    return isinstance(said, list | tuple) and len(said) == 2 and all(isinstance(each, str) for each in said)


def _medalpaca(fields: Fields, _: Context) -> Example:
    """MedAlpaca's flashcards: the instruction is the same for all rows, the input is the question."""
    return instruct(text(fields, "input"), text(fields, "output"))


def _mathinstruct(fields: Fields, _: Context) -> Example:
    """MathInstruct: instruction and output (and source)."""
    return instruct(text(fields, "instruction"), text(fields, "output"))


def _prompt_completion(fields: Fields, context: Context) -> Example:
    """A prompt and its completion: texts, or lists of messages."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(completion, str):
        return Example((*prompt_of(fields, context), Turn("assistant", completion)))
    _require(fields, "prompt", "completion")
    turns = (*turns_of(prompt, "prompt", context), *turns_of(completion, "completion", context))
    return _example(opened(turns, fields, context))


MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns")
"""Columns that hold conversations."""


def _messages(fields: Fields, context: Context) -> Example:
    """OpenAI's chat rows: messages, a list of {role, content} that ends with the assistant's."""
    column = next((name for name in MESSAGES if name in fields), MESSAGES[0])
    _require(fields, column)
    return _example(opened(turns_of(fields.get(column), column, context), fields, context))


def _sharegpt(fields: Fields, context: Context) -> Example:
    """ShareGPT's rows: conversations, a list of {from, value}, and LLaMA-Factory's with calls, tools and system."""
    return conversation(next((name for name in SHAREGPT_COLUMNS if name in fields), "conversations"), fields, context)


SHAREGPT_COLUMNS = ("conversations", *(name for name in MESSAGES if name != "conversations"))


def conversation(column: str, fields: Fields, context: Context) -> Example:
    """Return the conversation in a column, a list of {role, content} or of {from, value}."""
    _require(fields, column)
    return _example(opened(turns_of(fields.get(column), column, context, speakers=SHAREGPT), fields, context))


def _require(fields: Fields, *columns: str) -> None:
    """Raise LeftOut, with the columns that are there, where one is not."""
    for column in columns:
        if column not in fields:
            text(fields, column)


def _text(fields: Fields, _: Context) -> Example:
    """A text: a column text."""
    return whole_text(text(fields, "text"))


def whole_text(said: str) -> Example:
    """Return the example of a text that is learnt whole: a response to nothing."""
    return Example((Turn("assistant", said),))


def _oasst(fields: Fields, context: Context) -> Example:
    """OpenAssistant's trees: from the prompt on, of all replies the best ranked one (the first, where none is ranked).

    A path that ends with the prompter's turn is learnt up to the answer before it.
    """
    node = fields.get("prompt")
    if not isinstance(node, Mapping):
        if "parent_id" in fields:
            raise LeftOut(MALFORMED, f"its parent, {fields['parent_id']!r}, is not among the rows")
        _require(fields, "prompt")
        raise LeftOut(MALFORMED, "column 'prompt' is no message with replies")
    if fields.get("tree_state", "ready_for_export") not in (None, "ready_for_export"):
        raise LeftOut(NOT_READY, f"its tree_state is {fields['tree_state']!r}")
    turns: list[Turn] = []
    nodes: list[Mapping[str, Any]] = [node]
    while nodes:
        context.notes[OTHER_REPLIES] |= len(nodes) > 1
        best = min(nodes, key=lambda node: float(node["rank"]) if is_finite(node.get("rank")) else float("inf"))
        role = _OASST.get(str(best.get("role")))
        if role is None:
            raise LeftOut(MALFORMED, f"a message in column 'prompt' has the role {best.get('role')!r}")
        turns.append(Turn(role, text(best, "text")))
        context.unused |= {
            f"prompt.{key}" for key in best if key not in ("text", "role", "rank", "replies") and is_given(best[key])
        }
        replies = best.get("replies") or []
        nodes = [reply for reply in replies if isinstance(reply, Mapping) and reply.get("deleted") is not True]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise LeftOut(UNANSWERED, "the prompt has no reply")
    return _example(tuple(turns))


_OASST: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}


def _trees(rows: Iterable[tuple[Fields, str]]) -> Iterator[tuple[Fields, str]]:
    """Make trees of rows that are one message each, with its parent's id; rows that are trees pass."""
    messages: dict[object, tuple[dict[str, Any], str]] = {}
    for fields, where in rows:
        if "message_id" in fields and "parent_id" in fields:
            messages[fields["message_id"]] = ({**fields, "replies": []}, where)
        else:
            yield fields, where
    for message, _ in messages.values():
        if (parent := messages.get(message["parent_id"])) is not None:
            parent[0]["replies"].append(message)
    for message, where in messages.values():
        if message["parent_id"] is None:
            of_tree = ("message_tree_id", "tree_state", "lang")
            yield {name: message[name] for name in of_tree if name in message} | {"prompt": message}, where
        elif message["parent_id"] not in messages:
            yield message, where


def _preference(fields: Fields, context: Context) -> Preference:
    """Prompt, chosen and rejected: texts, or lists of messages."""
    if isinstance(fields.get("chosen"), str):
        return Preference(prompt_of(fields, context), text(fields, "chosen"), text(fields, "rejected"))
    return _binarized(fields, context)


def _binarized(fields: Fields, context: Context) -> Preference:
    """UltraFeedback, binarised: chosen and rejected are dialogues (lists of messages) with one prompt.

    Or they are the answers alone, and the prompt stands in its own column, as trl has it; LLaMA-Factory's are one
    message each, behind a conversation of ShareGPT's form.
    """
    _require(fields, "chosen", "rejected")
    chosen, rejected = (_answers(fields[column], column, context) for column in ("chosen", "rejected"))
    if chosen[0].role == rejected[0].role == "assistant":
        asked = next((name for name in MESSAGES if name in fields), None)
        if "prompt" in fields or asked is None:
            prompt = prompt_of(fields, context)
        else:
            prompt = opened(turns_of(fields[asked], asked, context, speakers=SHAREGPT), fields, context)
        return _last_turns((*prompt, *chosen), (*prompt, *rejected), context)
    context.notes[CONTRADICTION] += _contradicts(fields.get("prompt"), chosen)
    return _last_turns(opened(chosen, fields, context), opened(rejected, fields, context), context)


def _answers(said: object, column: str, context: Context) -> tuple[Turn, ...]:
    if isinstance(said, Mapping):
        return turns_of([said], column, context, speakers=SHAREGPT)
    return turns_of(said, column, context)


def _contradicts(prompt: object, dialogue: Prompt) -> bool:
    """Return whether a column prompt is neither the dialogue's first or last question nor all before its answer."""
    asked = [turn.content for turn in dialogue if turn.role == "user"]
    if isinstance(prompt, str):
        return bool(prompt.strip()) and prompt.strip() not in {text.strip() for text in asked}
    return is_given(prompt) and turns_of(prompt, "prompt") != dialogue[:-1]


def _openai_preference(fields: Fields, context: Context) -> Preference:
    """OpenAI's rows for preferences: input, {messages, tools}, preferred_output and non_preferred_output."""
    columns = ("input", "preferred_output", "non_preferred_output")
    _require(fields, *columns)
    asked, *answers = (fields[column] for column in columns)
    if not isinstance(asked, Mapping):
        raise LeftOut(MALFORMED, "column 'input' is no object with messages")
    prompt = opened(turns_of(asked.get("messages"), "input.messages", context), asked, context)
    context.unused |= {f"input.{key}" for key in asked if key not in ("messages", "tools") and is_given(asked[key])}
    chosen, rejected = (turns_of(answer, column, context) for answer, column in zip(answers, columns[1:], strict=True))
    return _last_turns((*prompt, *chosen), (*prompt, *rejected), context)


def _ultrafeedback(fields: Fields, context: Context) -> Preference:
    """UltraFeedback: of its scored completions the best is chosen, one of those below it, at random, is rejected.

    The choices depend on the seed and the instruction alone, wherever the row stands. A completion without a finite
    overall_score or without text is not used.
    """
    instruction = text(fields, "instruction")
    completions = fields.get("completions")
    if not isinstance(completions, list) or not all(isinstance(entry, Mapping) for entry in completions):
        raise LeftOut(MALFORMED, "column 'completions' is not a list of completions")
    scored = [
        (float(score), str(entry["response"]))
        for entry in completions
        if is_finite(score := entry.get("overall_score")) and str(entry.get("response") or "").strip()
    ]
    if len(scored) < 2:
        raise LeftOut(UNSCORED)
    highest = max(score for score, _ in scored)
    best = [response for score, response in scored if score == highest]
    others = [response for score, response in scored if score < highest]
    if not others:
        raise LeftOut(TIED)
    context.notes[COMPLETION_UNSCORED] += len(completions) - len(scored)
    context.notes[BEST_TIED] += len(best) > 1
    from fedcli.randomness import stream  # it loads numpy, and whoever reads fedcli.yaml needs none

    draw = stream(context.seed, "preferences", part=instruction)
    chosen, rejected = best[int(draw.integers(len(best)))], others[int(draw.integers(len(others)))]
    return Preference((Turn("user", instruction),), chosen, rejected)


_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ")


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    r"""Return the turns of an HH-RLHF dialogue, whose turns begin with "\n\nHuman: " and "\n\nAssistant: "."""
    start, *parts = _SPEAKER.split(text)
    if start or not parts:
        raise LeftOut(MALFORMED, "it does not begin with '\\n\\nHuman: ' or '\\n\\nAssistant: '")
    return tuple(Turn(_SPEAKERS[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _hh_rlhf(fields: Fields, context: Context) -> Preference:
    """HH-RLHF: chosen and rejected are whole dialogues that differ in the assistant's last turn."""
    chosen, rejected = (parse_dialogue(text(fields, column)) for column in ("chosen", "rejected"))
    return _last_turns(chosen, rejected, context)


def _last_turns(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], context: Context) -> Preference:
    """Return the preference of two dialogues that share all but the assistant's last turn."""
    if chosen == rejected:
        raise LeftOut(EQUAL)
    if (prompt := chosen[:-1]) != rejected[:-1]:
        raise LeftOut(FORKED)
    for turns in (chosen, rejected):
        if turns[-1].role != "assistant":
            raise LeftOut(UNANSWERED, f"a dialogue ends with the {turns[-1].role}'s turn")
    last = (chosen[-1], rejected[-1])
    if any(turn.tool_calls for turn in last):
        raise LeftOut(CALLS, "a pair's response calls tools")
    if any(turn.reasoning for turn in last):
        context.notes[PAIR_THOUGHTS] += 1
    return Preference(prompt, chosen[-1].content, rejected[-1].content)


def _example(turns: tuple[Turn, ...]) -> Example:
    if turns[-1].role != "assistant":
        raise LeftOut(UNANSWERED, f"the conversation ends with the {turns[-1].role}'s turn")
    if len(turns) < 2:
        raise LeftOut(MALFORMED, "the conversation is an answer alone")
    if not any(turn.is_learnt for turn in turns if turn.role == "assistant"):
        raise LeftOut(NOT_LEARNT, "every response has weight 0")
    return Example(turns)


EXAMPLES = (
    Format("alpaca", Example, _alpaca, hub={"tatsu-lab/alpaca": "train", "vicgalle/alpaca-gpt4": "train"}),
    Format("fingpt", Example, _alpaca, hub={"FinGPT/fingpt-sentiment-train": "train"}),
    Format("medalpaca", Example, _medalpaca, hub={"medalpaca/medical_meadow_medical_flashcards": "train"}),
    Format(
        "codealpaca",
        Example,
        _alpaca,
        hub={"lucasmccabe-lmi/CodeAlpaca-20k": "train", "flwrlabs/code-alpaca-20k": "train"},
    ),
    Format("mathinstruct", Example, _mathinstruct, is_unique=True, hub={"TIGER-Lab/MathInstruct": "train"}),
    Format("prompt-completion", Example, _prompt_completion),
    Format("messages", Example, _messages),
    Format("sharegpt", Example, _sharegpt),
    Format("oasst", Example, _oasst, assemble=_trees),
    Format("text", Example, _text),
)
PREFERENCES = (
    Format("preference", Preference, _preference),
    Format("ultrafeedback", Preference, _ultrafeedback, hub={"openbmb/UltraFeedback": "train"}),
    Format(
        "ultrafeedback-binarized",
        Preference,
        _binarized,
        hub={"HuggingFaceH4/ultrafeedback_binarized": "train_prefs"},
    ),
    Format("hh-rlhf", Preference, _hh_rlhf, hub={"Anthropic/hh-rlhf": "train"}),
    Format("openai-preference", Preference, _openai_preference),
)
"""The first is the default. Of both, the paper's eight data sets (UltraFeedback in two forms) are known."""
