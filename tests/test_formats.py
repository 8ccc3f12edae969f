"""Formats: what every published shape of a row teaches, which rows are left out, and why; on real files too."""

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fedcli.config import Columns, ColumnsFormat, DataFormat
from fedcli.data import formats
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader, choose_format, choose_split
from fedcli.data.row_report import describe_counts
from fedcli.data.source import Source
from fedcli.errors import ConfigError
from fedcli.tasks import FORMATS, builtin_formats, formats_of
from fedcli.tasks.builtin_formats import FORKED, TIED, UNSCORED
from fedcli.tasks.conversation import Example, Item, Judged, Preference, Question, Turn, instruct, shown
from fedcli.tasks.format import DUPLICATE, EMPTY, EQUAL, MALFORMED, UNANSWERED
from fedcli.tasks.verdict_formats import verdict_of

Fields = dict[str, Any]
DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


def format_dialogue(turns: Iterable[Turn]) -> str:
    """Write turns as HH-RLHF does."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)


def read(given: DataFormat, *rows: Fields, seed: int = 0) -> tuple[list[Item], RowReader]:
    reader = RowReader(given, seed)
    numbered = (Row(fields, f"here, line {number}") for number, fields in enumerate(rows, 1))
    return [item for _, item in reader.read(numbered)], reader


def real(name: str, given: str) -> tuple[list[Item], RowReader]:
    """Read a file of public rows, or skip the test where it is not at hand."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here; FEDCLI_TEST_DATA names its folder")
    reader = RowReader(given)
    return [item for _, item in reader.read(Source(DATA / name).rows())], reader


def columns(**names: str) -> ColumnsFormat:
    return ColumnsFormat(columns=Columns(**names))


def turns(*said: str) -> list[Fields]:
    """Return messages of "user: ...", "assistant: ..." and "system: ..."."""
    return [{"role": role, "content": content} for role, content in (part.split(": ", 1) for part in said)]


def talk(*said: str) -> str:
    """Return a dialogue of HH-RLHF, the human's turn first."""
    return "".join(f"\n\n{('Human', 'Assistant')[at % 2]}: {content}" for at, content in enumerate(said))


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference((Turn("user", prompt),), chosen, rejected)


NINE = [f"turn {number}" for number in range(1, 10)]
"""The prompt of a long dialogue: it ends with the user's fifth turn."""
NINE_TURNS = tuple(Turn(("user", "assistant")[at % 2], content) for at, content in enumerate(NINE))
NINE_MESSAGES = [{"role": turn.role, "content": turn.content} for turn in NINE_TURNS]
TO_A, TO_B = [*NINE_MESSAGES, *turns("assistant: A")], [*NINE_MESSAGES, *turns("assistant: B")]
NINE_TO_A, A_OR_B = Example((*NINE_TURNS, Turn("assistant", "A"))), Preference(NINE_TURNS, "A", "B")
ODD = "سلام 👋🏽\u2028a\r\nb\n\nHuman: no </s> [/INST] ### Response:\n\nAssistant: </s> {0} %s <|im_end|>\x00"
LONG = "word " * 10_000
QA = columns(instruction="q", response="a")
QCA = columns(instruction="q", input="c", response="a")
ABC = columns(prompt="q", chosen="good", rejected="bad")
NEWS = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
MEDICAL = "Answer this question truthfully"
SOURCE = "data/CoT/gsm_rft.json"

