"""data.select: scores of rows, what is kept of them and in which order, and what of it leaves a party."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.models import make_model
from support.processes import SMALL, Run, results, runner, settings

from fedcli.client.selection import losses_of, select_rows
from fedcli.config import SelectConfig, parse_config, read_select
from fedcli.data.encoded import EncodedRows
from fedcli.data.encoding import Encoder
from fedcli.data.selection import Losses, histogram, in_order, kept, score_of
from fedcli.errors import ConfigError, UsageError
from fedcli.tasks.conversation import Preference, Turn, instruct
from fedcli.workspace.federation_state import train_record
from fedcli.workspace.layout import Home

VECTOR = Losses(given=1.2, alone=2.0, num_tokens=7)


# Scores


def test_ira_and_ifd_have_the_values_of_their_vector() -> None:
    assert score_of("ira", VECTOR) == pytest.approx(0.8, abs=1e-12)
    assert score_of("ifd", VECTOR) == pytest.approx(0.449329, abs=5e-7)
    assert score_of("length", VECTOR) == 7


def test_the_highest_scores_are_kept_in_the_order_of_the_rows_and_of_equal_ones_the_first() -> None:
    scores = [0.1, 0.9, 0.5, 0.5, 0.5]
    assert kept(SelectConfig(score="ira", keep=0.6), scores).tolist() == [1, 2, 3]
    assert kept(SelectConfig(score="length", keep=0.41), scores).tolist() == [1, 2, 3]
    assert kept(SelectConfig(score="ira", keep=1.0), scores).tolist() == [0, 1, 2, 3, 4]
    assert kept(SelectConfig(score="ira", keep=0.01), scores).tolist() == [1]


def test_ifd_drops_rows_of_one_or_more_before_it_keeps_the_highest() -> None:
    scores = [1.2, 0.9, 0.2, 1.0, 0.5]
    assert kept(SelectConfig(score="ifd", keep=0.4), scores).tolist() == [1, 4]
    assert kept(SelectConfig(score="ifd", keep=1.0), scores).tolist() == [1, 2, 4]


def test_a_rounds_rows_are_trained_on_in_the_order_of_their_scores() -> None:
    scores = [0.5, 0.1, 0.9, 0.1]
    assert in_order("none", [3, 0, 2, 1], scores) == [3, 0, 2, 1]
    assert in_order("ascending", [3, 0, 2, 1], scores) == [3, 1, 0, 2]
    assert in_order("descending", [3, 0, 2, 1], scores) == [2, 0, 3, 1]


def test_a_histogram_has_32_equal_bins_whose_ends_hold_what_lies_beyond() -> None:
    counts = histogram("ira", [-9.0, -4.0, -3.76, -3.75, 0.0, 3.99, 4.0, 99.0])
    assert len(counts) == 32
    assert {place: count for place, count in enumerate(counts) if count} == {0: 3, 1: 1, 16: 1, 31: 3}
    assert histogram("length", [0, 31, 32, 2000])[:2] == [2, 1]


def test_scores_are_those_of_plain_forward_passes_and_stay_in_the_home(tmp_path: Path) -> None:
    adapted = make_model()
    adapter = {name: array.copy() for name, array in adapted.values().items()}
    rows = Encoder(adapted.tokenizer).encode(
        [instruct("Which alert level fits?", answer, "The bank soars today") for answer in ("green", "red, and red")],
        64,
    )
    home, select = Home(tmp_path / "home"), SelectConfig(score="ira")
    found = losses_of(rows, select, adapted, adapter, home, "model")
    for row, losses in zip(rows, found, strict=True):
        ids, learnt = torch.tensor(row.sides[0].ids.astype(np.int64)), torch.tensor(row.sides[0].supervised)
        end = adapted.tokenizer.bos_token_id
        alone = torch.cat([torch.tensor([adapted.tokenizer.eos_token_id if end is None else end]), ids[learnt]])
        means = []
        for tokens, count in ((ids, int(learnt.sum())), (alone, int(learnt.sum()))):
            with torch.no_grad():
                said = adapted.base(tokens[None]).logits[0, :-1].double().log_softmax(-1)
            means.append(-said[torch.arange(len(tokens) - 1), tokens[1:]][-count:].mean().item())
        assert (losses.given, losses.alone) == pytest.approx(means, rel=1e-5)
        assert losses.num_tokens == int(learnt.sum())
    (kept_file,) = home.folder.iterdir()
    assert kept_file.stat().st_mode & 0o077 == 0
    before = kept_file.stat().st_mtime_ns
    assert losses_of(rows, select, adapted, adapter, home, "model") == found
    assert kept_file.stat().st_mtime_ns == before
    changed = {name: array + 0.1 for name, array in adapter.items()}
    assert losses_of(rows, select, adapted, changed, home, "model") != found
    (other,) = home.folder.iterdir()
    assert other.name != kept_file.name
    assert losses_of(rows, select, adapted, adapter, home, "model", {"base_delta": changed}) != found


def test_what_is_dropped_is_counted_with_the_worst_as_an_example_and_canaries_stay() -> None:
    rows = EncodedRows()
    one = Encoder(make_model().tokenizer).encode([instruct("Say it.", "red")], 64)[0]
    for _ in range(4):
        rows.append(one)
    rows.plant([(one, 2)])
    losses = [Losses(1.0, alone, 3) for alone in (1.5, 1.1, 2.0, 1.6, 0.0, 0.0)]
    found = select_rows(rows, SelectConfig(score="ira", keep=0.5), losses, lambda row: "red")
    assert (found.places, found.num_own) == ([2, 3, 4, 5], 2)
    assert dict(found.report.left_out) == {"ira too low": 2}
    assert found.report.first_cases == {"ira too low": "'red' has 0.1, and 0.6 or more is kept"}
    same = [Losses(1.0, 1.0, 2)] * 6
    found = select_rows(rows, SelectConfig(score="length", keep=0.5), same, lambda row: "red")
    told = "'red' has 2, and 2 or more is kept, of equal ones the first rows"
    assert (found.places, found.report.first_cases) == ([0, 1, 4, 5], {"length too low": told})
    with pytest.raises(ConfigError, match=r"data\.select keeps none of 4 rows"):
        select_rows(rows, SelectConfig(score="ifd"), [Losses(2.0, 1.0, 3)] * 6, lambda row: "red")


def test_a_text_has_a_length_and_neither_ira_nor_ifd(tmp_path: Path) -> None:
    from fedcli.tasks.builtin_formats import whole_text

    adapted = make_model()
    rows = Encoder(adapted.tokenizer).encode([whole_text("The bank soars today")], 64)
    (length,) = losses_of(rows, SelectConfig(score="length"), adapted, {}, Home(tmp_path), "model")
    assert length.num_tokens > 0
    with pytest.raises(ConfigError, match="a row is a text without a prompt"):
        losses_of(rows, SelectConfig(score="ifd"), adapted, adapted.values(), Home(tmp_path), "model")


def test_of_a_pair_the_chosen_response_is_scored(tmp_path: Path) -> None:
    adapted = make_model()
    encoder = Encoder(adapted.tokenizer)
    pair = encoder.encode([Preference((Turn("user", "Say it."),), "green", "red, as the night is long")], 64)
    single = encoder.encode([instruct("Say it.", "green")], 64)
    for score in ("ira", "length"):
        select = SelectConfig(score=score)
        scored = [
            losses_of(rows, select, adapted, adapted.values(), Home(tmp_path / str(len(rows[0].sides))), "model")
            for rows in (pair, single)
        ]
        assert scored[0] == scored[1]


# Settings


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"data": {"select": {"keep": 0.5}}}, "data.select.score"),
        ({"data": {"select": {"score": "ira", "keep": 0}}}, "data.select.keep"),
        ({"data": {"select": {"score": "irate"}}}, "unknown score 'irate'. Did you mean ira"),
        ({"task": "kto", "data": {"select": {"score": "ira"}}}, "data.select.score: ira and task kto exclude each"),
        (
            {"task": "grpo", "train": {"reward": "number"}, "data": {"select": {"score": "length"}}},
            "data.select and task grpo exclude each other: scores are of responses, and its rows have none",
        ),
        (
            {"data": {"select": {"score": "length"}}, "privacy": {"unit": "row", "clip": 1, "noise": 1}},
            "data.select and privacy.unit: row exclude each other: which rows are kept depends on every other row",
        ),
    ],
)
def test_selections_that_cannot_be_are_refused(document: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_config(document, "the file")


def test_a_manifest_says_how_rows_are_selected_and_nothing_where_they_are_not() -> None:
    written = train_record(parse_config({"data": {"select": {"score": "ifd"}}}, "the file"), 0, 1)
    assert written.model_dump(mode="json")["select"] == {"score": "ifd", "keep": 0.8, "order": "none"}
    assert "select" not in train_record(parse_config({}, "the file"), 0, 1).model_dump(mode="json")


def test_a_command_line_names_a_selection_or_none() -> None:
    assert read_select("off") == "off"
    assert read_select("{score: ira, order: descending}") == SelectConfig(score="ira", order="descending")
    with pytest.raises(UsageError, match="score: unknown score 'x'"):
        read_select("{score: x}")


# Federations


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.mark.slow
def test_a_party_trains_on_what_the_round_or_itself_selects_and_tells_scores_only_where_it_allows(
    run: Run, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    levels = ("green", "yellow", "orange", "red")
    rows.write_text(
        "".join(
            json.dumps({"instruction": "Which alert level fits?", "output": " and ".join(levels[: 1 + number % 4])})
            + "\n"
            for number in range(20)
        )
    )
    workspace = tmp_path / "w"
    made = ("data.source=null", "federation.signatures=off", "data.select.score=length", "data.select.keep=0.5")
    results(run, "init", workspace, *settings(*SMALL, *made))
    chosen = [(), ("--share-scores",), ("--select", "{score: ira, keep: 0.25, order: ascending}", "--share-scores")]
    for client, more in enumerate(chosen):
        where = ("--id", client, "-w", workspace, "--home", tmp_path / f"home-{client}")
        results(run, "client", "join", "--data", rows, *where, *more)
        done = results(run, "client", "train", *where)
        update = json.loads((workspace / f"inbox/{client}/round-00000/update.json").read_text())
        assert done["num_samples"] == update["num_samples"] == (5 if client == 2 else 10)
        score = "ira" if client == 2 else "length"
        assert done["left_out"] == {f"{score} too low": 20 - update["num_samples"]}
        party = json.loads((tmp_path / f"home-{client}/party.json").read_text())
        assert ("shares_scores" in party, "select" in party) == (client > 0, client == 2)
        if client == 0:
            assert "row_scores" not in update
        else:
            told = update["row_scores"]
            assert (told["score"], len(told["counts"]), sum(told["counts"])) == (score, 32, 20)
    again = results(run, "client", "join", "--data", rows, *where)
    assert again["kept"] == ["--select '{score: ira, keep: 0.25, order: ascending}'", "--share-scores"]
    names = [path.name for path in workspace.rglob("*") if "losses" in path.name or "tokens" in path.name]
    assert names == []
    (scores,) = (tmp_path / "home-2").glob("losses-*")
    assert len(load_file(scores)["values"]) == 4  # of rows that are alike there is one
    assert results(run, "server", "aggregate", "-w", workspace)["round"] == 1
    assert results(run, "verify", "-w", workspace)["violations"] == []


@pytest.mark.slow
def test_floors_refuse_a_selection_that_leaves_too_few_rows(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}.", "output": "red"}) + "\n" for n in range(20)))
    made = ("data.source=null", "federation.signatures=off", "data.select.score=length", "data.select.keep=0.05")
    results(run, "init", tmp_path / "w", *settings(*SMALL, *made))
    where = ("--id", 0, "-w", tmp_path / "w", "--home", tmp_path / "home")
    results(run, "client", "join", "--data", rows, *where)
    code, _, err = run("client", "train", *where)
    assert code == 3
    assert "client 0 does not train round 0: it learns from 1 row, and your floor is 2" in err
    assert "Ask the server's operator why" in err
    results(run, "client", "join", "--data", rows, *where, "--select", "{score: length, keep: 0.05}")
    code, _, err = run("client", "train", *where)
    assert code == 3
    assert "Your own --select leaves so few of your rows" in err
