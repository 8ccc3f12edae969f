"""What others wrote steers no terminal, no page and no spreadsheet, wherever fedcli shows it."""

import ast
import json
import re
from pathlib import Path

import pytest
from support.processes import Run, runner

import fedcli
from fedcli.commands.output import print_json, tell, terminal
from fedcli.printable import in_csv, in_markdown, on_one_line, printable
from fedcli.report.page import render
from fedcli.report.series import Report

ATTACKS = {
    "the window's title": "\x1b]0;owned\x07",
    "colours": "\x1b[8mhidden\x1b[0m",
    "the clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "a control sequence of one byte": "\x9b2J",
    "an erased line": "all is well\r\x08\x08",
    "a reversed text": "\u202egnp.exe\u2066",
    "a mark of order": "\u200fabc\u061c",
    "another kind of line": "a\u2028fedcli: error",
    "an invisible tag": "a\U000e0041b",
    "half a pair": "a\ud800b",
    "deleted": "a\x7fb",
    "no width": "a\u200bb\ufeff",
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def is_harmless(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text)


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_a_foreign_text_is_printed_with_its_control_characters_written_out(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(text)
    tell(text, is_error=True)
    terminal(width=200, force_terminal=True, highlight=False, color_system=None).print(text, markup=False)
    print_json({text: [text]})
    out, err = capsys.readouterr()
    assert is_harmless(out + err)
    assert json.loads(out.splitlines()[-1]) == {text: [text]}


@pytest.mark.parametrize("text", ["", "Grüße, 你好 🙂", "क्‍ष", "می‌خواهم", "a\tb\nc", "\u00a0"])
def test_what_people_write_is_printed_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_nothing_prints_but_through_the_one_seam() -> None:
    folder = Path(fedcli.__file__).parent
    places = set()
    for path in folder.rglob("*.py"):
        text = path.read_text()
        if not re.search(r"\b(print|echo|secho|print_exception|Console)\(", text):
            continue
        for node in ast.walk(ast.parse(text)):
            called = getattr(node.func, "id", getattr(node.func, "attr", None)) if isinstance(node, ast.Call) else None
            if called in ("print_exception", "secho", "Console") or (
                called in ("print", "echo") and isinstance(node.func, ast.Name)
            ):
                places.add(path.relative_to(folder).as_posix())
    assert places <= {"commands/output.py"}


@pytest.mark.slow
@pytest.mark.parametrize("command", [["verify"], ["eval", "table"], ["report"], ["gc"], ["status"]])
def test_names_on_the_disk_steer_no_terminal(
    small: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(small)
    for text in ("\x1b]0;owned\x07", "\u202e", "x\nno violation"):
        for folder in ("rounds", "inbox", "eval", "clients"):
            (small / folder / text).mkdir(parents=True)
            (small / folder / text / "x.json").write_text("{}")
    _, out, err = run(*command)
    assert is_harmless(out + err)
    assert "no violation" not in out.splitlines()


@pytest.mark.slow
def test_a_round_of_somebody_elses_making_steers_no_terminal_and_no_page(
    small: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    hostile = "\x1b[31m\u202e<script>[/x]"
    path = small / "rounds/00000/manifest.json"
    document = json.loads(path.read_bytes())
    document["model"]["base"] = hostile
    path.write_text(json.dumps(document))
    for command in (["status"], ["report"], ["verify"], ["doctor"], ["client", "status", "--id", "0"]):
        _, out, err = run(*command)
        assert is_harmless(out + err), command
    page = (small / "report/report.html").read_text()
    assert is_harmless(page)
    assert "<script>" not in page


def test_no_control_character_gets_into_a_report() -> None:
    text = "".join(ATTACKS.values())
    facts = {"base model": text, "algorithm": text, text: text}
    words = {"title": text, "state": text, "task": text, "config": text, "created": text, "versions": {text: text}}
    report = Report(
        **words,
        round=0,
        rounds=1,
        num_clients=1,
        is_simulation=False,
        facts=facts,
        merged=[],
        scores=[],
        similarities=[],
        notes=[text],
    )
    assert is_harmless(render(report, []))


FORMULAS = ['=HYPERLINK("http://x","y")', "+1+1", "-2+3", "@SUM(A1)", "\t=1+1", "  =1+1", "|calc", "\r=1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_table_for_a_spreadsheet_holds_no_formula(text: str) -> None:
    assert in_csv(text)[0] not in "=+-@\t\r|% " or in_csv(text)[0] == "'" or in_csv(text).startswith("\\r")
    assert in_csv(-0.5) == -0.5


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "a|b", "a\n# b", "[a](javascript:b)", "`a`", "**a**"])
def test_a_table_of_markdown_holds_no_markup_of_a_name(text: str) -> None:
    shown = in_markdown(text)
    assert "\n" not in shown
    assert not set("<>") & set(shown)
    assert all(shown[position - 1] == "\\" for position, letter in enumerate(shown) if letter in "|[]`*")


def test_a_line_of_its_own_cannot_be_faked() -> None:
    assert on_one_line("rounds/x\nno violation") == "rounds/x\\nno violation"