TAUGHT: dict[str, tuple[DataFormat, Fields, Item]] = {
    "Alpaca": ("alpaca", {"instruction": "Sum:", "input": "1 + 1", "output": "2"}, instruct("Sum:", "2", "1 + 1")),
    "an empty input": ("alpaca", {"instruction": "Hi", "input": "", "output": "Ho"}, instruct("Hi", "Ho")),
    "a null input": ("alpaca", {"instruction": "Hi", "input": None, "output": "Ho"}, instruct("Hi", "Ho")),
    "no input": ("alpaca", {"instruction": "Hi", "output": "Ho"}, instruct("Hi", "Ho")),
    "odd texts": ("alpaca", {"instruction": ODD, "input": ODD, "output": ODD}, instruct(ODD, ODD, ODD)),
    "a long response": ("alpaca", {"instruction": "Hi", "input": "", "output": LONG}, instruct("Hi", LONG)),
    "spaces are kept": ("alpaca", {"instruction": " Hi\n", "output": "\n Ho "}, instruct(" Hi\n", "\n Ho ")),
    "other columns": ("alpaca", {"instruction": "a", "output": "b", "text": 3, "x": None}, instruct("a", "b")),
    "CodeAlpaca": ("codealpaca", {"instruction": "f", "input": "x\n", "output": "\tx"}, instruct("f", "\tx", "x\n")),
    "FinGPT": ("fingpt", {"input": "Up .", "output": "good", "instruction": NEWS}, instruct(NEWS, "good", "Up .")),
    "MedAlpaca": ("medalpaca", {"instruction": MEDICAL, "input": "Why?", "output": "So."}, instruct("Why?", "So.")),
    "MathInstruct": ("mathinstruct", {"source": SOURCE, "instruction": "1+1", "output": "2"}, instruct("1+1", "2")),
    "prompt, completion": ("prompt-completion", {"prompt": ODD, "completion": LONG}, instruct(ODD, LONG)),
    "messages as prompt": ("prompt-completion", {"prompt": NINE_MESSAGES, "completion": "A"}, NINE_TO_A),
    "messages": ("prompt-completion", {"prompt": NINE_MESSAGES, "completion": TO_A[9:]}, NINE_TO_A),
    "messages, nine and one": ("messages", {"messages": TO_A}, NINE_TO_A),
    "messages with a system's": (
        "messages",
        {"messages": [{"role": "system", "content": ODD}, *turns("user: q", f"assistant: {LONG}")]},
        Example((Turn("system", ODD), Turn("user", "q"), Turn("assistant", LONG))),
    ),
    "preference": ("preference", {"prompt": ODD, "chosen": "a", "rejected": LONG}, pair(ODD, "a", LONG)),
    "a dialogue as prompt": ("preference", {"prompt": NINE_MESSAGES, "chosen": "A", "rejected": "B"}, A_OR_B),
    "dialogues as preference": ("preference", {"chosen": TO_A, "rejected": TO_B}, A_OR_B),
    "UltraFeedback, binarised": (
        "ultrafeedback-binarized",
        {"prompt": "turn 1", "chosen": TO_A, "rejected": TO_B, "score_chosen": 8.5, "score_rejected": 8.5},
        A_OR_B,
    ),
    "HH-RLHF": ("hh-rlhf", {"chosen": talk("U", "A"), "rejected": talk("U", "B")}, pair("U", "A", "B")),
    # What two answers share is not cut:
    "nine turns of HH-RLHF": (
        "hh-rlhf",
        {"chosen": talk(*NINE, "at yes"), "rejected": talk(*NINE, "at no")},
        Preference(NINE_TURNS, "at yes", "at no"),
    ),
    "columns": (QA, {"q": ODD, "a": LONG, "z": 1}, instruct(ODD, LONG)),
    "columns with an input": (QCA, {"q": "Q", "c": "C", "a": "A"}, instruct("Q", "A", "C")),
    "an empty input column": (QCA, {"q": "Q", "c": "", "a": "A"}, instruct("Q", "A")),
    "numbers in columns": (QCA, {"q": 7, "c": -0.5, "a": 0}, instruct("7", "0", "-0.5")),
    "columns of a preference": (ABC, {"q": ODD, "good": "a", "bad": 0.25}, pair(ODD, "a", "0.25")),
}


@pytest.mark.parametrize("case", TAUGHT)
def test_a_row_teaches_what_its_format_says(case: str) -> None:
    given, fields, expected = TAUGHT[case]
    items, reader = read(given, fields)
    assert items == [expected]
    assert (reader.num_rows, reader.num_usable, reader.left_out, reader.first_cases) == (1, 1, {}, {})


MESSAGES = "column 'messages' is not a list of messages"
NO_TEXT = "a message in column 'messages' has no text, or the role "
NO_ANSWER = "the conversation ends with the user's turn"
NOT_HH = r"it does not begin with '\n\nHuman: ' or '\n\nAssistant: '"
A, B = turns("user: a", "assistant: b"), turns("user: z", "assistant: c")

