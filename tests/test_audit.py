"""`fedcli audit`: canaries are the client's secret, training learns them, and numbers of that stay in its home."""

import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support.federation import configure, read_manifest
from support.kills import copies_killed_at_every_call
from support.processes import FEW, SMALL, Run, command, fedcli, results, run_ok, runner, settings, warm
from support.warm import Place, write_rows

from fedcli import Federation
from fedcli.operations.audit_models import Promise
from fedcli.operations.audit_plant import plant_canaries, take_out_canaries
from fedcli.workspace.canaries import read_canaries
from fedcli.workspace.layout import Home, Workspace
from fedcli.workspace.locks import hold

PLANT = ("audit", "plant", "--canaries", 9, "--repeat", "1,2", "--id")
MEASURE = ("audit", "measure", "--fillings", 4, "--rows", 8, "--id")


def secrets_of(home: Path) -> list[str]:
    """Return all texts that would tell of a client's canaries, and how they begin."""
    document = json.loads((home / "canaries.json").read_bytes())
    texts = [text for canary in document["canaries"] for text in (canary["prompt"], canary["response"])]
    return [*texts, document["seed"], "access code of", "anar"]


def files_that_tell(folder: Path, secrets: list[str], but: str = "nothing") -> list[str]:
    """Return the files whose names or bytes hold a secret, but for those below one folder; fedcli.yaml's docs aside."""
    found = []
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(but):
            contents = name.encode() + b"\n" + path.read_bytes()
            found += [name for secret in secrets if secret.encode() in contents][:1]
    return found


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_canaries_are_trained_and_measured_and_the_workspace_knows_nothing_of_them(
    small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Run = runner(capsys)
    monkeypatch.chdir(small)
    planted = results(run, *PLANT, 1)
    home = small / "private/1"
    assert (planted["status"], planted["num_canaries"], planted["first_round"]) == ("planted", 9, 0)
    assert stat.S_IMODE((home / "canaries.json").stat().st_mode) == 0o600
    document = json.loads((home / "canaries.json").read_bytes())
    assert [canary["repeat"] for canary in document["canaries"]].count(1) == 5, "as many of each"
    assert planted["num_copies"] == sum(each["repeat"] for each in document["canaries"] if each["is_included"])

    told = run("client", "train", "--id", 1)[2]
    assert f"client 1: {planted['num_copies']} of {400 + planted['num_copies']} rows are canaries" in told
    update = json.loads((small / "inbox/1/round-00000/update.json").read_bytes())
    assert update["num_samples"] == 400

    before = sorted(path.relative_to(small) for path in small.rglob("*"))
    measured = results(run, *MEASURE, 1, "--held-out", "data/held-out-test.jsonl")
    new = {str(path.relative_to(small)) for path in small.rglob("*")} - {str(path) for path in before}
    names = {"audits", "audits/round-00000.json", "audits/round-00000.png"}
    assert new == {f"private/1/{name}" for name in names}
    assert files_that_tell(small, secrets_of(home), but="private/1/") == []
    assert files_that_tell(home / "audits", secrets_of(home)[:-2]) == [], "numbers alone"

    base, own = measured["models"]
    assert (base["name"], own["name"], own["what"]) == ("base", "own", "client 1's update of round 0")
    assert [figures["repeat"] for figures in own["canaries"]] == [1, 2, None]
    assert own["canaries"][2]["num_canaries"] == own["canaries"][2]["bound"]["num_canaries"] == 9
    assert base["canaries"][0]["bound"] is None
    assert set(own["rows"]["separation"]) == {"likelihood", "min_k", "min_k_plus"}
    assert own["rows"]["separation"]["min_k"]["num_others"] == 8
    assert set(measured["not_measured"]) == {"aggregate", "alone"}
    assert json.loads((home / "audits/round-00000.json").read_bytes())["models"] == measured["models"]


def test_mistakes_say_what_to_do(small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fedcli: Run = runner(capsys)
    monkeypatch.chdir(small)
    for arguments, code, words in [
        (("plant", "--id", 7), 2, "there is no client 7"),
        (("measure", "--id", 7), 2, "there is no client 7"),
        (("plant", "--id", 1, "--repeat", "1,x"), 2, "--repeat is '1,x'"),
        (("plant", "--id", 1, "--repeat", "1,1"), 2, "--repeat is '1,1'"),
        (("plant", "--id", 1, "--repeat", "0,4"), 2, "different counts from 1 to 1000"),
        (("plant", "--id", 1, "--repeat", ""), 2, "--repeat is ''"),
        (("plant", "--id", 1, "--canaries", 0), 2, "--canaries is 0"),
        (("plant", "--id", 1, "--canaries", 1), 2, "1 canaries cannot have 3 different counts"),
        (("measure", "--id", 1), 6, "client 1 has no canaries"),
        (("measure", "--id", 1, "--home", small.parent), 2, "client 1 has not joined"),
    ]:
        found, out, err = fedcli("audit", *arguments)
        assert (found, out) == (code, ""), arguments
        assert words in err
    assert not (small / "private/1/canaries.json").exists()
    found, out, _ = fedcli("audit", "plant", "--id", 1, "--remove")
    assert (found, out) == (0, "client 1: nothing to take out\n")


def test_a_guarantee_of_one_row_is_none_of_sixteen() -> None:
    assert Promise("row", 1.0, 1e-5).of_rows(1) == (1.0, 1e-5)
    assert Promise("row", 1.0, 1e-9).of_rows(4)[0] == 4.0
    assert Promise("client", 1.0, 1e-5).of_rows(16) == Promise("row", 1.0, 1e-5).of_rows(2), "it is exchanged for one"


@pytest.mark.slow
def test_planting_again_later_or_in_vain_is_clear(small: Path) -> None:
    run_ok(*PLANT, 1, cwd=small)
    kept = (small / "private/1/canaries.json").read_bytes()
    again = fedcli(*PLANT, 1, cwd=small)
    assert (again.returncode, "has canaries already" in again.stderr) == (2, True)
    assert (small / "private/1/canaries.json").read_bytes() == kept
    early = fedcli(*MEASURE, 1, cwd=small)
    assert (early.returncode, "no model knows client 1's canaries yet" in early.stderr) == (6, True)
    far = fedcli(*MEASURE, 1, "--round", 5, cwd=small)
    assert (far.returncode, "there is no round 5 yet" in far.stderr) == (6, True)
    assert run_ok("audit", "plant", "--id", 1, "--remove", cwd=small)["status"] == "removed"

    run_ok("client", "train", "--id", 1, cwd=small)
    with hold(small / "private/1/lock", "its training"):
        busy = fedcli(*PLANT, 1, cwd=small)
    assert (busy.returncode, "busy with client 1" in busy.stderr) == (5, True)
    late = run_ok(*PLANT, 1, cwd=small)
    assert (late["first_round"], late["trained_before"]) == (1, True)
    run_ok("run", "--rounds", 1, cwd=small)
    early = fedcli(*MEASURE, 1, cwd=small)
    assert (early.returncode, "trained from round 1 on" in early.stderr) == (6, True)
    run_ok("run", cwd=small)
    assert [model["name"] for model in run_ok(*MEASURE, 1, cwd=small)["models"]] == ["base", "own", "aggregate"]
    before = run_ok(*MEASURE, 1, "--round", 2, cwd=small)
    assert before["models"][2]["what"] == "round 2"
    run_ok("audit", "plant", "--id", 1, "--remove", cwd=small)
    vain = fedcli(*PLANT, 1, cwd=small)
    assert (vain.returncode, "the federation has finished" in vain.stderr) == (2, True)


@pytest.mark.slow
def test_taken_out_the_rows_are_byte_for_byte_what_they_were(small: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(small, tmp_path / "other"))
    run_ok("client", "train", "--id", 1, cwd=small)
    run_ok(*PLANT, 1, cwd=other)
    run_ok("audit", "plant", "--id", 1, "--remove", cwd=other)
    run_ok("client", "train", "--id", 1, cwd=other)
    for name in ("adapter_model.safetensors", "update.json"):
        update = f"inbox/1/round-00000/{name}"
        assert (small / update).read_bytes() == (other / update).read_bytes()
    cache = "private/1/tokens-*.safetensors"
    assert only(small, cache).read_bytes() == only(other, cache).read_bytes()
    assert only(small, cache).name == only(other, cache).name


@pytest.mark.slow
def test_a_process_that_goes_on_sees_canaries_come_and_go(small: Path) -> None:
    federation = Federation.open(small, threads=1)
    runtime, train = federation.runtimes.load(), federation.state.head.manifest.train

    def counts() -> tuple[int, int]:
        pooled = runtime.rows(None, train)
        return pooled.num_planted, pooled.num_own

    assert counts() == (0, 1200)
    planting = plant_canaries(federation.state, 1, home=None, num_canaries=30, repeats=[8])
    assert counts() == (planting.num_copies, 1200)
    assert planting.num_copies == 8 * planting.num_included > 0
    take_out_canaries(federation.state, 1, home=None)
    assert counts() == (0, 1200)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace that waits for parties, whose updates are signed."""
    made = Place(tmp_path, warm())
    made("init", "W", *settings(*SMALL, "data.source=null"))
    return made


@pytest.mark.slow
def test_a_joined_party_plants_for_itself_alone_and_honest_rounds_go_on(place: Place) -> None:
    for client in range(3):
        place.join(client, place.rows(f"rows{client}.jsonl", 20, "say" * (client + 1)), "--home", f"H{client}", "--yes")
        fingerprint = json.loads(place("keys", "show", "--json").stdout)["clients"][str(client)]["fingerprint"]
        place("server", "enrol", "--id", client, "--fingerprint", fingerprint)
    place(*PLANT, 2, "--home", "H0", code=3)
    place(*PLANT, 2, code=3)
    planted = place(*PLANT, 1, "--home", "H1")
    assert "WARNING: canaries train" in planted.stderr
    secrets = secrets_of(place.folder / "H1")
    for client in range(3):
        place("client", "train", "--id", client, "--home", f"H{client}")
    place("server", "aggregate")
    counted = read_manifest(place.workspace, 1)["aggregation"]["counted"]
    assert [(entry["client"], entry["num_samples"]) for entry in counted] == [(0, 20), (1, 20), (2, 20)]
    measured = json.loads(place(*MEASURE, 1, "--home", "H1", "--json", "--no-plot").stdout)
    assert [model["name"] for model in measured["models"]] == ["base", "own", "aggregate"]
    assert [path.name for path in (place.folder / "H1/audits").iterdir()] == ["round-00001.json"]
    place("client", "train", "--id", 1, "--home", "H1", "--refresh")
    assert place.registration(1)["data"]["num_rows"] == 20
    place("verify")
    assert files_that_tell(place.workspace, secrets) == []
    (place.folder / "H1/canaries.json").write_text("{")
    place("audit", "measure", "--id", 1, "--home", "H1", code=7)
    place("audit", "plant", "--id", 1, "--home", "H1", "--remove")
    place("audit", "measure", "--id", 1, "--home", "H1", code=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["preference", "text", "chat"])
def test_canaries_have_the_form_of_the_clients_rows(tmp_path: Path, kind: str) -> None:
    texts = [{"text": f"Row {number} says {number * 7}."} for number in range(40)]
    write_rows(tmp_path / "rows.jsonl", texts)
    more = {
        "preference": ("task=dpo", "data.source=builtin:demo"),
        "text": (f"data.source={tmp_path / 'rows.jsonl'}", "data.format=text", "data.partition=iid"),
        "chat": ("data.source=builtin:demo", "data.template=vicuna", "train.max_length=256"),
    }[kind]
    run_ok("init", "W", *settings(*FEW, *more), cwd=tmp_path)
    workspace = tmp_path / "W"
    run_ok(*PLANT, 1, cwd=workspace)
    planted = read_canaries(Workspace(workspace).private(1))
    assert planted is not None
    assert planted.kind == ("instruction" if kind == "chat" else kind)
    assert all((canary.rejected is not None) == (kind == "preference") for canary in planted.canaries)
    run_ok("run", "--rounds", 1, cwd=workspace)
    measured = run_ok(*MEASURE, 1, cwd=workspace)
    assert [model["name"] for model in measured["models"]] == ["base", "own", "aggregate"]
    assert measured["models"][1]["canaries"][-1]["median_exposure"] is not None


@pytest.mark.slow
def test_canaries_that_do_not_fit_are_refused_before_anything_is_planted(small: Path) -> None:
    configure(small, "train.max_length=24")
    run_ok("run", "--rounds", 1, cwd=small)
    done = fedcli(*PLANT, 1, cwd=small)
    assert (done.returncode, "cannot be written as rows" in done.stderr) == (3, True)
    assert not (small / "private/1/canaries.json").exists()


@pytest.mark.slow
def test_a_baseline_from_before_is_not_taken_for_one_that_knows_them(small: Path) -> None:
    run_ok("train-alone", "--id", 1, cwd=small)
    run_ok(*PLANT, 1, cwd=small)
    run_ok("client", "train", "--id", 1, cwd=small)
    measured = run_ok(*MEASURE, 1, cwd=small)
    assert measured["not_measured"]["alone"] == "the baseline alone-1 was trained before they were planted"
    shutil.rmtree(small / "baselines/alone-1")
    run_ok("train-alone", "--id", 1, cwd=small)
    assert run_ok(*MEASURE, 1, cwd=small)["models"][-1]["name"] == "alone"


@pytest.mark.slow
def test_held_out_rows_that_are_trained_on_do_not_count(small: Path, tmp_path: Path) -> None:
    run_ok(*PLANT, 1, cwd=small)
    run_ok("client", "train", "--id", 1, cwd=small)
    own = (small / "data/client-1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(own[:3]) + (small / "data/held-out-test.jsonl").read_text())
    rows = run_ok(*MEASURE, 1, "--held-out", tmp_path / "held.jsonl", cwd=small)["models"][1]["rows"]
    assert rows["num_shared"] == 3
    refused = fedcli(*MEASURE, 1, "--held-out", "data/client-1.jsonl", cwd=small)
    assert (refused.returncode, "are among the client's own" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_killed_at_any_system_call_a_planting_is_whole_or_not_there(small: Path) -> None:
    (small / "data").rename(small.parent / "data")
    template = small
    (template / "data").mkdir()
    shutil.copy(small.parent / "data/client-1.jsonl", template / "data")
    points = 0

    def plant(workspace: Path) -> None:
        plant_canaries(Federation.open(workspace).state, 1, home=None, num_canaries=4, repeats=[1])

    for workspace in copies_killed_at_every_call(template, plant, True):
        points += 1
        home = Home(workspace / "private/1")
        planted = read_canaries(home)
        assert planted is None or len(planted.canaries) == 4
        if planted is None:
            plant(workspace)
        state = Federation.open(workspace).state
        assert take_out_canaries(state, 1, home=None).status == "removed"
        assert read_canaries(home) is None
    assert points > 5


@pytest.mark.slow
def test_killed_while_it_measures_an_audit_is_made_again(small: Path) -> None:
    run_ok(*PLANT, 1, cwd=small)
    run_ok("client", "train", "--id", 1, cwd=small)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for seconds in (4, 7, 9):
        process = subprocess.Popen(
            command("audit", "measure", "--id", 1, "--json"), cwd=small, env=environment, stdout=subprocess.DEVNULL
        )
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert run_ok(*MEASURE, 1, cwd=small)["models"][1]["name"] == "own"
    names = {path.name for path in (small / "private/1/audits").iterdir() if not path.name.startswith(".tmp-")}
    assert names == {"round-00000.json", "round-00000.png"}
    assert fedcli("verify", cwd=small).returncode == 0


@pytest.mark.slow
def test_a_federation_without_privacy_is_found_out(tmp_path: Path) -> None:
    """Lower bounds of epsilon above 1 for what the server sees, and exposures as high as they can be."""
    some = ("federation.clients=2", "federation.rounds=3", "train.steps=100", "data.max_rows=60")
    run_ok("init", "W", *settings(*some), cwd=tmp_path)
    run_ok("audit", "plant", "--id", 0, cwd=tmp_path / "W")
    run_ok("run", "--rounds", 2, cwd=tmp_path / "W")
    measured = run_ok("audit", "measure", "--id", 0, "--fillings", 32, cwd=tmp_path / "W")
    base, own, _ = measured["models"]
    assert own["canaries"][-1]["bound"]["epsilon"] > 1
    assert own["canaries"][2]["median_exposure"] == 5.0
    assert own["canaries"][2]["separation"]["min_k"]["auc"]["value"] > 0.95
    assert base["canaries"][2]["median_exposure"] < 4
