"""The formats that fedcli knows; a new one is a function and an entry of EXAMPLES or PREFERENCES (CONTRIBUTING.md)."""

import re
from collections.abc import Mapping

from fedcli.tasks.conversation import Example, Preference, Role, Turn, instruct
from fedcli.tasks.format import EQUAL, MALFORMED, Context, Fields, Format, LeftOut, is_finite, prompt_of, text, turns_of

FORKED = "the dialogues fork before their last turn"
UNSCORED = "fewer than two scores"
TIED = "all scores tie"

BEST_TIED = "best score tied, one of the best taken at random"
COMPLETION_UNSCORED = "completions without a score, not used"


def _alpaca(fields: Fields, _: Context) -> Example:
    """Alpaca, Alpaca-GPT4, CodeAlpaca, FinGPT: instruction, input (may be absent or empty) and output."""
    extra = text(fields, "input") if fields.get("input") is not None else ""
    return instruct(text(fields, "instruction"), text(fields, "output"), extra)


def _medalpaca(fields: Fields, _: Context) -> Example:
    """MedAlpaca's flashcards: the instruction is the same for all rows, the input is the question."""
    return instruct(text(fields, "input"), text(fields, "output"))


def _mathinstruct(fields: Fields, _: Context) -> Example:
    """MathInstruct: instruction and output (and source)."""
    return instruct(text(fields, "instruction"), text(fields, "output"))


def _prompt_completion(fields: Fields, _: Context) -> Example:
    """A prompt and its completion: texts, or lists of messages."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(completion, str):
        return Example((*prompt_of(fields), Turn("assistant", completion)))
    return _example((*turns_of(prompt, "prompt"), *turns_of(completion, "completion")))


def _messages(fields: Fields, _: Context) -> Example:
    """OpenAI's chat rows: messages, a list of {role, content} that ends with the assistant's."""
    return _example(turns_of(fields.get("messages"), "messages"))


def _preference(fields: Fields, context: Context) -> Preference:
    """Prompt, chosen and rejected: texts, or lists of messages."""
    if isinstance(fields.get("chosen"), str):
        return Preference(prompt_of(fields), text(fields, "chosen"), text(fields, "rejected"))
    return _binarized(fields, context)


def _binarized(fields: Fields, _: Context) -> Preference:
    """UltraFeedback, binarised: chosen and rejected are dialogues (lists of messages) with one prompt.

    Or they are the answers alone, and the prompt stands in its own column, as trl has it.
    """
    chosen, rejected = (turns_of(fields.get(column), column) for column in ("chosen", "rejected"))
    prompt = prompt_of(fields) if chosen[0].role == rejected[0].role == "assistant" else ()
    return _last_turns((*prompt, *chosen), (*prompt, *rejected))


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


def _hh_rlhf(fields: Fields, _: Context) -> Preference:
    """HH-RLHF: chosen and rejected are whole dialogues that differ in the assistant's last turn."""
    return _last_turns(parse_dialogue(text(fields, "chosen")), parse_dialogue(text(fields, "rejected")))


def _last_turns(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> Preference:
    """Return the preference of two dialogues that share all but the assistant's last turn."""
    if chosen == rejected:
        raise LeftOut(EQUAL)
    if (prompt := chosen[:-1]) != rejected[:-1]:
        raise LeftOut(FORKED)
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise LeftOut(MALFORMED, "a dialogue does not end with the assistant's turn")
    return Preference(prompt, chosen[-1].content, rejected[-1].content)


def _example(turns: tuple[Turn, ...]) -> Example:
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise LeftOut(MALFORMED, "the conversation does not end with the assistant's answer")
    return Example(turns)


EXAMPLES = (
    Format("alpaca", Example, _alpaca, hub={"tatsu-lab/alpaca": "train", "vicgalle/alpaca-gpt4": "train"}),
    Format("fingpt", Example, _alpaca, hub={"FinGPT/fingpt-sentiment-train": "train"}),
    Format("medalpaca", Example, _medalpaca, hub={"medalpaca/medical_meadow_medical_flashcards": "train"}),
    Format("codealpaca", Example, _alpaca, hub={"lucasmccabe-lmi/CodeAlpaca-20k": "train"}),
    Format("mathinstruct", Example, _mathinstruct, is_unique=True, hub={"TIGER-Lab/MathInstruct": "train"}),
    Format("prompt-completion", Example, _prompt_completion),
    Format("messages", Example, _messages),
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
)
"""The first is the default. Of both, the paper's eight data sets (UltraFeedback in two forms) are known."""
