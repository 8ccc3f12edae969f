"""Publishers' own files as rows of the hub's data sets, for which lm-eval's tasks are written.

Each function returns splits by task of lm-eval, of those tasks whose files are there, and reads the split that examples
for prompts come from only where it is wanted (else it is empty). They raise ConfigError for a row that is not as
published, with file and row, and RequirementError where the examples are missing.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcli.data.file_rows import Row
from fedcli.data.source import Source
from fedcli.errors import ConfigError
from fedcli.eval.data import Files
from fedcli.eval.lm_eval_bridge import Fields, Splits

MATH_TASKS = {
    "Algebra": "hendrycks_math_algebra",
    "Counting & Probability": "hendrycks_math_counting_and_prob",
    "Geometry": "hendrycks_math_geometry",
    "Intermediate Algebra": "hendrycks_math_intermediate_algebra",
    "Number Theory": "hendrycks_math_num_theory",
    "Prealgebra": "hendrycks_math_prealgebra",
    "Precalculus": "hendrycks_math_precalc",
}
"""By `type` of a row of MATH."""


def mmlu(subjects: Sequence[str], files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read test/SUBJECT_test.csv and dev/SUBJECT_dev.csv: letters and no header, or numbers and one."""
    tasks: dict[str, Splits] = {}
    for subject in subjects:
        if test := files.find(f"test/{subject}_test.csv"):
            dev = files.require(f"dev/{subject}_dev.csv") if with_examples else []
            tasks[f"mmlu_{subject}"] = {"test": _mmlu_rows(test), "dev": _mmlu_rows(dev)}
    return tasks


def _mmlu_rows(paths: list[Path]) -> list[Fields]:
    rows = []
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [cells for cells in csv.reader(file) if cells]
        if lines and lines[0][0] == "question" and lines[0][-1] == "answer":
            del lines[0]
        for number, cells in enumerate(lines, 1):
            answer = cells[-1].strip()
            if len(cells) != 6 or len(answer) != 1 or answer not in "ABCD0123":
                raise _bad(f"{path}, row {number}", "a question, four choices, and A to D (or 0 to 3)")
            rows.append({"question": cells[0], "choices": cells[1:5], "answer": "ABCD0123".index(answer) % 4})
    return rows


