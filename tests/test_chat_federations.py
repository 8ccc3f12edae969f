"""Federations whose base has a chat template: what preview says is what training does, on one day for all."""

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as library
from support.processes import settings
from support.trl_templates import tokenizer_of

from fedcli import cli
from fedcli.config import Config
from fedcli.data import chat_template
from fedcli.data.encoding import Encoder
from fedcli.data.segments import EARLIER
from fedcli.model.base import find_base
from fedcli.scoring.engines import Models
from fedcli.scoring.targets import Target
from fedcli.server.open_round import train_record
from fedcli.tasks.conversation import Turn
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace

THOUGHTS = [
    [("And two?", "<think>\nhm hm\n</think>\n\nIt is 2.")],
    [("And three?", "<think>\nhm hm\n</think>\n\nIt is 3.")],
    [("And four?", "<think>\nhm hm\n</think>\n\nIt is 4."), ("And six?", "<think>\nhm hm\n</think>\n\nIt is 6.")],
    [("And five?", "It is 5.")],
]
SEVERAL = [[("Hi", f"Hello {n}"), ("And then?", f"It is {n}.")] for n in range(4)]


def fedcli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one command in this process, where torch is loaded once, and return what it printed and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def base_with(family: str, folder: Path) -> Path:
    """Make the built-in base with another tokenizer, which has the chat template of a family."""
    shutil.copytree(find_base("builtin:tiny", revision=None, root=folder), folder / "base")
    for path in (folder / "base").glob("*token*"):
        path.unlink()
    tokenizer_of(family).save_pretrained(folder / "base")
    return folder / "base"