LEFT_OUT: dict[str, tuple[DataFormat, Fields, str]] = {
    "no output": ("alpaca", {"instruction": "a"}, "no column 'output'; it has instruction"),
    "no column": ("alpaca", {}, "no column 'instruction'; it has none"),
    "a null output": ("alpaca", {"instruction": "a", "output": None}, "no text in column 'output'"),
    "a number": ("alpaca", {"instruction": 7, "output": "b"}, "no text in column 'instruction'; it has instruction, "),
    "a list as input": ("alpaca", {"instruction": "a", "input": [], "output": "b"}, "no text in column 'input'"),
    "an empty output": ("alpaca", {"instruction": "a", "output": ""}, EMPTY),
    "blanks as output": ("alpaca", {"instruction": "a", "output": " \r\n\t\u2028\u00a0"}, EMPTY),
    "no question": ("medalpaca", {"instruction": MEDICAL, "output": "b"}, "no column 'input'"),
    "a null question": ("medalpaca", {"instruction": MEDICAL, "input": None, "output": "b"}, "no text in column"),
    "an empty solution": ("mathinstruct", {"source": SOURCE, "instruction": "a", "output": "\n"}, EMPTY),
    "no prompt": ("prompt-completion", {"completion": "b"}, "no column 'prompt'; it has completion"),
    "no completion": ("prompt-completion", {"prompt": "a"}, "no column 'completion'; it has prompt"),
    "an empty completion": ("prompt-completion", {"prompt": "a", "completion": " "}, EMPTY),
    "no messages": ("messages", {"text": "a"}, "no column 'messages'; it has text"),
    "messages as text": ("messages", {"messages": "[]"}, MESSAGES),
    "an empty list": ("messages", {"messages": []}, MESSAGES),
    "an unknown role": ("messages", {"messages": turns("human: a", "assistant: b")}, f"{NO_TEXT}'human'"),
    "messages of texts": ("messages", {"messages": ["a", "b"]}, f"{NO_TEXT}None"),
    "a null content": ("messages", {"messages": [{"role": "user", "content": None}]}, f"{NO_TEXT}'user'"),
    "no answer": ("messages", {"messages": turns("user: a", "assistant: b", "user: c")}, NO_ANSWER),
    "an answer alone": ("messages", {"messages": turns("assistant: b")}, "the conversation is an answer alone"),
    "an empty answer": ("messages", {"messages": turns("user: a", "assistant:  ")}, EMPTY),
    "no rejected": ("preference", {"prompt": "a", "chosen": "b"}, "no column 'rejected'; it has prompt, chosen"),
    "no preference": ("preference", {"prompt": "a"}, "no column 'chosen'; it has prompt"),
    "one text twice": ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, EQUAL),
    "an empty chosen": ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, EMPTY),
    "an empty rejected": ("preference", {"prompt": "a", "chosen": "b", "rejected": "\n"}, EMPTY),
    "two prompts": ("ultrafeedback-binarized", {"chosen": A, "rejected": B}, FORKED),
    "one answer": ("ultrafeedback-binarized", {"chosen": A, "rejected": A}, EQUAL),
    "texts": ("ultrafeedback-binarized", {"chosen": "a", "rejected": "b"}, "column 'chosen' is not a list of messages"),
    "a fork": ("hh-rlhf", {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "z", "d")}, FORKED),
    "two lengths": ("hh-rlhf", {"chosen": talk("a", "b"), "rejected": talk("a", "b", "c", "d")}, FORKED),
    "one dialogue twice": ("hh-rlhf", {"chosen": talk("a", "b"), "rejected": talk("a", "b")}, EQUAL),
    "an empty turn": ("hh-rlhf", {"chosen": talk("a", ""), "rejected": talk("a", "b")}, EMPTY),
    "no speaker": ("hh-rlhf", {"chosen": "a", "rejected": talk("a", "b")}, NOT_HH),
    "a text in front": ("hh-rlhf", {"chosen": "x" + talk("a", "b"), "rejected": talk("a")}, NOT_HH),
    "ends of Windows": ("hh-rlhf", {"chosen": "\r\n\r\nHuman: a", "rejected": talk("a")}, NOT_HH),
    "empty dialogues": ("hh-rlhf", {"chosen": "", "rejected": ""}, NOT_HH),
    "a null dialogue": ("hh-rlhf", {"chosen": None, "rejected": talk("a")}, "no text in column 'chosen'"),
    "no assistant": ("hh-rlhf", {"chosen": talk("a"), "rejected": talk("b")}, "a dialogue ends with the user's turn"),
    "no user": ("hh-rlhf", {"chosen": talk("", "b")[9:], "rejected": talk("", "c")[9:]}, "the prompt does not end"),
    "a column that is not there": (QA, {"q": "a", "A": "b"}, "no column 'a'; it has q, A"),
    "a list in a column": (QA, {"q": "a", "a": ["b"]}, "no text in column 'a'"),
    "blanks in a column": (QA, {"q": "a", "a": "  "}, EMPTY),
    "equal numbers": (ABC, {"q": "a", "good": 1, "bad": 1}, EQUAL),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_row_that_is_left_out_is_counted_by_its_reason_and_the_first_is_told(case: str) -> None:
    given, fields, detail = LEFT_OUT[case]
    reason = detail if detail in (EMPTY, EQUAL, FORKED) else UNANSWERED if " ends with the " in detail else MALFORMED
    items, reader = read(given, fields, fields)
    assert items == []
    assert (reader.num_rows, reader.num_usable, reader.left_out) == (2, 0, {reason: 2})
    assert reader.first_cases[reason].startswith(f"here, line 1: {detail}")