def bbh(tasks: Mapping[str, Sequence[str]], files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read NAME.json, {canary, examples: [{input, target}]}, by task; the examples of prompts are lm-eval's own."""
    found: dict[str, Splits] = {}
    for task, (name,) in tasks.items():
        for path in files.find(f"{name}.json"):
            found[task] = {"test": [{key: _text(row, key) for key in ("input", "target")} for row in _examples(path)]}
    return found


def crass(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read BIG-bench's JSON, {examples: [{input, target_scores}]}, or the list of examples alone.

    A question is written as BIG-bench writes it (its documentation, "example_input_prefix"), with the choices in an
    order that tells nothing, that of their hashes; the hub's rows hold another draw.
    """
    rows = []
    for path in files.find()[:1]:
        for row in _examples(path):
            scores = _take(row, "target_scores", dict)
            if sorted(scores.values()) != [0] * (len(scores) - 1) + [1]:
                raise _bad(row.where, "target_scores with one 1 and else 0")
            shuffled = sorted(scores, key=lambda choice: hashlib.sha256(choice.encode()).digest())
            question = "".join([f"Q: {_text(row, 'input')}", *(f"\n  choice: {choice}" for choice in shuffled), "\nA:"])
            right = [choice for choice, score in scores.items() if score == 1]
            rows.append({"inputs": question, "targets": right, "multiple_choice_targets": list(scores)})
    return {"bigbench_crass_ai_multiple_choice": {"default": rows}}


def drop(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read drop_dataset_dev.json (passages with qa_pairs), or rows of either data set of the hub."""
    return {"drop": {"validation": _drop_rows(files.find()), "train": _drop_rows(_train(files, with_examples))}}


def _drop_rows(paths: list[Path]) -> list[Fields]:
    rows = []
    for path in paths:
        if not path.name.startswith("drop_dataset_"):
            rows += [_drop_row(row, row.fields) for row in Source(path).rows()]
            continue
        for passage in _keyed(path):
            pairs = _take(passage, "qa_pairs", list)
            rows += [_drop_row(Row(pair, passage.where), passage.fields) for pair in pairs]
    return rows


def _drop_row(row: Row, passage: Mapping[str, Any]) -> Fields:
    if "answers_spans" in row.fields:
        spans = Row(_take(row, "answers_spans", dict), row.where)
        answers: list[Mapping[str, Any]] = [{"spans": _take(spans, "spans", list)}]
    else:
        answers = [_take(row, "answer", dict), *_validated(row.fields.get("validated_answers") or [])]
    uniform = [_drop_answer(answer) for answer in answers]
    if not (uniform[0]["number"] or uniform[0]["spans"] or any(uniform[0]["date"].values())):
        raise _bad(row.where, "an answer: number, date or spans")
    names = ("number", "date", "spans")
    return {
        "query_id": _text(row, "query_id"),
        "passage": _text(Row(passage, row.where), "passage"),
        "question": _text(row, "question"),
        "answer": uniform[0],
        "validated_answers": {name: [answer[name] for answer in uniform[1:]] for name in names},
    }


def _validated(answers: Any) -> list[Mapping[str, Any]]:
    """Return further answers one by one; the hub has a dict of lists."""
    if isinstance(answers, dict):
        return [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]
    return list(answers)


def _drop_answer(answer: Mapping[str, Any]) -> Fields:
    date = answer.get("date") or {}
    return {
        "number": str(answer.get("number") or ""),
        "date": {part: str(date.get(part) or "") for part in ("day", "month", "year")},
        "spans": list(answer.get("spans") or []),
    }


def gsm8k(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read test.jsonl: question, answer that ends in "#### N"; the examples of prompts are lm-eval's own."""
    rows = []
    for row in _rows(files.find()):
        if "####" not in _text(row, "answer"):
            raise _bad(row.where, 'an answer that ends in "#### N"')
        rows.append({"question": _text(row, "question"), "answer": _text(row, "answer")})
    return {"gsm8k_cot": {"test": rows}}


def math(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read MATH's folders of one JSON file for each problem, or .jsonl files with the same fields."""
    tests = _math_rows(files.find())
    trains = _math_rows(_train(files, with_examples))
    return {task: {"test": rows, "train": trains.get(task, [])} for task, rows in tests.items()}


def _math_rows(paths: list[Path]) -> dict[str, list[Fields]]:
    tasks: dict[str, list[Fields]] = {}
    for path in paths:
        for row in [Row(_document(path), str(path))] if path.suffix == ".json" else Source(path).rows():
            task = MATH_TASKS.get(_text(row, "type"))
            solution = _text(row, "solution")
            if task is None or ("\\boxed " not in solution and boxed(solution) is None):
                raise _bad(row.where, f"a type ({', '.join(MATH_TASKS)}) and a solution with \\boxed{{ANSWER}}")
            tasks.setdefault(task, []).append({"problem": _text(row, "problem"), "solution": solution})
    return tasks


def boxed(text: str) -> str | None:
    """Return what the last \\boxed{...} of a text holds, braces in it balanced; None where there is none."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for position, letter in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:position]
    return None


def medqa(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read MedQA's US questions with four options: question, options {A..D}, answer_idx."""
    train = _train(files, with_examples)
    return {"medqa_4options": {"test": _medqa_rows(files.find()), "train": _medqa_rows(train), "validation": []}}


def _medqa_rows(paths: list[Path]) -> list[Fields]:
    rows = []
    for row in _rows(paths):
        options, answer = _take(row, "options", dict), _text(row, "answer_idx")
        if sorted(options) != list("ABCD") or answer not in options:
            raise _bad(row.where, "options A, B, C and D, and one of them as answer_idx")
        endings = {f"ending{number}": options[letter] for number, letter in enumerate("ABCD")}
        rows.append({"sent1": _text(row, "question"), **endings, "label": "ABCD".index(answer)})
    return rows


def medmcqa(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read MedMCQA: dev.json, where `cop` counts from 1, or the hub's rows, where it counts from 0."""
    train = _medmcqa_rows(_train(files, with_examples))
    return {"medmcqa": {"validation": _medmcqa_rows(files.find()), "train": train}}


def _medmcqa_rows(paths: list[Path]) -> list[Fields]:
    rows = []
    for path in paths:
        first = int(path.suffix == ".json")
        for row in Source(path).rows():
            answer = _take(row, "cop", int) - first
            if not 0 <= answer < 4:
                raise _bad(row.where, f"cop from {first} to {first + 3}")
            texts = {name: _text(row, name) for name in ("question", "opa", "opb", "opc", "opd")}
            rows.append(texts | {"cop": answer})
    return rows


CAREQA_CHOICES = ("op1", "op2", "op3", "op4")
UNWRITTEN = "5636d1af-e0b1-43b0-8a04-6f127dcf6785"
"""The row of CareQA whose question is null in the published file; lm-eval's task has its words."""


def careqa(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read CareQA_en.json, or the hub's rows: question, op1 to op4, and `cop`, which counts from 1."""
    rows = []
    for row in _rows(files.find()):
        answer = _take(row, "cop", int)
        if not 1 <= answer <= 4:
            raise _bad(row.where, "cop from 1 to 4")
        is_unwritten = row.fields.get("unique_id") == UNWRITTEN and row.fields.get("question") is None
        question = None if is_unwritten else _text(row, "question")
        rows.append({name: _text(row, name) for name in CAREQA_CHOICES} | {"question": question, "cop": answer})
    return {"careqa_en": {"test": rows}}


def pubmedqa(files: Files, with_examples: bool) -> dict[str, Splits]:
    """Read PubMedQA's test_set.json, ori_pqal.json (of it the ids of test_ground_truth.json), or the hub's rows.

    The examples are the labelled questions that are not in the test set.
    """
    paths = files.find()
    rows = [row for path in paths for row in ([*_keyed(path)] if path.suffix == ".json" else Source(path).rows())]
    chosen = {key for path in files.find("test_ground_truth.json") for key in _document(path)}
    test: list[Fields] = []
    rest: list[Fields] = []
    for row in rows:
        fields = row.fields
        context = fields.get("context")
        if isinstance(context, dict):
            converted = {"QUESTION": _text(row, "question"), "CONTEXTS": context.get("contexts")}
        else:
            converted = {"QUESTION": _text(row, "QUESTION"), "CONTEXTS": fields.get("CONTEXTS")}
        decision = _text(row, "final_decision")
        if decision not in ("yes", "no", "maybe") or not isinstance(converted["CONTEXTS"], list):
            raise _bad(row.where, "contexts, and yes, no or maybe as final_decision")
        key = str(fields.get("pubid", fields.get("id")))
        (test if not chosen or key in chosen else rest).append(converted | {"final_decision": decision})
    return {"pubmedqa": {"test": test, "train": rest, "validation": []}}


def _train(files: Files, wanted: bool) -> list[Path]:
    """Return the files of the training part, whose names are like those of the other; none where it is not wanted."""
    patterns = (re.sub("validation|test|dev", "train", pattern) for pattern in files.source.files)
    return files.require(*patterns) if wanted else []


def _rows(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        yield from Source(path).rows()


def _examples(path: Path) -> list[Row]:
    document = _document(path)
    examples = document.get("examples") if isinstance(document, dict) else document
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise _bad(str(path), "a list of examples")
    return [Row(example, f"{path}, example {number}") for number, example in enumerate(examples, 1)]


def _keyed(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file that names each by its id."""
    document = _document(path)
    if not isinstance(document, dict):
        raise _bad(str(path), "an object of objects, by id")
    for key, fields in document.items():
        where = f"{path}, {key}"
        if not isinstance(fields, dict):
            raise _bad(where, "an object")
        yield Row({"id": key, **fields}, where)


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", hint="Fetch the file again.") from error


def _text(row: Row, name: str) -> str:
    text: str = _take(row, name, str)
    return text


def _take(row: Row, name: str, kind: type) -> Any:
    value = row.fields.get(name)
    if not isinstance(value, kind):
        raise _bad(row.where, f"{name} ({kind.__name__})")
    return value


def _bad(where: str, wanted: str) -> ConfigError:
    return ConfigError(f"{where} is not as published: it should hold {wanted}", hint="Fetch the file again.")
