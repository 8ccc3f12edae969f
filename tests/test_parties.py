"""Real parties: joining with rows that stay where they are, the card that is shown, and training from a home."""

import fcntl
import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support import processes
from support.kills import arm, fork, was_killed
from support.processes import ENVIRONMENT, SMALL, command, settings
from support.warm import Place, Warm, write_rows

from fedcli import Federation
from fedcli.data.templates import ALPACA

BUILTIN = Path(__file__).parents[1] / "fedcli/model/builtin/tiny"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def warm() -> Warm:
    return processes.warm()


@pytest.fixture(scope="module")
def template(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that waits for parties."""
    folder = tmp_path_factory.mktemp("parties")
    done = warm("init", "W", *settings(*SMALL, "data.source=null", "federation.signatures=off"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, warm: Warm) -> Place:
    shutil.copytree(template, tmp_path / "place")
    return Place(tmp_path / "place", warm)


def own_terminal() -> None:
    """Make the new session's terminal its own, and end the process after half a minute."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so their children
    signal.alarm(30)


def answer(place: Place, typed: bytes, *more: object) -> tuple[int, str]:
    """Join on a terminal and type an answer to the question, if there is one; return exit code and screen."""
    terminal, end = pty.openpty()
    arguments = ["--id", 0, "--data", place.rows("rows.jsonl", 6), "--home", "H0", "--share", "minimal", *more]
    process = subprocess.Popen(
        command("client", "join", "-w", place.workspace, *arguments),
        cwd=place.folder,
        env=ENVIRONMENT | {"TERM": "dumb"},
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(end)
    screen = b""
    try:
        while piece := os.read(terminal, 4096):
            screen += piece
            if typed and screen.rstrip().endswith(b"[y/N]:"):
                assert b'"num_rows": 6' in screen  # the card comes first
                assert not (place.folder / "H0").exists()
                time.sleep(0.3)  # until it reads: Python loses a Ctrl-C that comes just before
                os.write(terminal, typed)
                typed = b""
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    return process.wait(), screen.decode()


# The card


@pytest.mark.slow
def test_on_a_terminal_no_writes_nothing(place: Place) -> None:
    before = place.names()
    code, screen = answer(place, b"n\n")
    assert (code, screen.splitlines()[-1]) == (0, "nothing was written")
    assert place.names() == before
    assert not (place.folder / "H0").exists()


@pytest.mark.slow
def test_on_a_terminal_yes_joins(place: Place) -> None:
    code, screen = answer(place, b"y\n")
    assert code == 0, screen
    assert place.registration(0)["data"] == {"num_rows": 6}


@pytest.mark.parametrize(("typed", "codes"), [(b"\x03", [130]), (b"\x04", [0, 130])], ids=["Ctrl-C", "Ctrl-D"])
def test_leaving_the_question_writes_nothing(place: Place, typed: bytes, codes: list[int]) -> None:
    before = place.names()
    code, screen = answer(place, typed)
    assert (place.names(), (place.folder / "H0").exists()) == (before, False)
    assert code in codes, screen


@pytest.mark.parametrize("option", ["--yes", "--json"])
def test_on_a_terminal_nothing_is_asked_with(place: Place, option: str) -> None:
    code, screen = answer(place, b"", option)
    assert (code, "[y/N]" in screen) == (0, False)
    assert place.registration(0)["data"] == {"num_rows": 6}


def test_the_card_comes_before_the_news_and_json_is_one_document(place: Place) -> None:
    out = place.join(0, place.rows("rows.jsonl", 6)).stdout
    guess, first, *card, last = out.splitlines()
    assert guess == "format: alpaca, guessed from the columns instruction, output; --format sets another"
    assert first == "the workspace learns this of your rows, and nothing else:"
    assert json.loads("\n".join(card)) == place.registration(0)["data"]
    assert last == f"client 0 has joined; its private state lies in {place.folder}/H0"
    document = json.loads(place.join(0, place.rows("rows.jsonl", 6), "--json").stdout)
    assert (document["status"], document["home"]) == ("joined", f"{place.folder}/H0")
    assert document["data"] == place.registration(0)["data"]


def test_minimal_shares_the_number_of_rows_and_nothing_else(place: Place) -> None:
    place.join(0, place.rows("rows.jsonl", 6), "--share", "minimal")
    contents = {"protocol": 1, "workspace": place.identity(), "client": 0, "data": {"num_rows": 6}}
    assert place.registration(0) == contents
    hint = place.join(0, "rows.jsonl", "--share", "minimum", code=2).stderr
    assert "'minimum' is not one of 'full', 'minimal'" in hint


def test_the_cards_numbers_are_those_of_the_rows(place: Place) -> None:
    from transformers import AutoTokenizer

    # 21 rows of known order; the longest is longer than max_length, and is measured whole
    lengths = [3 * n + 1 for n in range(20)] + [900]
    rows = [{"instruction": f"count {n}", "output": "word " * n + "end"} for n in lengths]
    odd = [{"instruction": "a", "output": "  "}, {"instruction": "a"}, {"output": "b"}]
    place.join(0, write_rows(place.folder / "rows.jsonl", rows[::-1] + odd))
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
    start = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    texts = [
        f"{ALPACA.default_system}\n\n### Instruction:\n{row['instruction']}\n\n### Response: {row['output']}"
        for row in rows
    ]
    counts = sorted(start + len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert counts[-1] > 512
    assert place.registration(0)["data"] == {
        "num_rows": 21,
        "format": "alpaca",
        "left_out": {"empty response": 1, "malformed": 2},
        "token_quantiles": {
            "0.05": counts[1], "0.25": counts[5], "0.5": counts[10], "0.75": counts[15], "0.95": counts[19],
        },
    }  # fmt: skip


def test_no_text_of_a_row_comes_into_the_workspace(place: Place) -> None:
    place.join(0, place.rows("goshawk.jsonl", 6, word="nightingale"))
    place.train(0)
    place("train-alone", "--id", 0, "--home", "H0")
    assert (place.workspace / "baselines/alone-0/adapter" / ADAPTER).is_file()
    files = [path for path in place.workspace.rglob("*") if path.is_file() and path.name != "server.lock"]
    assert len(files) > 10
    for canary in (b"nightingale", b"goshawk", str(place.folder).encode(), os.uname().nodename.encode() + b'"'):
        assert [path for path in files if canary in path.read_bytes()] == []
        assert not any(canary.decode() in name for name in place.names())


# Rows that change


@pytest.mark.slow
def test_a_party_whose_number_of_rows_changes_is_told_to_join_again(place: Place) -> None:
    place.join(0, place.rows("rows.jsonl", 6))
    for count in (7, 5):
        place.rows("rows.jsonl", count)
        error = place.train(0, code=3).stderr
        assert f"client 0 joined with 6 rows, and now has {count}" in error
        assert "Run `fedcli client train --id 0 --refresh`" in error
    assert not (place.workspace / "inbox/0/round-00000").exists()
    place.join(0, "rows.jsonl")
    place.train(0)
    update = json.loads((place.workspace / "inbox/0/round-00000/update.json").read_bytes())
    assert (place.registration(0)["data"]["num_rows"], update["num_samples"]) == (5, 5)


@pytest.mark.slow
@pytest.mark.parametrize("which", [["--id", "0,1"], ["--any"]])
def test_refresh_is_for_several_parties_and_one_that_fails_keeps_no_other_from_its_turn(
    place: Place, which: list[str]
) -> None:
    for client in (0, 1):
        place.join(client, place.rows(f"rows-{client}.jsonl", 6), "--share", "minimal", at_default=True)
    place.rows("rows-1.jsonl", 8)
    (place.folder / "rows-0.jsonl").rename(place.folder / "elsewhere.jsonl")
    done = place("client", "train", *which, "--refresh", code=3)
    assert "client 1: registered anew with 8 rows, before 6" in done.stderr
    assert "client 0 failed in round 0: " in done.stderr
    assert [place.registration(client)["data"] for client in (0, 1)] == [{"num_rows": 6}, {"num_rows": 8}]
    assert (place.workspace / "inbox/1/round-00000").exists()
    assert not (place.workspace / "inbox/0/round-00000").exists()
    place.rows("rows-0.jsonl", 5)
    assert "registered anew with 5 rows" in place("client", "train", *which, "--refresh").stderr
    assert (place.workspace / "inbox/0/round-00000").exists()
    assert place("client", "train", *which, "--refresh").returncode == 0


@pytest.mark.slow
def test_the_same_number_of_other_rows_trains_on(place: Place) -> None:
    place.join(0, place.rows("rows.jsonl", 6))
    place.rows("rows.jsonl", 6, word="sing")
    place.train(0)


def test_a_source_that_has_gone_is_one_clear_error(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    place.join(0, rows)
    rows.rename(place.folder / "elsewhere.jsonl")
    lines = place.train(0, code=3).stderr.splitlines()
    assert lines[0] == f"fedcli: error: cannot read the rows in {rows}: no such file or folder"
    assert len(lines) == 2


@pytest.mark.slow
def test_relative_paths_are_of_the_folder_that_the_party_joined_in(place: Place) -> None:
    place.rows("rows.jsonl", 6)
    place.join(0, "rows.jsonl")
    (place.folder / "other").mkdir()
    place.train(0, "--home", "../H0", cwd=place.folder / "other")


# Who may join


def test_ids_that_no_client_has_are_refused(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    for client in (3, -1):
        assert f"there is no client {client}" in place.join(client, rows, code=2).stderr
    assert "clients/3.json" not in place.names()


def test_an_id_taken_from_another_home_is_refused(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    place.join(0, rows)
    before = (place.workspace / "clients/0.json").read_bytes()
    error = place.join(0, rows, "--home", "another", code=4).stderr
    assert f"client 0 has joined already, from another home than {place.folder}/another" in error
    assert (place.workspace / "clients/0.json").read_bytes() == before
    assert not (place.folder / "another").exists()


def test_a_home_of_another_client_or_workspace_is_refused(place: Place, tmp_path: Path) -> None:
    rows = place.rows("rows.jsonl", 6)
    place.join(0, rows)
    assert f"{place.folder}/H0 is the home of client 0" in place.join(1, rows, "--home", "H0", code=2).stderr
    other = Place(tmp_path / "other", place.warm)
    other.folder.mkdir()
    other("init", "W", *settings(*SMALL, "data.source=null", "federation.signatures=off"))
    error = other.join(0, rows, "--home", place.folder / "H0", code=2).stderr
    assert f"{place.folder}/H0 is the home of client 0 of another workspace" in error


def test_a_home_in_the_workspace_is_refused(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    (place.folder / "link").symlink_to(place.workspace)
    before = place.names()
    for home in ("W", "W/home", "link/home", "other/../W/home", place.workspace / "private/0"):
        assert (
            "lies in the workspace, where everybody could see it" in place.join(0, rows, "--home", home, code=2).stderr
        )
    place.join(0, rows, at_default=True, environment={"XDG_DATA_HOME": str(place.workspace)}, code=2)
    assert place.names() == before


def test_a_simulated_clients_id_is_refused(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    (place.workspace / "data").mkdir()
    shutil.copy(rows, place.workspace / "data/client-0.jsonl")
    error = place.join(0, rows, code=3).stderr
    assert f"client 0 is simulated here: {place.workspace}/data/client-0.jsonl holds its rows" in error
    place.join(1, rows)


# Rows and formats that will not do


def test_rows_that_cannot_be_used_join_nobody(place: Place) -> None:
    before = place.names()
    (place.folder / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    assert f"{place.folder}/broken.parquet" in place.join(0, "broken.parquet", code=3).stderr
    assert f"{place.folder}/none.jsonl" in place.join(0, "none.jsonl", code=3).stderr
    write_rows(place.folder / "odd.jsonl", [{"quest": "a", "reply": "b"}] * 3)
    assert "none of 3 rows is usable as alpaca (3 malformed)" in place.join(0, "odd.jsonl", code=3).stderr
    assert place.names() == before
    assert not (place.folder / "H0").exists()


def test_a_format_that_is_unknown_or_of_the_other_task_is_refused(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    assert "Did you mean alpaca" in place.join(0, rows, "--format", "alpacca", code=2).stderr
    error = place.join(0, rows, "--format", "hh-rlhf", code=2).stderr
    assert "hh-rlhf is not for task sft" in error
    error = place.join(0, rows, "--format", "{columns: {prompt: a, chosen: b, rejected: c}}", code=2).stderr
    assert "task dpo" in error


# Homes


@pytest.mark.slow
def test_training_without_the_home_is_refused_and_three_ways_to_name_it_work(place: Place) -> None:
    rows = place.rows("rows.jsonl", 6)
    place.join(0, rows)
    place.join(1, rows, at_default=True, environment={"FEDCLI_HOME": str(place.folder / "variable")})
    place.join(2, rows, at_default=True)
    for client in (0, 1):
        error = place("client", "train", "--id", client, code=3).stderr
        assert f"client {client} is a joined party, and its home is not {place.folder}/xdg" in error
    place.train(0, "--home", "H0")
    place("client", "train", "--id", 1, environment={"FEDCLI_HOME": str(place.folder / "variable")})
    place("client", "train", "--id", 2)
    assert (place.folder / "xdg/fedcli" / place.identity() / "2/party.json").is_file()
    place("server", "aggregate")


@pytest.mark.parametrize("umask", [0o000, *(pytest.param(each, marks=pytest.mark.slow) for each in (0o022, 0o077))])
def test_private_files_are_their_owners_alone_whatever_the_umask(place: Place, umask: int) -> None:
    place.join(0, place.rows("rows.jsonl", 6), umask=umask)
    home = place.folder / "H0"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "party.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((place.workspace / "inbox/0").stat().st_mode) == 0o750
    assert stat.S_IMODE((place.workspace / "clients/0.json").stat().st_mode) == 0o644


def test_a_home_that_was_there_before_is_closed_too(place: Place) -> None:
    (place.folder / "H0").mkdir(mode=0o755)
    place.join(0, place.rows("rows.jsonl", 6))
    assert stat.S_IMODE((place.folder / "H0").stat().st_mode) == 0o700


@pytest.mark.slow
def test_killed_at_any_system_call_a_join_is_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = place.rows("rows.jsonl", 6)
    monkeypatch.chdir(place.folder)
    copy, home = place.folder / "killed", place.folder / "home"

    def join() -> None:
        Federation.open(copy).client(0, home=home).join(str(rows), share="minimal").commit()

    def join_and_die(position: int) -> None:
        joining = Federation.open(copy).client(0, home=home).join(str(rows), share="minimal")
        arm(position, after=True)
        joining.commit()

    for position in range(1, 100):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(place.workspace, copy)
        killed = was_killed(fork(lambda position=position: join_and_die(position)))
        join()
        assert json.loads((copy / "clients/0.json").read_bytes())["data"] == {"num_rows": 6}
        assert json.loads((home / "party.json").read_bytes())["source"] == str(rows)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (home, copy / "inbox/0")] == [0o700, 0o750]
        if not killed:
            break
    assert 20 < position < 99


# What is trained


def adapters(workspace: Path) -> list[bytes]:
    """Return the bytes of every update and every round's adapter."""
    return [path.read_bytes() for path in sorted(workspace.rglob(ADAPTER))]


@pytest.mark.slow
def test_a_joined_partys_update_is_that_of_a_simulated_client_with_the_same_rows(place: Place) -> None:
    simulated = Place(shutil.copytree(place.folder, place.folder / "simulated"), place.warm)
    (simulated.workspace / "data").mkdir()
    identity = simulated.workspace / "workspace.json"
    identity.write_text(identity.read_text().replace('"simulation": false', '"simulation": true'))
    for client in range(3):
        rows = place.rows(f"rows-{client}.jsonl", 5 + client, start=10 * client)
        place.join(client, rows)
        place.train(client)
        shutil.copy(rows, simulated.workspace / f"data/client-{client}.jsonl")
        simulated("client", "train", "--id", client)
    assert len(adapters(place.workspace)) == 4
    assert adapters(place.workspace) == adapters(simulated.workspace)


@pytest.mark.slow
def test_run_trains_the_parties_of_this_user_as_processes_of_their_own_do(place: Place) -> None:
    rows = [place.rows(f"rows-{client}.jsonl", 5 + client, start=10 * client) for client in range(3)]
    for client in range(3):
        place.join(client, rows[client], at_default=True)
    together = Place(shutil.copytree(place.folder, place.folder / "together"), place.warm)
    for _ in range(2):
        for client in range(3):
            place("client", "train", "--id", client)
        place("server", "aggregate")
    together("run")  # the homes are in its copy of xdg/; the rows lie where they lay
    assert len(adapters(place.workspace)) == 9
    assert adapters(place.workspace) == adapters(together.workspace)


def test_the_baseline_of_a_party_alone_is_trained_and_the_pooled_one_refused(place: Place) -> None:
    place.join(0, place.rows("rows.jsonl", 6))
    place("train-alone", "--id", 0, "--home", "H0")
    assert json.loads((place.workspace / "baselines/alone-0/baseline.json").read_bytes())["name"] == "alone-0"
    place("train-alone", "--id", 0, code=3)
    error = place("train-pooled", code=2).stderr
    assert "all rows are not at hand: clients 0 have joined and keep theirs" in error
    assert "private" not in place.names()


@pytest.mark.slow
def test_dpo_parties_bring_hh_rlhf_rows(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    place(
        "init",
        "W",
        *settings(*SMALL, "data.source=null", "federation.signatures=off", "task=dpo", "federation.clients=1"),
    )
    rows = [
        {side: f"\n\nHuman: tell {n}\n\nAssistant: {side} {n}" for side in ("chosen", "rejected")} for n in range(6)
    ]
    forked = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    place.join(0, write_rows(place.folder / "rows.jsonl", [*rows, forked]), "--format", "hh-rlhf")
    card = place.registration(0)["data"]
    assert (card["num_rows"], card["format"]) == (6, "hh-rlhf")
    assert card["left_out"] == {"the dialogues fork before their last turn": 1}
    place.train(0, umask=0)
    (cache,) = (place.folder / "H0").glob("reference-*.safetensors")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert not (place.workspace / "private").exists()
    place("server", "aggregate")


@pytest.mark.slow
def test_a_party_may_have_its_own_copy_of_the_base_model_and_no_other_model(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    server_copy, _, other = (Path(shutil.copytree(BUILTIN, tmp_path / name)) for name in ("server", "own", "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    place("init", "W", *settings(*SMALL, "data.source=null", "federation.signatures=off", f"model.base={server_copy}"))
    shutil.rmtree(server_copy)  # what fedcli.yaml names is not on the parties' machines
    rows = place.rows("rows.jsonl", 6)
    place.join(0, rows, code=8)
    place.join(0, rows, "--base", "own")
    place.train(0)
    update = json.loads((place.workspace / "inbox/0/round-00000/update.json").read_bytes())
    assert update["num_samples"] == 6
    for share in ("minimal", "full"):
        error = place.join(1, rows, "--share", share, "--base", "other", code=3).stderr
        assert f"{other} is not the base model of this federation (server): its fingerprint differs" in error
    assert not (place.workspace / "clients/1.json").exists()
    place.join(1, rows, "--base", "own")
    party = place.folder / "H1/party.json"
    party.write_text(party.read_text().replace(str(tmp_path / "own"), str(other)))
    assert "fingerprint differs" in place.train(1, code=3).stderr
    assert not (place.workspace / "inbox/1/round-00000").exists()


@pytest.mark.slow
def test_run_obeys_a_partys_own_base_and_waits_aloud_for_parties_elsewhere(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    server_copy, _ = (Path(shutil.copytree(BUILTIN, tmp_path / name)) for name in ("server", "own"))
    place(
        "init",
        "W",
        *settings(
            *SMALL, "data.source=null", "federation.signatures=off", f"model.base={server_copy}", "federation.clients=2"
        ),
    )
    shutil.rmtree(server_copy)
    place.join(0, place.rows("rows.jsonl", 6), "--base", "own", at_default=True)
    place.join(1, place.rows("rows.jsonl", 6), "--base", "own")
    with subprocess.Popen(
        command("run", "-w", place.workspace, "--rounds", 1),
        cwd=tmp_path,
        env=ENVIRONMENT | {"XDG_DATA_HOME": str(tmp_path / "xdg")},
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "round 0 waits for parties that are not here: 1\n"
        assert (place.workspace / "inbox/0/round-00000").is_dir()
        place.train(1)
        assert running.wait(60) == 0


def test_a_home_in_the_environment_is_a_partys_and_no_simulated_clients(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    place("init", "W", *settings(*SMALL))
    place("client", "train", "--id", 0, environment={"FEDCLI_HOME": str(tmp_path / "H9")})
    assert not (tmp_path / "H9").exists()


def test_data_that_names_nothing_is_refused(place: Place) -> None:
    before = place.names()
    assert "--data names nothing" in place.join(0, "", code=2).stderr
    assert place.names() == before