def test_every_format_has_a_reader_and_rows_here() -> None:
    names = set(FORMATS)
    assert names == {name for item in (Example, Preference, Judged, Question) for name in formats_of(item)}
    assert {name for name, known in FORMATS.items() if known.is_unique} == {"mathinstruct"}
    tried = {formats.format_name(given) for table in (TAUGHT, LEFT_OUT) for given, *_ in table.values()}
    elsewhere = {"ultrafeedback", "sharegpt", "oasst", "text", "openai-preference"}  # below, and in test_row_layouts.py
    judged, asked = formats_of(Judged), formats_of(Question)  # test_preference_tasks.py, test_rewards.py
    assert names | {"columns"} == tried | elsewhere | {*judged, *asked}


def test_counts_are_told_by_reason() -> None:
    good = {"instruction": "a", "output": "b"}
    items, reader = read("alpaca", good, {"output": "b"}, good, {"instruction": "a", "output": " "}, {}, good)
    assert len(items) == 3  # which repeat one instruction: this format keeps them
    assert (reader.num_rows, reader.num_usable, reader.left_out) == (6, 3, {MALFORMED: 2, EMPTY: 1})
    assert reader.first_cases == {
        MALFORMED: "here, line 2: no column 'instruction'; it has output",
        EMPTY: "here, line 4: empty response",
    }
    assert describe_counts(reader.left_out) == "1 empty response, 2 malformed"
    assert describe_counts({EMPTY: 0}) == ""
    reader.require_rows("here")


def test_rows_of_which_none_is_usable_are_an_error_that_names_the_first_fault() -> None:
    for given, name, column in (("alpaca", "alpaca", "instruction"), (QA, "columns", "q")):
        _, reader = read(given, {"question": "a", "answer": "b"}, {"question": "c", "answer": "d"})
        with pytest.raises(ConfigError) as caught:
            reader.require_rows("rows.jsonl")
        assert caught.value.message == (
            f"rows.jsonl: none of 2 rows is usable as {name} (2 malformed); "
            f"first, here, line 1: no column '{column}'; it has question, answer"
        )
        assert "data.format" in caught.value.hint


def test_mathinstruct_leaves_out_rows_that_repeat_an_instruction_of_a_row_that_is_used() -> None:
    rows = [("a", ""), ("a", "1"), ("b", "1"), ("a", "2"), ("a ", "3"), ("b", "1")]
    items, reader = read("mathinstruct", *({"source": SOURCE, "instruction": i, "output": o} for i, o in rows))
    assert [(shown(item.prompt), item.response) for item in items] == [("a", "1"), ("b", "1"), ("a ", "3")]
    assert reader.left_out == {EMPTY: 1, DUPLICATE: 2}
    assert reader.first_cases[DUPLICATE] == "here, line 4: duplicate"


UNUSED, SHARED = builtin_formats.COMPLETION_UNSCORED, builtin_formats.BEST_TIED


