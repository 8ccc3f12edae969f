"""`fedcli data partition` and `fedcli data preview`, and every shipped preset, on real files."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support.processes import ENVIRONMENT, SMALL, command, settings

from fedcli import cli
from fedcli.config import parse_config
from fedcli.data.formats import choose_format, known_format
from fedcli.report.rows_picture import Bar, draw
from fedcli.server.create import presets
from fedcli.workspace.layout import Workspace

REPOSITORY = Path(__file__).parents[1]
REAL = Path(os.environ.get("FEDCLI_TEST_DATA", REPOSITORY.parent / "shared/data"))

ALPACA = [
    {"instruction": f"Add one to {number}.", "input": "", "output": str(number + 1), "user": f"u{number % 4}"}
    for number in range(60)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": ALPACA,
    "fingpt": [
        {"instruction": "What is the sentiment of this news?", "input": f"Profit {number}.", "output": "neutral"}
        for number in range(120)
    ],
    "medalpaca": [
        {"instruction": "Answer this question truthfully", "input": f"What is {number}?", "output": f"It is {number}."}
        for number in range(60)
    ],
    "codealpaca": ALPACA,
    "mathinstruct": [
        {"source": "made", "instruction": f"{number} + 1?", "output": str(number + 1)} for number in range(60)
    ],
    "ultrafeedback": [
        {
            "source": "made",
            "instruction": f"Say {number}.",
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": f"{number}", "overall_score": 8.5},
                {"model": "b", "response": "no", "overall_score": 2.0},
            ],
        }
        for number in range(30)
    ],
    "hh-rlhf": [
        {
            "chosen": f"\n\nHuman: Say {number}.\n\nAssistant: {number}",
            "rejected": f"\n\nHuman: Say {number}.\n\nAssistant: no",
        }
        for number in range(30)
    ],
}


def fedcli(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one command in this process, where torch is loaded once, and return what it printed and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ALPACA_OF_TWO = (*SMALL, "federation.clients=2", "data.format=alpaca", "data.partition=iid")


def client_rows(workspace: Path) -> dict[int, list[dict[str, Any]]]:
    return {
        int(re.sub(r"\D", "", path.stem)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in workspace.glob("data/client-*.jsonl")
    }


def made(folder: Path, *overrides: str, preset: str = "demo") -> Path:
    done = fedcli("init", "ws", "--preset", preset, *settings(*overrides), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "ws"


# Partition


def test_partition_writes_every_row_once_and_a_card_that_counts_them(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", [*ALPACA, {"instruction": "empty", "output": " "}, {"instruction": "no output"}])
    dirichlet = "data.partition={dirichlet: {by: user, alpha: 0.3}}"
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", dirichlet)
    rows = client_rows(workspace)
    assert sorted(rows) == [0, 1, 2]
    everything = [row for own in rows.values() for row in own]
    assert Counter(map(json.dumps, everything)) == Counter(map(json.dumps, ALPACA))
    card = json.loads((workspace / "data/card.json").read_text())
    assert card["left_out"] == {"empty response": 1, "malformed": 1}
    assert (card["num_rows"], card["num_usable"]) == (62, 60)
    assert card["sizes"] == [len(rows[client]) for client in range(3)]
    assert card["groups"] == ["u0", "u1", "u2", "u3"]
    for client in range(3):
        users = Counter(row["user"] for row in rows[client])
        assert card["group_counts"][client] == [users[f"u{number}"] for number in range(4)]


def test_partition_again_changes_nothing_and_another_split_needs_replace(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    before = {path: path.read_bytes() for path in workspace.glob("data/*")}
    assert fedcli("data", "partition", "-w", workspace, cwd=tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in workspace.glob("data/*")} == before
    path = workspace / "fedcli.yaml"
    path.write_text(path.read_text().replace("partition: iid", "partition: {shards_by: user}"))
    refused = fedcli("data", "partition", "-w", workspace, cwd=tmp_path)
    assert refused.returncode == 4, refused.stderr
    assert "--replace" in refused.stderr
    assert {path: path.read_bytes() for path in workspace.glob("data/*")} == before
    replaced = fedcli("data", "partition", "-w", workspace, "--replace", "--json", cwd=tmp_path)
    assert replaced.returncode == 0, replaced.stderr
    assert json.loads(replaced.stdout)["sizes"] == [20, 20, 20]
    assert [row["user"] for row in client_rows(workspace)[0]].count("u0") == 15


def test_rows_that_rounds_were_trained_on_are_not_replaced(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    assert fedcli("run", "-w", workspace, "--rounds", 1, cwd=tmp_path).returncode == 0
    refused = fedcli("data", "partition", "-w", workspace, "--replace", cwd=tmp_path)
    assert refused.returncode == 4
    assert "rounds have been trained" in refused.stderr


def test_partition_without_a_source_says_what_to_set(tmp_path: Path) -> None:
    workspace = made(tmp_path, *SMALL, "data.source=null", "federation.signatures=off")
    done = fedcli("data", "partition", "-w", workspace, cwd=tmp_path)
    assert done.returncode == 6
    assert "data.source" in done.stderr


def test_several_sources_give_each_client_a_data_set_of_its_own(tmp_path: Path) -> None:
    for name in ("alpaca", "medalpaca", "mathinstruct"):
        written(tmp_path / f"{name}.jsonl", ROWS[name])
    entries = ", ".join(
        f"{{source: {tmp_path}/{name}.jsonl, format: {name}, max_rows: 20}}"
        for name in ("alpaca", "medalpaca", "mathinstruct")
    )
    workspace = made(tmp_path, *SMALL, f"data.source=[{entries}]", "data.partition=sources")
    rows = client_rows(workspace)
    assert [len(rows[client]) for client in range(3)] == [20, 20, 20]
    assert all(row in ROWS["medalpaca"] for row in rows[1])
    assert all(row in ROWS["mathinstruct"] for row in rows[2])
    done = fedcli("client", "train", "-w", workspace, "--id", 1, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["num_samples"] == 20, done.stderr
    mixed = fedcli("init", "mixed", *settings(*SMALL, f"data.source=[{entries}]", "data.partition=iid"), cwd=tmp_path)
    assert mixed.returncode == 3
    assert "different formats" in mixed.stderr


def test_a_split_that_is_killed_leaves_no_rows_behind_and_goes_on_when_run_again(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    before = client_rows(workspace)
    shutil.rmtree(workspace / "data")
    (workspace / "data" / ".tmp-0123456789abcdef0123456789abcdef").mkdir(parents=True)
    (workspace / "data" / ".tmp-0123456789abcdef0123456789abcdef" / "0.jsonl").write_text("half a row")
    assert fedcli("data", "partition", "-w", workspace, cwd=tmp_path).returncode == 0
    assert client_rows(workspace) == before
    assert not list(workspace.glob("data/.tmp-*"))


def test_paths_of_set_start_at_the_current_folder_however_they_are_named(tmp_path: Path) -> None:
    names = ["a,b.jsonl", "rows #1.jsonl", "[y].jsonl", "k: v.jsonl"]
    for number, name in enumerate(names):
        written(tmp_path / name, ALPACA)
        done = fedcli(
            "init", f"w{number}", *settings(*SMALL, "data.partition=iid", f"data.source={name}"), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    lists = [json.dumps(names), json.dumps([{"source": name, "format": "alpaca"} for name in names])]
    for number, value in enumerate(lists):
        overrides = (*SMALL, "federation.clients=4", "data.partition=sources", f"data.source={value}")
        done = fedcli("init", f"l{number}", *settings(*overrides), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [len(rows) for rows in client_rows(tmp_path / f"l{number}").values()] == [60] * 4


def test_rows_are_read_as_what_they_were_split_as_whatever_fedcli_yaml_says_later(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ROWS["fingpt"])
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.format=fingpt", "data.partition=iid")
    path = workspace / "fedcli.yaml"
    path.write_text(path.read_text().replace("format: fingpt", "format: medalpaca"))
    document = json.loads(fedcli("data", "preview", "-w", workspace, "--json", cwd=tmp_path).stdout)
    assert "What is the sentiment of this news? Profit" in document["rows"][0]["texts"][0][0]["text"]


# Preview


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda card: card.write_bytes(card.read_bytes()[:-20]), "is not JSON"),
        (lambda card: card.write_bytes(b""), "is not JSON"),
        (lambda card: card.write_bytes(b"[]"), "is not a JSON object"),
        (lambda card: card.write_bytes(b"\xff" + card.read_bytes()), "is not JSON"),
        (lambda card: edit(card, lambda summary: summary.pop("formats")), "formats: Field required"),
        (lambda card: edit(card, lambda summary: summary.update(sizes="many")), "sizes: Input should be a valid list"),
        (lambda card: edit(card, lambda summary: summary["formats"].pop()), "its lists are not of one length"),
        (lambda card: edit(card, lambda summary: summary.update(formats=["odd"] * 2)), "unknown format"),
        (lambda card: (card.unlink(), card.mkdir()), "is not a regular file"),
    ],
)
def test_a_damaged_data_card_is_an_error_that_names_it_and_its_cure_writes_it_anew(
    tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    source = written(tmp_path / "rows.jsonl", ALPACA)
    folder = made(tmp_path, *ALPACA_OF_TWO, f"data.source={source}")
    card = Workspace(folder).data_card
    before = card.read_bytes()
    damage(card)
    for arguments in (("client", "train", "--id", 0), ("data", "preview")):
        done = fedcli(*arguments, cwd=folder)
        assert done.returncode == 7, done.stderr
        assert f"{card} is damaged: " in done.stderr
        assert problem in done.stderr
        assert "fedcli data partition" in done.stderr
    if card.is_dir():
        card.rmdir()
    assert fedcli("data", "partition", cwd=folder).returncode == 0
    assert card.read_bytes() == before


def edit(card: Path, change: Callable[[dict[str, Any]], object]) -> None:
    summary = json.loads(card.read_bytes())
    change(summary)
    card.write_text(json.dumps(summary))


def test_without_a_data_card_rows_are_of_the_format_that_fedcli_yaml_names(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", ALPACA)
    folder = made(tmp_path, *ALPACA_OF_TWO, f"data.source={source}")
    Workspace(folder).data_card.unlink()
    assert fedcli("client", "train", "--id", 0, cwd=folder).returncode == 0


def test_preview_shows_the_supervised_part_and_what_each_client_has(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition={by: user}", "federation.clients=4")
    done = fedcli("data", "preview", "-w", workspace, "--rows", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "### Response:« 1</s>»" in done.stdout
    assert re.search(r"^ +3 +15 +0 ", done.stdout, re.MULTILINE)
    document = json.loads(fedcli("data", "preview", "-w", workspace, "--json", cwd=tmp_path).stdout)
    assert [share["num_rows"] for share in document["clients"]] == [15] * 4
    assert sum(document["histogram"]) == 60
    assert [share["groups"] for share in document["clients"]] == [[15 * (a == b) for b in range(4)] for a in range(4)]
    (pieces,) = document["rows"][0]["texts"]
    assert [piece["is_supervised"] for piece in pieces] == [False, True]
    assert pieces[1]["text"] == " 1</s>"


def test_rows_longer_than_max_length_are_counted_as_cut_and_as_left_out(tmp_path: Path) -> None:
    """Of ten rows two have a response that is cut, three a prompt without room for one; init says who counts them."""
    long = "word " * 200
    rows = [{"instruction": f"i{number}", "output": "o"} for number in range(5)]
    rows += [{"instruction": f"i{number}", "output": long} for number in range(5, 7)]
    rows += [{"instruction": f"i{number} {long}", "output": "o"} for number in range(7, 10)]
    written(tmp_path / "rows.jsonl", rows)
    overrides = (*SMALL, "data.source=rows.jsonl", "data.partition=iid", "federation.clients=1", "train.max_length=128")
    begun = fedcli("init", "w", *settings(*overrides), cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    line = "rows longer than train.max_length (128 tokens) are cut, or left out: fedcli data preview -w w counts them"
    assert line in begun.stdout.splitlines()
    done = fedcli("data", "preview", "-w", "w", cwd=tmp_path)
    line = "5 of 10 rows are longer than train.max_length (128): 2 with a response cut to fit, 3 left out"
    assert line in done.stdout.splitlines()
    assert "left out: 3 too long" in done.stdout.splitlines()


def test_preview_counts_any_column_of_a_split_that_went_by_none(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    document = json.loads(fedcli("data", "preview", "-w", workspace, "--by", "user", "--json", cwd=tmp_path).stdout)
    rows = client_rows(workspace)
    assert document["groups"] == ["u0", "u1", "u2", "u3"]
    for share in document["clients"]:
        users = Counter(row["user"] for row in rows[share["client"]])
        assert share["groups"] == [users[name] for name in document["groups"]]
    missing = fedcli("data", "preview", "-w", workspace, "--by", "uesr", cwd=tmp_path)
    assert missing.returncode == 2
    assert "no column 'uesr'; it has instruction, input, output, user" in missing.stderr


def colours_of_columns(picture: Path) -> list[set[tuple[int, int, int]]]:
    """Return the colours in each column of pixels, those that fill at least a tenth of it."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    columns = []
    for column in range(pixels.shape[1]):
        colours, counts = np.unique(pixels[:, column], axis=0, return_counts=True)
        columns.append({tuple(map(int, colour)) for colour in colours[counts >= pixels.shape[0] / 10]})
    return columns