def write_rows(path: Path, conversations: list[list[tuple[str, str]]]) -> None:
    rows = [
        {"messages": [{"role": role, "content": text} for pair in each for role, text in zip(ROLES, pair, strict=True)]}
        for each in conversations
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROLES = ("user", "assistant")


def made(folder: Path, family: str, conversations: list[list[tuple[str, str]]], *more: str) -> Path:
    base_with(family, folder)
    write_rows(folder / "rows.jsonl", conversations)
    wanted = ("federation.clients=1", "federation.rounds=2", "train.steps=2", "train.batch_size=2", "adapter.rank=2")
    wanted += ("adapter.target_modules=[q_proj]", "data.partition=iid", "data.format=messages", "data.template=chat")
    wanted += (f"model.base={folder / 'base'}", "data.source=rows.jsonl", "train.max_length=512")
    done = fedcli("init", "ws", *settings(*wanted, *more), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "ws"


def document(*arguments: object, cwd: Path) -> Any:
    done = fedcli(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def counts_of_both(workspace: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return what preview and training say of rows that are left out, or of which not all is used."""
    preview = document("data", "preview", cwd=workspace)["clients"][0]
    training = document("client", "train", "--id", 0, cwd=workspace)
    assert preview["num_rows"] == training["num_samples"]
    assert (preview["left_out"], preview["notes"]) == (training["left_out"], training["notes"])
    return training["left_out"], training["notes"]


@pytest.mark.slow
def test_thoughts_are_learnt_and_what_is_not_is_told_by_preview_and_training_alike(tmp_path: Path) -> None:
    workspace = made(tmp_path, "qwen3", THOUGHTS)
    assert counts_of_both(workspace) == ({}, {EARLIER: 1})
    shown = fedcli("data", "preview", cwd=workspace).stdout
    assert "«<think>\nhm hm\n</think>\n\nIt is" in shown
    assert f"noted: {EARLIER}: 1 row\n" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "notes"),
    [("phi3", {}), ("phi3_5", {}), ("gptoss", {}), ("deepseekv3", {}), ("qwen3_6", {EARLIER: 4})],
)
def test_of_several_turns_all_are_learnt_or_the_number_is_told(tmp_path: Path, family: str, notes: Any) -> None:
    assert counts_of_both(made(tmp_path, family, SEVERAL)) == ({}, notes)


def test_preview_says_why_a_row_is_left_out_and_counts_it_as_training_does(tmp_path: Path) -> None:
    spelt = [("q", "a <|im_end|> b")]
    workspace = made(tmp_path, "qwen3", [*SEVERAL, spelt, [("long " * 200, "a")]], "train.max_length=128")
    left_out, _ = counts_of_both(workspace)
    assert left_out == {"malformed": 1, "too long": 1}
    shown = fedcli("data", "preview", "--rows", 6, cwd=workspace).stdout
    assert "not used: malformed: a special token is spelt out in the text" in shown
    assert "not used: too long: the prompt has " in shown
    table = shown.partition("tokens: the median of its rows")[2]
    for reason, detail in (
        ("1 malformed", "a special token is spelt out in the text"),
        ("1 too long", "the prompt has"),
    ):
        assert reason in table
        assert detail in table


def test_preview_and_training_say_alike_that_no_row_is_usable(tmp_path: Path) -> None:
    workspace = made(tmp_path, "gemma", [[("q", "a <end_of_turn> b")]] * 3)
    found = [fedcli(*each, cwd=workspace) for each in (("data", "preview"), ("client", "train", "--id", 0))]
    assert [done.returncode for done in found] == [3, 3]
    for done in found:
        assert "none of its 3 rows is usable" in done.stderr
        assert "a special token is spelt out in the text" in done.stderr
        assert "internal error" not in done.stderr
        assert "train.max_length" not in done.stderr.partition("Mend")[2]


class Later(library.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Later":
        return cls(2031, 5, 4, tzinfo=tz)


def on_another_day(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chat_template, "today", lambda: "2031-05-04")
    patch.setattr(library, "datetime", Later)


def update_of(workspace: Path) -> bytes:
    (found,) = workspace.glob("**/inbox/0/**/adapter_model.safetensors")
    return found.read_bytes()


def test_a_template_with_the_day_writes_that_of_round_0_whenever_a_client_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = made(tmp_path, "llama3_2", SEVERAL)
    manifest = json.loads((workspace / "rounds/00000/manifest.json").read_bytes())
    assert manifest["train"]["date"] == chat_template.today()
    shutil.copytree(workspace, tmp_path / "later")
    document("client", "train", "--id", 0, cwd=workspace)
    with monkeypatch.context() as patch:
        on_another_day(patch)
        document("client", "train", "--id", 0, cwd=tmp_path / "later")
        document("server", "aggregate", cwd=tmp_path / "later")
    assert update_of(workspace) == update_of(tmp_path / "later")
    second = json.loads((tmp_path / "later/rounds/00001/manifest.json").read_bytes())
    assert second["train"]["date"] == manifest["train"]["date"]
    head = FederationState.open(Workspace(workspace)).head
    models = Models(head, lambda name: None, None, "chat", head.manifest.train.date)  # type: ignore[arg-type, return-value] # none is loaded
    assert models.identity(Target(0, {}))["date"] == manifest["train"]["date"]


@pytest.mark.slow
def test_a_workspace_of_before_the_key_writes_todays_day_and_never_another_days_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = made(tmp_path, "llama3_2", SEVERAL)
    path = workspace / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["train"]["date"], manifest["checksum"]
    path.write_text(json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    document("client", "train", "--id", 0, cwd=workspace)
    (first,) = workspace.glob("**/tokens-*.safetensors")
    shutil.rmtree(workspace / "inbox")
    with monkeypatch.context() as patch:
        on_another_day(patch)
        document("client", "train", "--id", 0, cwd=workspace)
    (second,) = workspace.glob("**/tokens-*.safetensors")
    assert first.name != second.name


def test_only_a_template_with_the_day_has_one() -> None:
    for family, date in (("llama3_2", "2026-01-02"), ("gptoss", "2026-01-02"), ("llama3_1", None), ("qwen3", None)):
        assert Encoder(tokenizer_of(family), "chat", date="2026-01-02").date == date
    assert "date" not in train_record(Config(), 0, 1).model_dump(mode="json")
    assert train_record(Config(), 0, 1, date="2026-01-02").model_dump(mode="json")["date"] == "2026-01-02"


def test_a_day_is_written_in_every_form_that_templates_ask_for() -> None:
    tokenizer = tokenizer_of("qwen3")
    forms = ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %j %H:%M:%S", "%y%m%d")
    asked = "".join("{{ strftime_now('" + form + "') }}|" for form in forms)
    tokenizer.chat_template = asked + "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    written = tokenizer.decode(Encoder(tokenizer, "chat", date="2026-01-02").prompts([(Turn("user", "q"),)])[0])
    assert written.split("|<|im_start|>")[0] == "02 Jan 2026|2026-01-02|January 2, 2026|Friday 002 00:00:00|260102"