def scored(*completions: tuple[str, object], instruction: str = "Q") -> Fields:
    """Return a row as it is published, of responses and their overall scores."""
    annotation = {name: {"Rating": "N/A", "Rationale": ""} for name in ("honesty", "helpfulness")}
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": ["m"] * len(completions),
        "completions": [
            {"model": "m", "principle": "helpfulness", "custom_system_prompt": "", "response": response}
            | {"overall_score": score, "fine-grained_score": 4.25, "annotations": annotation}
            for response, score in completions
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def chosen_and_rejected(row: Fields, count: int = 200) -> Counter[tuple[str, str]]:
    """Return which pairs a row gives under many seeds."""
    found = (read("ultrafeedback", row, seed=seed)[0][0] for seed in range(count))
    return Counter((item.chosen, item.rejected) for item in found)


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected", "notes"),
    [
        ((5, 8.5, 7, 6), "1", "023", {}),
        ((1, 2), "1", "0", {}),
        ((9, 8, 9, 7), "02", "13", {SHARED: 1}),
        ((9, 9, 9, 7), "012", "3", {SHARED: 1}),
        ((9, None, 7, 6), "0", "23", {UNUSED: 1}),
        ((math.nan, "N/A", 7, 6.0), "2", "3", {UNUSED: 2}),
        ((math.inf, -math.inf, 7, 6), "2", "3", {UNUSED: 2}),
        ((True, 0, -1), "1", "2", {UNUSED: 1}),
        ((9, 9, None, 7), "01", "3", {SHARED: 1, UNUSED: 1}),
        ((-0.0, 0, -1), "01", "2", {SHARED: 1}),
    ],
)
def test_the_best_is_chosen_and_any_that_is_strictly_worse_is_rejected(
    scores: tuple[object, ...], chosen: str, rejected: str, notes: dict[str, int]
) -> None:
    row = scored(*((str(place), score) for place, score in enumerate(scores)))
    pairs = chosen_and_rejected(row)
    assert set(pairs) == {(best, worse) for best in chosen for worse in rejected}
    assert min(pairs.values()) > 200 / len(pairs) / 2  # all about equally often
    assert +read("ultrafeedback", row)[1].notes == notes


NOT_COMPLETIONS = "column 'completions' is not a list of completions"


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (scored(("a", 7), ("b", 7.0), ("c", 7)), TIED),
        (scored(("a", 7), ("b", None), ("c", "N/A")), UNSCORED),
        (scored(("a", math.nan), ("b", math.nan)), UNSCORED),
        (scored(("a", 7)), UNSCORED),
        (scored(), UNSCORED),
        (scored(("same", 7), ("same", 6)), EQUAL),
        (scored(("a", 7), (" ", 6)), UNSCORED),
        (scored(("a", 7), (None, 6)), UNSCORED),
        ({"instruction": "Q"}, NOT_COMPLETIONS),
        ({"instruction": "Q", "completions": {"response": ["a", "b"]}}, NOT_COMPLETIONS),
        ({"instruction": "Q", "completions": ["a", "b"]}, NOT_COMPLETIONS),
        ({"completions": []}, "no column 'instruction'; it has completions"),
    ],
)
def test_a_row_without_a_best_and_a_worse_completion_is_left_out(row: Fields, detail: str) -> None:
    reason = detail if detail in (TIED, UNSCORED, EQUAL, EMPTY) else MALFORMED
    items, reader = read("ultrafeedback", row)
    assert (items, reader.left_out) == ([], {reason: 1})
    assert reader.first_cases == {reason: f"here, line 1: {detail}"}


def test_the_choice_depends_on_seed_and_instruction_and_not_on_the_place() -> None:
    rows = [scored(("a", 1), ("b", 9), ("c", 2), ("d", 3), instruction=f"Q{number} {ODD}") for number in range(300)]

    def choices(rows: list[Fields], seed: int) -> dict[str, str]:
        return {shown(item.prompt): item.rejected for item in read("ultrafeedback", *rows, seed=seed)[0]}

    first = choices(rows, 0)
    assert first == choices(rows[::-1], 0)
    assert {text: first[text] for text in list(first)[100:200]} == choices(rows[100:200], 0)
    assert all(75 < count < 125 for count in Counter(first.values()).values())
    other = choices(rows, 1)
    assert 150 < sum(first[text] != other[text] for text in first) < 250
    assert "".join(first.values())[:12] == "ddcdddcaadaa"  # the same on every machine