@pytest.mark.slow
def test_the_picture_shows_the_skew(tmp_path: Path) -> None:
    """Two labels, two clients: split by label, no column of pixels in the shares' panel has both colours."""
    blue, orange = (0, 114, 178), (230, 159, 0)
    written(tmp_path / "rows.jsonl", [row | {"label": "ab"[number % 2]} for number, row in enumerate(ALPACA)])
    both = {}
    for name, partition in (("skewed", "{by: label}"), ("even", "iid")):
        folder = tmp_path / name
        folder.mkdir()
        overrides = (
            *SMALL,
            f"data.source={tmp_path}/rows.jsonl",
            "federation.clients=2",
            f"data.partition={partition}",
        )
        workspace = made(folder, *overrides)
        picture = folder / "shares.png"
        done = fedcli("data", "preview", "-w", workspace, "--by", "label", "-o", picture, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert str(picture) in done.stderr
        columns = colours_of_columns(picture)
        assert any(orange in colours for colours in columns)
        both[name] = sum({blue, orange} <= colours for colours in columns)
    assert both["skewed"] == 0
    assert both["even"] > 400


def test_a_groups_name_may_hold_a_formula_that_is_none() -> None:
    assert draw([Bar(0, 3, [1, 2])], ["$\\frac{$", "algebra $x^{2$"], [3, 4, 5], 9).startswith(b"\x89PNG")


def test_reading_says_how_far_it_is_on_a_terminal_and_nothing_elsewhere(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA * 100)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    shutil.rmtree(workspace / "data")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("data", "partition", "-w", workspace),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end has closed
            break
        if not chunk:
            break
        shown += chunk
    process.communicate()
    os.close(master)
    assert process.returncode == 0
    assert re.search(rb"(reading|writing) rows: \d,000", shown)
    quiet = fedcli("data", "partition", "-w", workspace, cwd=tmp_path)
    assert quiet.stderr == f"next: fedcli data preview -w {workspace}\n"


# Presets

PAPER = {
    # clients, per round, rows in all, learning rate, rank, template, base
    "fedit-general": (20, 2, 20000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedit-finance": (50, 5, 10000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedit-medical": (20, 2, 20000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedit-code": (20, 2, 20000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedit-math": (20, 2, 20000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedit-mixed": (4, 4, 20000, 5e-5, 32, "alpaca", "meta-llama/Llama-2-7b-hf"),
    "fedva-helpful": (5, 2, None, 5e-4, 8, "vicuna", "ehartford/Wizard-Vicuna-7B-Uncensored"),
    "fedva-harmless": (5, 2, None, 5e-4, 8, "vicuna", "ehartford/Wizard-Vicuna-7B-Uncensored"),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_papers_setting(name: str) -> None:
    config = parse_config(yaml.safe_load(presets()[name].read_text()), presets()[name])
    federation, train = config.federation, config.train
    limits = [entry.max_rows for entry in config.data.sources]
    num_rows = sum(limit or 0 for limit in limits) or config.data.max_rows
    found = (federation.clients, federation.cohort_size, num_rows, train.learning_rate, config.adapter.rank)
    assert (*found, config.data.template, config.model.base) == PAPER[name]
    assert (federation.rounds, train.steps, train.batch_size, train.max_length) == (200, 10, 16, 512)
    assert config.adapter.alpha == 2 * config.adapter.rank
    assert config.adapter.dropout == 0.05
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.model.quantization == "int8"
    assert train.learning_rate_min == (1e-6 if config.task == "sft" else 1e-5)
    assert all(known_format(entry.source) for entry in config.data.sources)
    assert config.data.partition == ("sources" if name == "fedit-mixed" else "iid")
    for entry in config.data.sources:
        assert entry.format in (None, choose_format(entry.source, None, config.task))


def preset_format(name: str) -> str:
    section: Mapping[str, Any] = yaml.safe_load(presets()[name].read_text())["data"]
    return str(section.get("format", "alpaca"))


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_preset_runs_offline_on_rows_of_its_format(name: str, tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ROWS[preset_format(name)])
    # What --set cannot ask of a laptop: int8, and sixteen rows a step.
    small = ("model.quantization=none", "train.steps=1", "train.batch_size=2", "federation.per_round=1")
    workspace = made(tmp_path, "data.source=rows.jsonl", "model.base=builtin:tiny", *small, preset=name)
    done = fedcli("run", "-w", workspace, "--rounds", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_merged"] == 1


def test_every_shipped_preset_is_listed_and_valid() -> None:
    others = {
        "demo",
        "demo-dpo",
        "demo-kto",
        "demo-orpo",
        "demo-simpo",
        "demo-grpo",
        "real",
        "private-parties",
        "defaults",
    }
    published = {name for name in presets() if name.startswith(("fedllm-", "flowertune-"))}  # test_published_presets.py
    assert set(presets()) - published == {*PAPER, *others}
    assert len(published) == 8
    for path in presets().values():
        parse_config(yaml.safe_load(path.read_text()), path)


# Real rows


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "fin_sentiment").is_dir(), reason=f"no public rows in {REAL}")
@pytest.mark.parametrize("partition", ["iid", "{dirichlet: {by: label, alpha: 0.3}}"])
def test_finance_on_the_phrase_bank_for_two_rounds(partition: str, tmp_path: Path) -> None:
    """The command of DATA.md makes a CSV of `sentence@label` lines."""
    (one_liner,) = re.findall(r"^    iconv .*\n(?:^    .*\n)*", (REPOSITORY / "docs/DATA.md").read_text(), re.M)
    shutil.copy(REAL / "fin_sentiment/Sentences_50Agree.txt", tmp_path)
    subprocess.run(["bash", "-c", one_liner], cwd=tmp_path, check=True)
    columns = ("data.format.columns.instruction=sentence", "data.format.columns.response=label")
    model = ("model.base=builtin:tiny", "model.quantization=none", "data.max_rows=null")
    federation = ("federation.clients=10", "federation.per_round=2", "federation.rounds=2", "train.batch_size=4")
    overrides = ("data.source=fpb.csv", *columns, *model, *federation, f"data.partition={partition}")
    workspace = made(tmp_path, *overrides, preset="fedit-finance")
    labels = Counter(row["label"] for own in client_rows(workspace).values() for row in own)
    assert labels == {"neutral": 2879, "positive": 1363, "negative": 604}
    done = fedcli("run", "-w", workspace, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["num_merged"] == 2, done.stderr
    largest = [max(Counter(row["label"] for row in own).values()) / len(own) for own in client_rows(workspace).values()]
    assert (max(largest) > 0.9) == (partition != "iid")
    assert fedcli("verify", "-w", workspace, cwd=tmp_path).returncode == 0


def test_a_thousand_users_make_a_card_of_kilobytes(tmp_path: Path) -> None:
    rows = [{"instruction": f"{number}?", "output": "yes", "user": number} for number in range(1000)]
    written(tmp_path / "rows.jsonl", rows)
    overrides = (*SMALL, "data.source=rows.jsonl", "data.partition={by: user}", "federation.clients=1000")
    workspace = made(tmp_path, *overrides, "federation.per_round=2")
    assert len(client_rows(workspace)) == 1000
    assert (workspace / "data/card.json").stat().st_size < 200_000
    preview = fedcli("data", "preview", "-w", workspace, "--id", 7, "--rows", 0, "--json", cwd=tmp_path)
    assert json.loads(preview.stdout)["clients"][0]["num_rows"] == 1


def test_preview_shows_what_the_open_round_asks_and_not_what_fedcli_yaml_says_of_the_next(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", ALPACA)
    workspace = made(tmp_path, *SMALL, "data.source=rows.jsonl", "data.partition=iid")
    path = workspace / "fedcli.yaml"
    path.write_text(path.read_text().replace("template: alpaca", "template: vicuna"))
    document = json.loads(fedcli("data", "preview", "-w", workspace, "--json", cwd=tmp_path).stdout)
    assert "### Instruction:" in document["rows"][0]["texts"][0][0]["text"]
