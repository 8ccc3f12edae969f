"""Layouts of rows that other tools write: what is read of them, guessed, left out, and said not to be used."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import SMALL, runner, settings

from fedcli.config import Columns, ColumnsFormat, DataFormat, MessagesFormat, parse_config
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader, guess_format
from fedcli.data.row_report import describe_rows
from fedcli.data.source import Source, find_source
from fedcli.errors import ConfigError
from fedcli.tasks.conversation import Example, Item, Preference, Turn, instruct
from fedcli.tasks.format import JSON_RESULT, MALFORMED, NOT_LEARNT, NOT_TEXT, UNANSWERED

Fields = dict[str, Any]
LAYOUTS = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data") / "chat_layouts"
CALL = {"type": "function", "function": {"name": "w", "arguments": '{"l": "SF"}'}}
TOOL = {"type": "function", "function": {"name": "w", "parameters": {}}}
CALLS, TOOLS = json.dumps([CALL]), json.dumps([TOOL])
HI, YO = Turn("user", "hi"), Turn("assistant", "yo")
THOUGHT = Example((HI, Turn("assistant", "yo", reasoning="hm")))


def read(given: DataFormat, *rows: Fields) -> tuple[list[Item], RowReader]:
    reader = RowReader(given)
    numbered = (Row(fields, f"here, line {number}") for number, fields in enumerate(rows, 1))
    return [item for _, item in reader.read(numbered)], reader


def guessed(*rows: Fields, task: str = "sft") -> str | dict[str, Any]:
    choice = guess_format("", None, task, [Row(fields, "here") for fields in rows], "data.format")
    return choice.format if isinstance(choice.format, str) else choice.format.model_dump(exclude_none=True)


def said(*messages: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[Fields]:
    return [dict(zip(keys, message, strict=True)) for message in messages]


HI_YO = said(("user", "hi"), ("assistant", "yo"))
SHAREGPT = said(("human", "hi"), ("gpt", "yo"), keys=("from", "value"))


def answer(**more: object) -> Fields:
    return {"messages": [HI_YO[0], {**HI_YO[1], **more}]}


def parts(*given: object) -> Fields:
    return {"messages": [{"role": "user", "content": list(given)}, HI_YO[1]]}


READ: dict[str, tuple[DataFormat, Fields, Item]] = {
    "ShareGPT": ("sharegpt", {"conversations": SHAREGPT}, Example((HI, YO))),
    "speakers in capitals": (
        "sharegpt",
        {"conversations": said(("System", "s"), ("Human", "hi"), ("GPT", "yo"), keys=("from", "value"))},
        Example((Turn("system", "s"), HI, YO)),
    ),
    "ShareGPT with roles": ("sharegpt", {"conversations": HI_YO}, Example((HI, YO))),
    "ShareGPT in messages": ("sharegpt", {"messages": SHAREGPT}, Example((HI, YO))),
    "LLaMA-Factory's calls, tools and system": (
        "sharegpt",
        {
            "system": "s",
            "tools": json.dumps([TOOL["function"]]),
            "conversations": said(
                ("human", "hi"),
                ("function_call", json.dumps(CALL["function"])),
                ("observation", "21"),
                ("gpt", "yo"),
                keys=("from", "value"),
            ),
        },
        Example(
            (
                Turn("system", "s", tools=TOOLS),
                HI,
                Turn("assistant", "", tool_calls=CALLS),
                Turn("tool", "21"),
                YO,
            )
        ),
    ),
    **{
        f"a column {name}": ("messages", {name: HI_YO}, Example((HI, YO)))
        for name in ("messages", "conversations", "conversation", "chat", "dialogue")
    },
    "a column of any name": (MessagesFormat(messages="talk"), {"talk": SHAREGPT}, Example((HI, YO))),
    "messages as JSON": ("messages", {"messages": json.dumps(HI_YO)}, Example((HI, YO))),
    "parts": (
        "messages",
        parts({"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}),
        Example((HI, YO)),
    ),
    "parts of arrow": ("messages", parts({"type": "text", "text": "hi", "image_url": None}), Example((HI, YO))),
    "a developer": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, *HI_YO]},
        Example((Turn("system", "s"), HI, YO)),
    ),
    "OpenAI's calls": (
        "messages",
        {
            "messages": [
                HI_YO[0],
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "21"},
                HI_YO[1],
            ],
            "tools": [TOOL],
        },
        Example((Turn("user", "hi", tools=TOOLS), Turn("assistant", "", tool_calls=CALLS), Turn("tool", "21"), YO)),
    ),
    "OpenAI's older calls": (
        "messages",
        {
            "messages": [
                HI_YO[0],
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "21"},
                HI_YO[1],
            ],
            "functions": [TOOL["function"]],
        },
        Example((Turn("user", "hi", tools=TOOLS), Turn("assistant", "", tool_calls=CALLS), Turn("tool", "21"), YO)),
    ),
    "an answer that calls": (
        "messages",
        answer(content="", tool_calls=[CALL]),
        Example((HI, Turn("assistant", "", tool_calls=CALLS))),
    ),
    "no tools": ("messages", {"messages": HI_YO, "tools": []}, Example((HI, YO))),
    **{
        f"weight {key} {value}": (
            "messages",
            {"messages": [*answer(**{key: value})["messages"], *HI_YO]},
            Example((HI, Turn("assistant", "yo", is_learnt=False), HI, YO)),
        )
        for key, value in (("weight", 0), ("weight", 0.0), ("weight", False), ("train", False), ("loss", False))
    },
    "weight 1": ("messages", answer(weight=1), Example((HI, YO))),
    "weight null": ("messages", answer(weight=None), Example((HI, YO))),
    **{
        f"thoughts in {key}": (
            "messages",
            answer(**{key: "hm"}),
            THOUGHT,
        )
        for key in ("reasoning_content", "reasoning", "thinking")
    },
    "thoughts in a part": (
        "messages",
        answer(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yo"}]),
        THOUGHT,
    ),
    "a system column": ("messages", {"messages": HI_YO, "system": "s"}, Example((Turn("system", "s"), HI, YO))),
    "a system column twice": (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, *HI_YO], "system": "s"},
        Example((Turn("system", "s"), HI, YO)),
    ),
    "Alpaca with system and history": (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["h1", "r1"], ["h2", "r2"]]},
        Example(
            (
                Turn("system", "s"),
                *instruct("h1", "r1").turns,
                *instruct("h2", "r2").turns,
                *instruct("q", "a").turns,
            )
        ),
    ),
    "Alpaca without them": (
        "alpaca",
        {"instruction": "q", "output": "a", "system": "", "history": []},
        instruct("q", "a"),
    ),
    "an OpenAssistant tree": (
        "oasst",
        {
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "replies": [
                    {"role": "assistant", "text": "bad", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "worst", "replies": []},
                    {"role": "assistant", "text": "gone", "rank": 0, "deleted": True, "replies": []},
                    {
                        "role": "assistant",
                        "text": "yo",
                        "rank": 0,
                        "replies": [{"role": "prompter", "text": "and?", "replies": []}],
                    },
                ],
            }
        },
        Example((HI, YO)),
    ),
    "a text": ("text", {"text": "a b"}, Example((Turn("assistant", "a b"),))),
    "a text of any name": (
        ColumnsFormat(columns=Columns(text="body")),
        {"body": "a"},
        Example((Turn("assistant", "a"),)),
    ),
    "columns with a system": (
        ColumnsFormat(columns=Columns(instruction="q", response="a", system="s")),
        {"q": "hi", "a": "yo", "s": "be"},
        Example((Turn("system", "be"), HI, YO)),
    ),
    "OpenAI's preference": (
        "openai-preference",
        {
            "input": {"messages": HI_YO[:1], "tools": [TOOL]},
            "preferred_output": HI_YO[1:],
            "non_preferred_output": said(("assistant", "no")),
        },
        Preference((Turn("user", "hi", tools=TOOLS),), "yo", "no"),
    ),
    "LLaMA-Factory's preference": (
        "preference",
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "no"}},
        Preference((HI,), "yo", "no"),
    ),
    "a preference with a system": (
        "preference",
        {"prompt": "hi", "chosen": "yo", "rejected": "no", "system": "s"},
        Preference((Turn("system", "s"), HI), "yo", "no"),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_layout_teaches_what_its_tool_means(case: str) -> None:
    given, fields, expected = READ[case]
    items, reader = read(given, fields)
    assert items == [expected]
    assert (reader.left_out, reader.unused) == ({}, {"prompt.deleted": 1} if "deleted" in reader.unused else {})


LEFT_OUT: dict[str, tuple[DataFormat, Fields, str, str]] = {
    "all weights 0": ("messages", answer(weight=0), NOT_LEARNT, "every response has weight 0"),
    "half a weight": ("messages", answer(weight=0.5), MALFORMED, "a message has the weight 0.5, which is neither"),
    "an image": ("messages", parts({"type": "image_url", "image_url": {}}), NOT_TEXT, "a message in column 'messages'"),
    "a sound": ("messages", parts({"type": "input_audio"}), NOT_TEXT, "a message in column 'messages' has a part of"),
    "null without calls": ("messages", answer(content=None), MALFORMED, "a message in column 'messages' has no text"),
    "no column": ("messages", {"mesages": HI_YO}, MALFORMED, "no column 'messages'; it has mesages"),
    "no named column": (MessagesFormat(messages="talk"), {"x": 1}, MALFORMED, "no column 'talk'; it has x"),
    "a call that is no JSON": (
        "sharegpt",
        {"conversations": said(("human", "hi"), ("function_call", "w()"), keys=("from", "value"))},
        MALFORMED,
        "a message of 'function_call' in column 'conversations' is no call in JSON",
    ),
    "a tree that is not ready": (
        "oasst",
        {"tree_state": "aborted_low_grade", "prompt": {"role": "prompter", "text": "q", "replies": []}},
        "tree not ready for export",
        "its tree_state is 'aborted_low_grade'",
    ),
    "a prompt without replies": (
        "oasst",
        {"prompt": {"role": "prompter", "text": "q", "replies": []}},
        UNANSWERED,
        "the prompt has no reply",
    ),
    "a question at the end": (
        "messages",
        {"messages": [*HI_YO, HI_YO[0]]},
        UNANSWERED,
        "the conversation ends with the",
    ),
    "a question alone": (
        "sharegpt",
        {"conversations": SHAREGPT[:1]},
        UNANSWERED,
        "the conversation ends with the user's",
    ),
    "a tool's result at the end": (
        "messages",
        {"messages": [*HI_YO, {"role": "tool", "content": "1"}]},
        UNANSWERED,
        "the conversation ends with the tool's turn",
    ),
    "a system's turn at the end": (
        "prompt-completion",
        {"prompt": HI_YO, "completion": [{"role": "system", "content": "s"}]},
        UNANSWERED,
        "the conversation ends with the system's turn",
    ),
    "a pair of questions": (
        "preference",
        {"chosen": [*HI_YO, HI_YO[0]], "rejected": [*HI_YO, {"role": "user", "content": "no"}]},
        UNANSWERED,
        "a dialogue ends with the user's turn",
    ),
    "an answer that is an object": (
        "messages",
        {"messages": [HI_YO[0], {"role": "assistant", "content": {"answer": "yo", "score": 1}}]},
        NOT_TEXT,
        "a message of 'assistant' in column 'messages' is an object (its keys: answer, score), no text",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_layout_that_cannot_be_used_is_left_out_with_its_reason(case: str) -> None:
    given, fields, reason, detail = LEFT_OUT[case]
    items, reader = read(given, fields)
    assert (items, reader.left_out) == ([], {reason: 1})
    assert reader.first_cases[reason].startswith(f"here, line 1: {detail}")


def test_messages_of_openassistant_become_trees() -> None:
    rows = [
        {"message_id": "1", "parent_id": None, "text": "hi", "role": "prompter", "rank": None, "lang": "en"},
        {"message_id": "3", "parent_id": "1", "text": "no", "role": "assistant", "rank": 1, "lang": "en"},
        {"message_id": "2", "parent_id": "1", "text": "yo", "role": "assistant", "rank": 0, "lang": "en"},
        {"message_id": "5", "parent_id": "4", "text": "lost", "role": "assistant", "lang": "en"},
    ]
    items, reader = read("oasst", *rows)
    assert items == [Example((HI, YO))]
    assert reader.first_cases == {MALFORMED: "here, line 4: its parent, '4', is not among the rows"}
    assert reader.notes == {"replies that are not ranked best, not used": 1}
    kept = [row.fields for row, _ in RowReader("oasst").read(Row(fields, "") for fields in rows)]
    assert read("oasst", *kept)[0] == items  # as a simulation writes them


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"instruction": "q", "output": "a", "conversations": SHAREGPT}], "alpaca"),
        ([{"conversations": SHAREGPT, "id": 1}], "sharegpt"),
        ([{"conversations": HI_YO}], "messages"),
        ([{"text": "t", "messages": HI_YO}], "messages"),
        ([{"prompt": "q", "completion": "a"}], "prompt-completion"),
        ([{"text": "t"}], "text"),
        ([{"question": "q", "answer": "a"}], {"columns": {"instruction": "question", "response": "answer"}}),
        (
            [{"instruction": "q", "context": "c", "response": "a", "category": "x"}],
            {"columns": {"instruction": "instruction", "input": "context", "response": "response"}},
        ),
        (
            [{"system_prompt": "s", "question": "q", "response": "a"}],
            {"columns": {"instruction": "question", "response": "response", "system": "system_prompt"}},
        ),
        ([{"nothing": 1}], "alpaca"),
        (
            [
                {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"},
                {"message_id": "2", "parent_id": "1", "text": "a", "role": "assistant"},
            ],
            "oasst",
        ),
        ([{"nothing": 1}, {"conversations": SHAREGPT}], "sharegpt"),
    ],
)
def test_a_format_is_guessed_from_the_columns(rows: list[Fields], expected: object) -> None:
    assert guessed(*rows) == expected


def test_rows_of_another_task_are_refused_with_the_name_of_that_task() -> None:
    _, reader = read("alpaca", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(ConfigError) as caught:
        reader.require_rows("rows.jsonl")
    assert caught.value.hint == (
        "They look like rows of the format preference, which is for task dpo: set task to that."
    )


def test_a_format_of_preferences_is_guessed_from_the_columns() -> None:
    talk = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert guessed(talk, task="dpo") == "hh-rlhf"
    assert guessed({"prompt": "q", "chosen": "a", "rejected": "b"}, task="dpo") == "preference"
    openai = READ["OpenAI's preference"][1]
    assert guessed(openai, task="dpo") == "openai-preference"


def test_a_guess_is_said_with_its_columns_and_never_made_where_a_format_is_given() -> None:
    rows = [Row({"id": 1, "conversations": SHAREGPT, "tools": [TOOL]}, "here")]
    told = guess_format("", None, "sft", rows, "--format").guess
    assert told == "format: sharegpt, guessed from the columns conversations, tools; --format sets another"
    assert guess_format("", "alpaca", "sft", rows, "--format").guess is None


def test_what_is_not_used_is_counted_by_column_and_key() -> None:
    rows = [
        {"id": 7, "source": None, "messages": [HI_YO[0], {**HI_YO[1], "name": "bob", "thinking": "hm"}]},
        {"id": 8, "messages": HI_YO, "images": ["a.png"], "tools": "no JSON"},
        {"id": 9, "messages": [{"role": "user", "content": ""}, HI_YO[1]]},
    ]
    _, reader = read("messages", *rows)
    assert reader.unused == {"id": 2, "messages.name": 1, "images": 1, "tools": 1}
    told = list(describe_rows(reader))
    assert told == [
        "left out: 1 empty prompt",
        "  empty prompt: first, here, line 3: empty prompt",
        "not used: id (2), images (1), messages.name (1), tools (1)",
    ]


RESULTS: list[tuple[object, str]] = [
    ({"temperature": 20, "unit": "°C"}, '{"temperature": 20, "unit": "°C"}'),
    ({}, "{}"),
    ([{"title": "a"}, {"title": "b"}], '[{"title": "a"}, {"title": "b"}]'),
    ([1, 2], "[1, 2]"),
    (20.5, "20.5"),
    (True, "true"),
]


@pytest.mark.parametrize(("given", "written"), RESULTS)
def test_a_tools_result_that_is_no_text_is_written_as_json_and_said(given: object, written: str) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [HI_YO[0], called, {"role": "tool", "content": given}, HI_YO[1]]}
    (item,), reader = read("messages", row)
    assert item == Example((HI, Turn("assistant", "", tool_calls=CALLS), Turn("tool", written), YO))
    assert reader.notes == {JSON_RESULT: 1}


def test_a_tools_result_in_parts_of_text_is_no_json() -> None:
    for given in ("20", [{"type": "text", "text": "20"}], {"type": "text", "text": "20"}, ["2", "0"]):
        items, reader = read("messages", {"messages": [HI_YO[0], {"role": "tool", "content": given}, HI_YO[1]]})
        assert (items, +reader.notes) == ([Example((HI, Turn("tool", "20"), YO))], {})


def judged(*rows: tuple[str, object], column: str = "label") -> list[Fields]:
    return [{"prompt": "q", "completion": response, column: value} for response, value in rows]


VERDICTS = {
    "numbers": judged(("yes", 1), ("no", 0), ("well", 1)),
    "one row": judged(("yes", 0)),
    "fractions": judged(("yes", 1.0), ("no", 0.0)),
    "texts of numbers, as of a .csv": judged(("yes", "1"), ("no", "0")),
    "minus one": judged(("yes", 1), ("no", -1), ("well", -1)),
    "good and bad": judged(("yes", "good"), ("no", "Bad ")),
    "chosen and rejected": judged(("yes", "chosen"), ("no", "rejected"), ("well", "rejected")),
    "thumbs": judged(("yes", "thumbs_up"), ("no", "Thumbs Down"), column="feedback"),
    "pictures of thumbs": judged(("yes", "👍"), ("no", "👎"), column="rating"),
    "a column of numbers by its name": judged(("yes", 1), ("no", 0), column="is_good"),
    "one response, both": judged(*[("yes", 1), ("yes", 0)] * 5),
    "among rows without": [*judged(("yes", None), ("no", "")), *judged(("well", 1))],
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_in_numbers_and_words_are_refused_with_a_pointer_to_kto(case: str) -> None:
    with pytest.raises(ConfigError, match="says whether a response is good") as caught:
        read("prompt-completion", *VERDICTS[case])
    assert "Task kto" in caught.value.hint


CLASSES = {
    "of answers that repeat": judged(*[("positive", 1), ("negative", 0)] * 2),
    "three of them": judged(("up", 1), ("down", -1), ("flat", 0)),
    "stars": judged(("a", 1), ("b", 5), column="rating"),
    "words": judged(("a", "good"), ("b", "bad"), ("c", "mixed")),
    "topics": judged(("a", "sport"), ("b", "science")),
    "the response itself": judged(*[("good", "good"), ("bad", "bad")] * 2),
    "of another column": judged(("a", 1), ("b", 0), column="is_long"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_class_beside_an_answer_is_no_verdict(case: str) -> None:
    items, reader = read("prompt-completion", *CLASSES[case])
    column = next(name for name in CLASSES[case][0] if name not in ("prompt", "completion"))
    assert (len(items), reader.unused) == (len(CLASSES[case]), {column: len(items)})


@pytest.mark.parametrize("label", [True, False, "true", "False"])
@pytest.mark.parametrize("given", ["prompt-completion", "columns", "messages", "alpaca"])
def test_single_verdicts_are_refused_with_a_pointer_to_kto(given: str, label: object) -> None:
    row = {"prompt": "q", "completion": "x", "instruction": "q", "output": "x", "messages": HI_YO, "label": label}
    columns = ColumnsFormat(columns=Columns(instruction="prompt", response="completion"))
    with pytest.raises(ConfigError, match="line 1: column 'label' says whether a response is good") as caught:
        read(columns if given == "columns" else given, row)
    assert "Task kto" in caught.value.hint


def test_a_label_that_is_an_answer_is_no_verdict() -> None:
    columns = ColumnsFormat(columns=Columns(instruction="sentence", response="label"))
    (item,), _ = read(columns, {"sentence": "s", "label": "true"})
    assert item == instruct("s", "true")
    assert len(read("alpaca", {"instruction": "q", "output": "a", "label": "sport"})[0]) == 1


@pytest.mark.parametrize(
    ("prompt", "contradicts"),
    [("hi", False), ("hi ", False), ("", False), ("other", True), (HI_YO[:1], False), (said(("user", "x")), True)],
)
def test_a_prompt_that_contradicts_its_dialogues_is_counted(prompt: object, contradicts: bool) -> None:
    row = {"prompt": prompt, "chosen": HI_YO, "rejected": [HI_YO[0], *said(("assistant", "no"))]}
    items, reader = read("preference", row)
    assert items == [Preference((HI,), "yo", "no")]
    assert +reader.notes == ({"prompt that is not the dialogues', not used": 1} if contradicts else {})


FILES = {
    "sharegpt.json": ("sharegpt", 100, {"id": 100}),
    "sharegpt_tools.json": ("sharegpt", 100, {}),
    "openai_tools.jsonl": ("messages", 6, {"messages.tool_call_id": 6}),
    "messages_null.jsonl": ("messages", 6, {"prompt": 6, "prompt_id": 6}),
    "developer_role.jsonl": ("messages", 6, {}),
    "alpaca_history.json": ("alpaca", 6, {}),
    "oasst_flat.jsonl": ("oasst", 4, None),
    "oasst_tree.jsonl": ("oasst", 6, None),
    "openai_preference.jsonl": ("openai-preference", 6, {"input.parallel_tool_calls": 6}),
    "semicolon.csv": ("alpaca", 6, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_tool_is_read_whole(name: str) -> None:
    if not (LAYOUTS / name).exists():
        pytest.skip(f"{LAYOUTS / name} is not here; FEDCLI_TEST_DATA names its folder")
    expected, num_rows, unused = FILES[name]
    task = "dpo" if "preference" in name else "sft"
    choice = guess_format("", None, task, Source(LAYOUTS / name).rows(), "data.format")
    assert choice.format == expected
    reader = RowReader(choice.format)
    items = list(reader.read(Source(LAYOUTS / name).rows()))
    assert (len(items), reader.left_out) == (num_rows, {})
    assert unused is None or reader.unused == unused


def rows_of(path: Path, **options: str) -> list[Fields]:
    return [dict(row.fields) for row in find_source(str(path), path.parent, **options).rows()]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_separator_of_a_csv_is_seen_in_its_header_and_said(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(separator.join(["a", "b"]) + "\n" + separator.join(["1, 2", "3"]) + "\n")
    assert rows_of(path) == [{"a": "1, 2", "b": "3"}]
    assert find_source(str(path), tmp_path).remarks() == [
        f"{path}: its cells are separated by {separator!r}, as its header shows"
    ]


def test_a_named_separator_and_encoding_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("sätze,x@label\neins@gut\n".encode("latin-1"))
    assert rows_of(path, delimiter="@", encoding="latin-1") == [{"sätze,x": "eins", "label": "gut"}]
    with pytest.raises(ConfigError, match="is not UTF-8 text") as caught:
        rows_of(path)
    assert "data.encoding" in caught.value.hint
    path.write_text("a,b\n1,2\n", encoding="utf-8-sig")
    assert rows_of(path, encoding="utf8") == [{"a": "1", "b": "2"}]
    with pytest.raises(ConfigError, match="begins with the mark of UTF-8, and is to be read as cp1252"):
        rows_of(path, encoding="cp1252")


@pytest.mark.parametrize("fault", ["delimiter: ';;'", "delimiter: ''", "encoding: latin-one", "encoding: base64"])
def test_a_separator_or_encoding_that_is_none_is_a_fault_of_its_key(fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{fault.split(':')[0]}: .* (delimiter|encoding)"):
        parse_config(yaml.safe_load(f"data: {{{fault}}}"), Path("fedcli.yaml"))


WRAPPED: dict[str, str] = {
    "pretty": json.dumps({"a": 1}, indent=1),
    "pretty, several": json.dumps({"a": 1}, indent=2) + "\n" + json.dumps({"a": 1}, indent=2),
    "on one line": '{"a": 1}{"a": 1} {"a": 1}',
    "data": json.dumps({"version": "1", "data": [{"a": 1}, {"a": 1}]}),
    "data, pretty": json.dumps({"data": [{"a": 1}]}, indent=4),
    "rows in data": json.dumps({"data": {"rows": [{"a": 1}, {"a": 1}]}}),
    "train in data": json.dumps({"status": "ok", "data": {"train": [{"a": 1}]}}, indent=1),
    "rows": json.dumps({"features": [], "rows": [{"a": 1}], "num_rows_total": 1}),
    "one row a line": '\n{"a": 1}\n\n{"a": 1}\n',
}


@pytest.mark.parametrize("case", WRAPPED)
def test_objects_are_read_however_they_stand_in_a_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(WRAPPED[case])
    rows = rows_of(path)
    assert rows == [{"a": 1}] * WRAPPED[case].count('"a"')


def test_a_single_row_that_holds_a_list_of_messages_stays_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": HI_YO}))
    assert rows_of(path) == [{"messages": HI_YO}]


def test_a_broken_object_over_several_lines_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{\n "a": 1,\n "b": oops\n}\n')
    with pytest.raises(ConfigError, match=r"rows\.json, line 3 is not JSON"):
        rows_of(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_ROWS: dict[str, tuple[str, bytes, str]] = {
    "git-lfs": (
        "r.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pointer of git-lfs",
    ),
    "git-lfs, parquet": ("r.parquet", LFS, "a pointer of git-lfs"),
    "git-annex": ("r.csv", b"/annex/objects/SHA256E-s1--0.csv\n", "a pointer of git-annex"),
    "a page": ("r.json", b"\n<!DOCTYPE html><html></html>", "a web page"),
    "gzip": ("r.jsonl", b"\x1f\x8b\x08\x00", "packed by gzip"),
    "parquet": ("r.jsonl", b"PAR1\x15\x04", "a parquet file"),
    "a sheet": ("r.csv", b"PK\x03\x04", "a zip archive or a spreadsheet"),
    **{f"*.{end}": (f"r.jsonl.{end}", b"x", f"it is packed as .{end}") for end in ("zst", "zip", "xz", "bz2")},
    "*.xlsx": ("r.xlsx", b"PK", "rows are read from"),
}


@pytest.mark.parametrize("case", NO_ROWS)
def test_a_file_that_holds_something_else_is_refused_in_a_sentence_of_its_own(tmp_path: Path, case: str) -> None:
    name, contents, problem = NO_ROWS[case]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ConfigError, match=problem):
        rows_of(tmp_path / name)


def test_a_folder_says_which_kinds_it_reads_and_what_it_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "1"}\n')
    (tmp_path / "b.csv").write_text("a\n2\n")
    (tmp_path / "c.jsonl.zst").write_bytes(b"x")
    assert rows_of(tmp_path) == [{"a": "1"}, {"a": "2"}]
    assert find_source(str(tmp_path), tmp_path).remarks() == [
        f"{tmp_path}: files of several kinds are read, a.jsonl, b.csv",
        f"{tmp_path}: not read, c.jsonl.zst",
    ]


TELLS = [
    {"id": 1, "conversations": SHAREGPT},
    {"id": 2, "conversations": SHAREGPT},
    {"id": 3, "conversations": SHAREGPT[:1]},
    {"id": 4, "conversations": [{"from": "human", "value": [{"type": "image"}]}, SHAREGPT[1]]},
]


def told_of(path: Path) -> list[str]:
    no_answer = "the conversation ends with the user's turn"
    return [
        "  no answer at the end: first, " + f"{path}, line 3: {no_answer}",
        "  not text alone: first, " + f"{path}, line 4: a message in column 'conversations' has a part of type 'image'",
    ]


@pytest.fixture
def sharegpt_rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TELLS))
    return path


GUESS = "format: sharegpt, guessed from the columns conversations; data.format sets another"


@pytest.mark.slow
def test_init_says_what_it_guessed_left_out_and_did_not_use(
    sharegpt_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = runner(capsys), tmp_path / "w"
    few = (*SMALL, "federation.clients=2", "data.partition=iid", f"data.source={sharegpt_rows}")
    code, out, err = run("init", place, *settings(*few))
    assert code == 0, err
    assert out.splitlines()[1:7] == [
        GUESS,
        "rows: 4 read, 2 given to 2 clients, 1 each",
        "left out: 1 no answer at the end, 1 not text alone",
        *told_of(sharegpt_rows),
        "not used: id (2)",
    ]
    assert json.loads((place / "data/card.json").read_text())["formats"] == ["sharegpt", "sharegpt"]
    code, out, _ = run("init", tmp_path / "v", *settings(*few, "federation.seed=1"), "--json")
    assert json.loads(out)["data"]["remarks"] == [GUESS]


@pytest.mark.slow
def test_training_on_rows_written_by_hand_says_what_is_guessed_and_not_used(
    sharegpt_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, place = runner(capsys), tmp_path / "w"
    source = ("federation.clients=1", "federation.per_round=1", "data.partition=iid", f"data.source={sharegpt_rows}")
    assert run("init", place, *settings(*SMALL, *source))[0] == 0
    (place / "data/card.json").unlink()
    (place / "data/client-0.jsonl").write_bytes(sharegpt_rows.read_bytes())
    rows = place / "data/client-0.jsonl"
    code, out, err = run("client", "train", "--id", 0, "-w", place)
    assert code == 0, err
    assert out.splitlines()[-3:] == [*told_of(rows), "not used: id (2)"]
    code, out, err = run("data", "preview", "-w", place)
    assert code == 0, err
    lines = out.splitlines()
    assert [line for line in (GUESS, *told_of(rows), "not used: id (2)") if line not in lines] == []


@pytest.mark.slow
def test_a_party_sees_what_was_guessed_and_left_out_and_the_workspace_gets_counts(
    sharegpt_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    run, place = runner(capsys), tmp_path / "w"
    code, _, err = run(
        "init", place, *settings(*SMALL, "data.partition=iid", "data.source=null", "federation.signatures=off")
    )
    assert code == 0, err
    code, out, err = run("client", "join", "--id", 0, "--data", sharegpt_rows, "-w", place)
    assert code == 0, err
    assert out.splitlines()[:5] == [
        GUESS.replace("data.format", "--format"),
        "left out: 1 no answer at the end, 1 not text alone",
        *told_of(sharegpt_rows),
        "not used: id (2)",
    ]
    card = (place / "clients/0.json").read_text()
    assert json.loads(card)["data"]["left_out"] == {"no answer at the end": 1, "not text alone": 1}
    assert "conversations" not in card
    assert str(sharegpt_rows) not in card
    code, out, err = run("client", "train", "--id", 0, "-w", place)
    assert code == 0, err
    assert out.splitlines()[-2:] == told_of(sharegpt_rows)
    code, out, err = run("data", "preview", "--id", 0, "-w", place)
    assert code == 0, err
    assert [line for line in out.splitlines() if line in told_of(sharegpt_rows)] == told_of(sharegpt_rows)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_a_text_is_learnt_whole_with_the_end_token_and_without_a_template(template: str) -> None:
    from fedcli.data.encoding import Encoder
    from fedcli.model.base import find_base
    from fedcli.model.loading import load_tokenizer

    tokenizer = load_tokenizer(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
    if template == "chat":
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    items, _ = read("text", {"text": "The harvest of wheat was good."})
    (row,) = Encoder(tokenizer, template).encode(items, 512)
    (side,) = row.sides
    ids = tokenizer("The harvest of wheat was good.")["input_ids"]
    plain = tokenizer("The harvest of wheat was good.", add_special_tokens=False)["input_ids"]
    ids = ids if ids[-1] != tokenizer.eos_token_id else ids[:-1]
    assert side.ids.tolist() == [*ids, tokenizer.eos_token_id]
    assert side.supervised.tolist() == [False] * (len(ids) - len(plain)) + [True] * (len(plain) + 1)


@pytest.mark.slow
def test_the_first_loss_of_texts_is_the_models_own_over_all_their_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedcli.model.base import find_base

    texts = ["The wheat ripens.", "A striker scores twice, and the home side wins.", "The fund soars.", "It floods."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run, place = runner(capsys), tmp_path / "w"
    one = ("federation.clients=1", "federation.per_round=1", "data.partition=iid", f"data.source={path}")
    code, _, err = run("init", place, *settings(*SMALL, *one))
    assert code == 0, err
    code, out, err = run("client", "train", "--id", 0, "-w", place, "--json")
    assert code == 0, err
    folder = find_base("builtin:tiny", revision=None, root=Path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])  # with its start token
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert json.loads(out)["first_loss"] == pytest.approx(total / count, abs=1e-4)