def test_a_dialogue_is_parsed_into_its_turns_and_written_again() -> None:
    text = talk(" a", "b\n\nc", "", "Human: d\nAssistant: e")
    assert builtin_formats.parse_dialogue(text) == (
        Turn("user", " a"),
        Turn("assistant", "b\n\nc"),
        Turn("user", ""),
        Turn("assistant", "Human: d\nAssistant: e"),  # a speaker stands after an empty line
    )
    assert format_dialogue(builtin_formats.parse_dialogue(text)) == text
    twice = "\n\nAssistant: a\n\nAssistant: b"
    assert builtin_formats.parse_dialogue(twice) == (Turn("assistant", "a"), Turn("assistant", "b"))
    assert format_dialogue(builtin_formats.parse_dialogue(twice)) == twice


HH_RLHF = "hh_rlhf/harmless-base-test.jsonl.gz"


def test_hh_rlhfs_test_rows_are_all_read_but_nine() -> None:
    items, reader = real(HH_RLHF, "hh-rlhf")
    assert (reader.num_rows, reader.num_usable, reader.left_out) == (2312, 2303, {EMPTY: 4, FORKED: 5})
    places = {EMPTY: f"{DATA / HH_RLHF}, line 87", FORKED: f"{DATA / HH_RLHF}, line 1255"}
    assert reader.first_cases == {reason: f"{place}: {reason}" for reason, place in places.items()}
    assert all(item.prompt[-1].role == "user" for item in items)

    originals, reasons = [], Counter()
    for line in gzip.decompress((DATA / HH_RLHF).read_bytes()).splitlines():
        row = json.loads(line)
        (start, _, chosen), (other, _, rejected) = (row[key].rpartition("\n\nAssistant: ") for key in row)
        reason = FORKED if start != other else EMPTY if not chosen.strip() or not rejected.strip() else ""
        reasons[reason] += 1
        originals += [] if reason else [(row["chosen"], row["rejected"])]
    assert reasons == {"": 2303, EMPTY: 4, FORKED: 5}
    written = [
        tuple(format_dialogue((*item.prompt, Turn("assistant", text))) for text in (item.chosen, item.rejected))
        for item in items
    ]
    assert written == originals


PUBLISHED: dict[str, tuple[str, int, int, int, int, str, str]] = {
    "alpaca/alpaca_1805.json": ("alpaca", 1805, 4, 146_510, 450_902, "Give three tips for", "1.Eat a balanced"),
    "alpaca_gpt4/alpaca_en_demo.json": ("alpaca", 999, 0, 85_699, 701_335, "Describe a process", "Making crepes is"),
    "codealpaca/code_alpaca_2k.json": (
        *("codealpaca", 2017, 2, 187_363, 392_260),
        *("What are the distinct values from the given list? dataList = [3, 9,", "The distinct values from"),
    ),
    "medical_meadow/medical_meadow_small.json": (
        *("medalpaca", 5942, 0, 295_473, 2_710_233),
        *("What are the symptoms of Allergy?", "Allergy symptoms vary, but may include:\n"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_read_to_its_last_character(name: str) -> None:
    given, num_rows, num_empty, of_prompts, of_responses, prompt, response = PUBLISHED[name]
    items, reader = real(name, given)
    assert (reader.num_rows, len(items)) == (num_rows, num_rows - num_empty)
    assert reader.left_out == Counter({EMPTY: num_empty})
    assert sum(len(shown(item.prompt)) for item in items) == of_prompts
    assert sum(len(item.response) for item in items) == of_responses
    assert shown(items[0].prompt).startswith(prompt)
    assert items[0].response.startswith(response)


PAPER: dict[str, tuple[str, str, str]] = {
    "tatsu-lab/alpaca": ("sft", "alpaca", "train"),
    "vicgalle/alpaca-gpt4": ("sft", "alpaca", "train"),
    "FinGPT/fingpt-sentiment-train": ("sft", "fingpt", "train"),
    "medalpaca/medical_meadow_medical_flashcards": ("sft", "medalpaca", "train"),
    "lucasmccabe-lmi/CodeAlpaca-20k": ("sft", "codealpaca", "train"),
    "TIGER-Lab/MathInstruct": ("sft", "mathinstruct", "train"),
    "openbmb/UltraFeedback": ("dpo", "ultrafeedback", "train"),
    "HuggingFaceH4/ultrafeedback_binarized": ("dpo", "ultrafeedback-binarized", "train_prefs"),
    "Anthropic/hh-rlhf": ("dpo", "hh-rlhf", "train"),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_data_set_of_the_paper_knows_its_format_and_split(name: str) -> None:
    task, given, split = PAPER[name]
    other = "dpo" if task == "sft" else "sft"
    assert (choose_format(name, None, task), choose_split(name, None)) == (given, split)
    assert (choose_format(name, "messages", task), choose_split(name, "test")) == ("messages", "test")
    with pytest.raises(ConfigError) as caught:
        choose_format(name, None, other)
    assert caught.value.message == f"{name} has rows of the format {given}, which is not for task {other}"
    assert caught.value.hint == f"Set task to {task}, or name another source."


def test_any_other_source_has_the_tasks_first_format_and_the_split_train() -> None:
    flowertune = {"flwrlabs/code-alpaca-20k"}  # CodeAlpaca again; the other boards have data sets of the paper
    verdicts = {"trl-lib/kto-mix-14k", "trl-lib/ultrafeedback-gpt-3.5-turbo-helpfulness"}
    assert {name for known in FORMATS.values() for name in known.hub} == set(PAPER) | flowertune | verdicts
    for name in ("rows.jsonl", "squad", None):
        assert (choose_format(name, None, "sft"), choose_format(name, None, "dpo")) == ("alpaca", "preference")
        assert choose_format(name, QA, "sft") == QA
        assert choose_split(str(name), None) == "train"


# Known defects, each with what should happen

UNUSUAL: dict[str, tuple[DataFormat, Fields, list[Item]]] = {
    "a prompt and answers of messages": (
        "preference",
        {"prompt": NINE_MESSAGES, "chosen": TO_A[9:], "rejected": TO_B[9:]},
        [A_OR_B],
    ),
    "a score of 400 digits": ("ultrafeedback", scored(("a", 10**400), ("b", 2), ("c", 1)), [pair("Q", "b", "c")]),
    "the best has no text": ("ultrafeedback", scored((" ", 9), ("b", 2), ("c", 1)), [pair("Q", "b", "c")]),
    "a null input column": (QCA, {"q": "Q", "c": None, "a": "A"}, [instruct("Q", "A")]),
    "an answer without a question": ("messages", {"messages": turns("system: S", "assistant: A")}, []),
    # All turns of the assistant are learnt, the empty one as silence:
    "an empty answer before": ("messages", {"messages": turns("user: U", "assistant: ") + TO_A}, []),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_row_is_used_where_it_can_be(case: str) -> None:
    given, fields, expected = UNUSUAL[case]
    assert read(given, fields)[0] == expected


def test_a_row_that_asks_nothing_is_left_out() -> None:
    reader = read("alpaca", {"instruction": " ", "input": "", "output": "a"}, {"instruction": "q", "output": "a"})[1]
    assert reader.left_out == {"empty prompt": 1}


def test_notes_are_of_rows_that_are_used() -> None:
    assert not +read("ultrafeedback", scored(("same", 9), ("same", 9), ("same", 2), ("d", None)))[1].notes


@pytest.mark.parametrize(("label", "is_good"), [("yes", True), ("No", False), ("Y", True), ("n", False)])
def test_yes_and_no_are_verdicts(label: str, is_good: bool) -> None:
    assert verdict_of(label, "label") == is_good


def test_rows_with_verdicts_are_never_said_to_be_examples(tmp_path: Path) -> None:
    rows = [{"prompt": "Say it.", "completion": "green", "label": label} for label in ("maybe", "perhaps")]
    reader = RowReader("judged-messages")
    assert list(reader.read(Row(row, "here") for row in rows)) == []
    with pytest.raises(ConfigError) as caught:
        reader.require_rows("rows.jsonl")
    assert "sft" not in caught.value.hint
